"""Where checkpoints lie: local files, and object stores through fsspec."""

from distckpt.storage.contract import (
    Begun,
    Buffer,
    Capabilities,
    ContinuingStorage,
    FileInfo,
    KeepsUploads,
    OpenFile,
    Readable,
    StepwiseStorage,
    Storage,
    UnfinishedUpload,
    holds,
    read_scattered,
    withdraw,
)
from distckpt.storage.local import LocalStorage
from distckpt.storage.objects import ObjectStorage
from distckpt.storage.opening import open_storage
from distckpt.storage.room import BoundedStorage, Room, mount_point, room_of
from distckpt.storage.wrappers import CountingStorage, VerbCount

__all__ = [
    "Begun",
    "BoundedStorage",
    "Buffer",
    "Capabilities",
    "ContinuingStorage",
    "CountingStorage",
    "FileInfo",
    "KeepsUploads",
    "LocalStorage",
    "ObjectStorage",
    "OpenFile",
    "Readable",
    "Room",
    "StepwiseStorage",
    "Storage",
    "UnfinishedUpload",
    "VerbCount",
    "holds",
    "mount_point",
    "open_storage",
    "read_scattered",
    "room_of",
    "withdraw",
]

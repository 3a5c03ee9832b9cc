"""Pins: small files that tell retention to keep a checkpoint whatever its rules say.

Invariant: a pin never outlives a failed attempt to set it, and none is set on what is no checkpoint.
"""

from __future__ import annotations

import json
import time

from distckpt import names
from distckpt.catalog import read_manifest, scan
from distckpt.errors import CheckpointNotFoundError
from distckpt.storage import Storage


def pin(storage: Storage, folder: str) -> bool:
    """Pin a committed checkpoint, and say whether it was not pinned before.

    A job that is deleting this very checkpoint may still win: then there is none, and this says so.

    Raises:
        CheckpointNotFoundError: There is none in this folder, or it was deleted meanwhile.
        CheckpointDamagedError: Its manifest is not whole.
        StorageError: The pin could not be written.
    """
    read_manifest(storage, folder)
    name = names.join(folder, names.PIN)
    try:
        storage.publish(name, json.dumps({"created": time.time()}).encode())
        is_new = True
    except FileExistsError:
        is_new = False
    try:
        read_manifest(storage, folder)
    except CheckpointNotFoundError:
        storage.delete([name])
        raise
    return is_new


def unpin(storage: Storage, folder: str) -> bool:
    """Take a checkpoint's pin away, and say whether it had one; also of one that is damaged.

    Raises:
        CheckpointNotFoundError: There is nothing in this folder.
        StorageError: The pin could not be deleted.
    """
    inner = [file.name for file in storage.list(folder)]
    if not inner:
        raise CheckpointNotFoundError(path=names.join(storage.url, folder), reason="it is empty, or not there")
    name = names.join(folder, names.PIN)
    storage.delete([name])
    return name in inner


def pinned_steps(storage: Storage) -> list[int]:
    """Return the steps of a run that are pinned, lowest first.

    Raises:
        StorageError: The directory could not be listed.
    """
    return [folder.step for folder in scan(storage) if folder.pinned]

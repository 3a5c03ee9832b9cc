"""How much room a file system has left, as far as the system says."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from distckpt.owner import this_machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What is left of a file system; a quota may be lower.

    Attributes:
        folder: The folder that was asked about: the nearest one that exists.
        place: The file system's name on this machine since its start: who names the same one shares the room.
        num_bytes: How many bytes this user may still write there.
        takes_files: Whether it still takes new files.
    """

    folder: str
    place: str
    num_bytes: int
    takes_files: bool


@runtime_checkable
class BoundedStorage(Protocol):
    """A storage that can tell how much room it has left."""

    def room(self) -> Room | None:
        """Return what is left of the file system below the root; None if the system does not say."""
        ...


def room_of(storage: object) -> Room | None:
    """Return how much room a storage has left; None if it cannot tell."""
    return storage.room() if isinstance(storage, BoundedStorage) else None


def room_at(path: Path) -> Room | None:
    """Return what is left of the file system that a file of this path would lie on; None if the system does not say.

    Source: file systems in user space without a bound of their own report no blocks at all, as tmpfs without a limit.
    """
    for folder in (path, *path.parents):
        try:
            facts, device = os.statvfs(folder), folder.stat().st_dev
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return None
        if facts.f_blocks == 0:
            return None
        return Room(
            folder=str(folder),
            place=f"{this_machine()}/{device}",
            num_bytes=facts.f_bavail * facts.f_frsize,
            takes_files=facts.f_files == 0 or facts.f_favail > 0,
        )
    return None


def mount_point(folder: str) -> str:
    """Return the top of the file system that a folder lies on, which is there whatever is deleted below it."""
    top = Path(folder)
    with suppress(OSError):
        device = top.stat().st_dev
        while top != top.parent and top.parent.stat().st_dev == device:
            top = top.parent
    return str(top)

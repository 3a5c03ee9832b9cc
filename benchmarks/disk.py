"""What a benchmark does to files outside the time that it takes: make durable, forget, delete."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
from pathlib import Path


def make_durable(path: Path, *, part: int = 0, num_parts: int = 1) -> None:
    """Sync a file, or every file and folder below a folder, and the folder that holds it.

    For peers that do not do so themselves; it is part of their time. Of several ranks, each syncs a part of the files.
    """
    if path.is_dir():
        found = sorted(path.rglob("*"))
        files = [each for each in found if each.is_file()]
        folders = [each for each in found if each.is_dir()] + [path]
    else:
        files, folders = [path], []
    for each in [*files[part::num_parts], *(folders if part == 0 else []), path.parent]:
        fd = os.open(each, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def forget(path: Path) -> None:
    """Drop the page cache of every file below a folder, as far as the kernel does it: not what is still mapped."""
    gc.collect()  # mappings that a peer has left behind
    for each in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        fd = os.open(each, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def warm(path: Path) -> None:
    """Read every file below a folder, so that it lies in the page cache."""
    buffer = bytearray(8 << 20)
    for each in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        with each.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there; a manager may be tidying up what has lost its manifest, too."""
    while path.is_dir():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
    path.unlink(missing_ok=True)


def used_bytes(path: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())

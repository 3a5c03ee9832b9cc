"""Files that are open for writing: room is reserved, and chunks are written one after another."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from distckpt.storage.contract import Buffer
from distckpt.storage.failures import local_error

_NO_RESERVING = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


def reserve(fd: int, num_bytes: int, path: str) -> None:
    """Reserve room for a file, if its file system can.

    Raises:
        StorageError: There is not enough.
    """
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno not in _NO_RESERVING:
            raise local_error(error, action="write", path=path, num_written=0, num_bytes=num_bytes) from error


def write_all(fd: int, chunks: Iterable[Buffer], path: str, *, num_bytes: int | None) -> int:
    """Write all chunks, however little the system takes at a time; return their size.

    Args:
        fd: The file.
        chunks: What to write.
        path: Its path, for errors.
        num_bytes: How much it will be, for errors; None if that is not known.

    Raises:
        StorageError: A write failed.
    """
    num_written = 0
    for chunk in chunks:
        left = memoryview(chunk)
        left = left.cast("B") if left.nbytes else memoryview(b"")
        while left:
            try:
                count = os.write(fd, left)
            except OSError as error:
                raise local_error(
                    error, action="write", path=path, num_written=num_written, num_bytes=num_bytes
                ) from error
            num_written += count
            left = left[count:]
    return num_written

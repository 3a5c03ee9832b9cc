"""An open local file: read with system calls, or seen as memory where that is safe.

Reading by sight saves a copy: bytes can be hashed where the page cache holds them, and copied while the processor's own
cache still does. But what cannot be read then ends the process with a signal instead of an error; so it is done only on
file systems of this machine, for files that are long enough, and the system is asked to bring each range first, which
it answers with an error.
Invariant: `LocalFile.seen` gives no memory that was not there when it was asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from distckpt.storage.failures import local_error, telling

if TYPE_CHECKING:
    import numpy as np

# To show memory and hide it again stops the other threads for a moment, whatever its size.
# Source: 1.1 GB were hashed and copied in 0.044 s in pieces of 8 MiB, in 0.041 of 32, and in 0.037 of 64.
SEEN_BYTES = 64 << 20
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22  # Linux 5.14
_MOST_BUFFERS = 1024  # that one system call takes
# The file systems of this machine: ext, XFS, Btrfs, tmpfs, overlay, ZFS, F2FS. Source: statfs(2).
_OWN = {0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x794C7630, 0x2FC12FC1, 0xF2F52010}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class LocalFile:
    """An open file.

    Args:
        fd: Its descriptor, which stays the caller's.
        path: Its path, for errors.

    Raises:
        StorageError: The system tells nothing of the file.
    """

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self._map: mmap.mmap | None = None
        with telling("read", path):
            self._num_bytes = os.fstat(fd).st_size
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if self._num_bytes and _file_system(fd) in _OWN:
                self._map = mmap.mmap(fd, self._num_bytes, prot=mmap.PROT_READ)
                self._address = _array(memoryview(self._map)).__array_interface__["data"][0]

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Fill buffers, one after another, from the file's byte `offset` on, with few system calls.

        Raises:
            EOFError: The file ends before they are full.
            StorageError: It could not be read.
        """
        left = [view.cast("B") for view in into if view.nbytes]
        while left:
            try:
                count = os.preadv(self._fd, left[:_MOST_BUFFERS], offset)
            except OSError as error:
                raise local_error(error, action="read", path=self._path) from error
            if count == 0:
                raise EOFError(f"{self._path!r} ends at byte {offset}, more are needed")
            offset += count
            num_full = 0
            while num_full < len(left) and count >= len(left[num_full]):
                count -= len(left[num_full])
                num_full += 1
            del left[:num_full]
            if count:
                left[0] = left[0][count:]

    @contextlib.contextmanager
    def seen(self, begin: int, num_bytes: int) -> Iterator[memoryview | None]:
        """Give bytes of the file as memory, while the context lasts; None if they have to be read."""
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is None or begin + num_bytes > self._num_bytes:
            yield None
            return
        length = begin + num_bytes - first
        if _libc.madvise(self._address + first, length, _MADV_POPULATE_READ) != 0:
            yield None  # reading will tell what is wrong; or this system is too old to ask
            return
        try:
            yield memoryview(self._map)[begin : begin + num_bytes]
        finally:
            _libc.madvise(self._address + first, length, _MADV_DONTNEED)  # the process need not keep it

    def close(self) -> None:
        """Let go of the memory; the descriptor stays open."""
        if self._map is not None:
            # What still looks at it keeps it alive, and lets it go.
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes between buffers of one size, without holding the GIL."""
    import numpy as np

    if len(target):
        np.copyto(_array(target), _array(source))


def _array(view: memoryview) -> np.ndarray[Any, Any]:
    import numpy as np  # who only lists checkpoints needs none

    return np.frombuffer(view, dtype=np.uint8)


def _file_system(fd: int) -> int:
    """Return the number that says what kind of file system a file lies on."""
    facts = (ctypes.c_long * 32)()  # larger than the system's structure, whose first field it is
    if _libc.fstatfs(fd, ctypes.byref(facts)) != 0:
        raise OSError(ctypes.get_errno(), "fstatfs")
    return int(facts[0])

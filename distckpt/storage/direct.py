"""Direct writes: from aligned memory to the disk, past the page cache.

They cost no second copy and push nothing out of the page cache, but not every file system has them, and not on every
disk are they quicker: a probe decides, once for each storage.
Invariant: whatever does not fit (unaligned memory, a last part of a block, a file system that refuses) is written
through the page cache instead; the bytes in the file are the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from distckpt.storage.contract import Buffer
from distckpt.threads import KeptThreads, call_off

BLOCK_BYTES = 4096  # addresses, offsets and lengths are multiples of it; disks ask for 512 or 4096
LEAST_BYTES = 32 << 20  # below, a file is durable so soon that nothing is gained
NUM_WRITERS = 2
MOST_PENDING = 4  # writes that wait for the threads, unless their memory is there anyway
# Of one call: each time that a thread is woken, the training's threads are stopped. The first and the last are smaller,
# so that the disk begins at once, and all threads end together.
# Source: a save of 307 MB cost training 15 ms in calls of 4 MiB, 11 in calls of 16 MiB.
LEAST_WRITE_BYTES = 4 << 20
WRITE_BYTES = 16 << 20
_SHARES = 8  # of what is left, so that no thread has much more to do than the others
_MOST_VIEWS = 512  # below the system's limit of buffers a call
PROBE_BYTES = 16 << 20
PROBE_ROUNDS = 2
# Direct writes leave the processors to training, so they may be a little slower.
MOST_TIMES_SLOWER = 1.25

logger = logging.getLogger("distckpt")


def is_worth_it(folder_fd: int) -> bool:
    """Say whether direct writes into the file system of a folder work, and are not slower than others.

    Writes files without a name, which are gone whatever dies; takes as long as writing 64 MiB.
    """
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
    except OSError:
        return False  # no such thing here: mostly network file systems
    try:
        with mmap.mmap(-1, PROBE_BYTES) as filling:
            filling.write(os.urandom(1 << 20) * (PROBE_BYTES >> 20))
            piece = memoryview(filling)
            try:
                times = [(_timed(fd, piece, direct=True), _timed(fd, piece, direct=False)) for _ in range(PROBE_ROUNDS)]
            finally:
                piece.release()
    except OSError:
        return False
    finally:
        os.close(fd)
    return min(direct for direct, _ in times) <= MOST_TIMES_SLOWER * min(buffered for _, buffered in times)


def _timed(fd: int, piece: memoryview, *, direct: bool) -> float:
    """Return how many seconds it takes until `piece` is durable in new room of a file."""
    os.ftruncate(fd, 0)
    os.posix_fallocate(fd, 0, len(piece))
    set_direct(fd, direct=direct)
    begun = time.perf_counter()
    write_at(fd, [piece], 0)
    os.fsync(fd)
    return time.perf_counter() - begun


class DirectWriter:
    """Writes large files into one directory past the page cache, with threads, if a probe shows that this is worth it.

    Args:
        path: The directory's path, for the log.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._is_worth_it: bool | None = None  # not probed yet
        self._threads = KeptThreads(NUM_WRITERS, "distckpt-disk")

    def suits(self, num_bytes: int, opened: Callable[[], int]) -> bool:
        """Say whether a file of this size should go past the page cache; the first time, try it out.

        Args:
            num_bytes: The file's size.
            opened: Opens the directory, and returns its descriptor.

        Raises:
            StorageError: The directory could not be opened.
        """
        if num_bytes < LEAST_BYTES:
            return False
        if self._is_worth_it is None:
            folder_fd = opened()
            try:
                self._is_worth_it = is_worth_it(folder_fd)
            finally:
                os.close(folder_fd)
            logger.debug("%s: writes go %s the page cache", self._path, "past" if self._is_worth_it else "through")
        return self._is_worth_it

    def write(self, fd: int, chunks: Iterable[Buffer], *, num_bytes: int) -> Iterator[int]:
        """Write chunks one after another, and yield how many bytes have been taken after each.

        Memory is read until the iterator is exhausted or closed; then no write is under way.

        Args:
            fd: The file.
            chunks: What to write.
            num_bytes: How much that will be.

        Raises:
            OSError: A write failed.
        """
        offset, writes = 0, _Writes(fd, self._threads.pool, num_bytes)
        try:
            with contextlib.suppress(OSError):
                set_direct(fd, direct=True)
            for chunk in chunks:
                view = memoryview(chunk)
                view = view.cast("B") if view.nbytes else memoryview(b"")
                num_direct = len(view) // BLOCK_BYTES * BLOCK_BYTES
                if offset % BLOCK_BYTES or address(view) % BLOCK_BYTES:
                    num_direct = 0
                writes.take(view[:num_direct], offset)
                if num_direct < len(view):
                    writes.finish()
                    set_direct(fd, direct=False)  # from here on, offsets do not fit
                    write_at(fd, [view[num_direct:]], offset + num_direct)
                offset += len(view)
                yield offset
            writes.finish()
        finally:
            writes.call_off()
            with contextlib.suppress(OSError):
                set_direct(fd, direct=False)


class _Writes:
    """What threads write of one file: neighbouring chunks in one call."""

    def __init__(self, fd: int, threads: ThreadPoolExecutor, num_left: int) -> None:
        self._fd = fd
        self._num_left = num_left
        self._threads = threads
        self._pending: list[Future[None]] = []
        self._views: list[memoryview] = []
        self._begin = 0
        self._num_bytes = 0
        self._memory: object = None
        self._stays = False  # whether chunks are parts of one memory, which is there however many of them wait
        self._enough = LEAST_WRITE_BYTES

    def take(self, view: memoryview, offset: int) -> None:
        """Take the next chunk; where the threads have enough to do, write it here."""
        if not view:
            return
        if not self._views:
            self._begin = offset
        self._stays, self._memory = view.obj is self._memory, view.obj
        self._views.append(view)
        self._num_bytes += len(view)
        if self._num_bytes >= self._enough or len(self._views) == _MOST_VIEWS:
            self._pass_on()

    def finish(self) -> None:
        """Return once all that was taken is written."""
        self._pass_on()
        while self._pending:
            self._pending.pop().result()

    def call_off(self) -> None:
        """Write nothing more, and return once the threads are done with the memory."""
        call_off(self._pending)

    def _pass_on(self) -> None:
        """Have what was taken written by a thread; here, where threads still wait for a processor, or enough waits."""
        self._num_left -= self._num_bytes
        views, self._views, self._num_bytes = self._views, [], 0
        self._enough = max(min(2 * self._enough, WRITE_BYTES, self._num_left // _SHARES), LEAST_WRITE_BYTES)
        for done in [each for each in self._pending if each.done()]:
            self._pending.remove(done)
            done.result()
        is_full = len(self._pending) >= MOST_PENDING and not self._stays
        are_late = bool(self._pending) and not any(each.running() for each in self._pending)
        if not self._begin or is_full or are_late:  # the first is written here, so the disk begins at once
            write_at(self._fd, views, self._begin)
        else:
            self._pending.append(self._threads.submit(write_at, self._fd, views, self._begin))


def write_at(fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Write views one after another from `offset` on; if the system refuses a direct write, through the page cache."""
    left = deque(view for view in views if view)
    while left:
        try:
            count = os.pwritev(fd, left, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not is_direct(fd):
                raise
            set_direct(fd, direct=False)
            continue
        offset += count
        if count % BLOCK_BYTES and is_direct(fd):
            set_direct(fd, direct=False)  # it took an odd number: the rest does not fit any more
        while left and count >= len(left[0]):
            count -= len(left.popleft())
        if count:
            left[0] = left[0][count:]


def address(view: memoryview) -> int:
    """Return where a buffer begins in memory."""
    import numpy as np  # only who writes large files needs it

    if not view.nbytes:
        return 0
    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0])


def is_direct(fd: int) -> bool:
    """Say whether writes to an open file go past the page cache."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def set_direct(fd: int, *, direct: bool) -> None:
    """Let writes to an open file go past the page cache, or through it.

    Raises:
        OSError: The file system has no direct writes.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)

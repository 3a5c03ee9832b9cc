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
import mmap
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from distckpt.storage.contract import Buffer

BLOCK_BYTES = 4096  # addresses, offsets and lengths are multiples of it; disks ask for 512 or 4096
LEAST_BYTES = 32 << 20  # below, a file is durable so soon that nothing is gained
NUM_WRITERS = 2
MOST_PENDING = 4  # writes handed to the threads and not yet done
PROBE_BYTES = 16 << 20
PROBE_ROUNDS = 2
# Direct writes leave the processors to training, so they may be a little slower.
MOST_TIMES_SLOWER = 1.25


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
    write_at(fd, piece, 0)
    os.fsync(fd)
    return time.perf_counter() - begun


def write(fd: int, chunks: Iterable[Buffer]) -> Iterator[int]:
    """Write chunks one after another, with threads, and yield how many bytes have been handed over after each.

    Memory is read until the iterator is exhausted or closed; then no write is under way.

    Raises:
        OSError: A write failed.
    """
    offset = 0
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="distckpt-disk") as writers:
        try:
            with contextlib.suppress(OSError):
                set_direct(fd, direct=True)
            for chunk in chunks:
                view = memoryview(chunk)
                view = view.cast("B") if view.nbytes else memoryview(b"")
                num_direct = len(view) // BLOCK_BYTES * BLOCK_BYTES
                if offset % BLOCK_BYTES or address(view) % BLOCK_BYTES:
                    num_direct = 0
                if num_direct:
                    pending.append(writers.submit(write_at, fd, view[:num_direct], offset))
                if num_direct < len(view):
                    _finish(pending, 0)
                    set_direct(fd, direct=False)  # from here on, offsets do not fit
                    write_at(fd, view[num_direct:], offset + num_direct)
                _finish(pending, MOST_PENDING)
                offset += len(view)
                yield offset
            _finish(pending, 0)
        finally:
            # The threads have to be done with the memory before it is used for something else.
            for write_under_way in pending:
                write_under_way.cancel()
            with contextlib.suppress(OSError):
                set_direct(fd, direct=False)


def _finish(pending: deque[Future[None]], num_left: int) -> None:
    while len(pending) > num_left:
        pending.popleft().result()


def write_at(fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`; where the file system refuses a direct write, through the page cache."""
    while view:
        try:
            count = os.pwrite(fd, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not is_direct(fd):
                raise
            set_direct(fd, direct=False)
            continue
        view, offset = view[count:], offset + count
        if view and count % BLOCK_BYTES:
            set_direct(fd, direct=False)  # it took an odd number: the rest does not fit any more


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

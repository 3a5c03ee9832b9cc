"""Ceilings: what the disk and the memory of this machine can do with the same bytes, and nothing else to do.

A raw write ends with an fsync of file and folder, a raw read fills the very tensors that a load fills. Where these lie
on a GPU, the copies go through pinned memory in one piece.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
import xxhash

from benchmarks.states import State, view

PIECE_BYTES = 16 << 20
HASHED_BYTES = 4 << 20  # of 256 KiB to 4 MiB the quickest
ALIGNMENT_BYTES = 4096  # what direct writes need at most
_MOST_BUFFERS = 512  # below the system's limit of buffers a call
NUM_THREADS = min(8, len(os.sched_getaffinity(0)))  # of reads and direct writes; also of peers that are tuned

Task = TypeVar("Task")


class RawBytes:
    """As many bytes as a share of a state has, in memory that is touched and aligned, and files made of them.

    Args:
        num_bytes: How many.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._padded = max(-(-num_bytes // ALIGNMENT_BYTES), 1) * ALIGNMENT_BYTES
        mapped = mmap.mmap(-1, self._padded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)  # the best memory there is
        self._memory = memoryview(mapped)
        filling = memoryview(os.urandom(1 << 20))
        for begin in range(0, self._padded, len(filling)):
            end = min(begin + len(filling), self._padded)
            self._memory[begin:end] = filling[: end - begin]

    def write_buffered(self, path: Path) -> None:
        """Write through the page cache."""
        self._write(path, reserve=False, direct=False)

    def write_reserved(self, path: Path) -> None:
        """Write through the page cache into room that was reserved."""
        self._write(path, reserve=True, direct=False)

    def write_direct(self, path: Path) -> None:
        """Write past the page cache, with several threads.

        Raises:
            OSError: The file system has no direct writes.
        """
        self._write(path, reserve=True, direct=True)

    def _write(self, path: Path, *, reserve: bool, direct: bool) -> None:
        num_bytes = self._padded if direct else self._num_bytes
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0))
        try:
            if reserve:
                os.posix_fallocate(fd, 0, max(num_bytes, 1))

            def write(begin: int) -> None:
                piece = self._memory[begin : min(begin + PIECE_BYTES, num_bytes)]
                while piece:
                    count = os.pwrite(fd, piece, begin)
                    piece, begin = piece[count:], begin + count

            _spread(write, range(0, num_bytes, PIECE_BYTES), num_threads=NUM_THREADS if direct else 1)
            if direct:
                os.ftruncate(fd, self._num_bytes)
            os.fsync(fd)
        finally:
            os.close(fd)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_state(state: State, path: Path) -> None:
    """Write a state's bytes one after another, for `RawRead`; not timed."""
    with path.open("wb") as file:
        for tensor in state.tensors().values():
            file.write(view(tensor.cpu()))
        file.flush()
        os.fsync(file.fileno())


class RawRead:
    """A read of a file that `write_state` wrote into a state's tensors, with several threads and large reads.

    Args:
        state: What is filled.
        part: Of several ranks, which one this is; each begins with a part of its own, so that the device is read once.
        num_parts: The number of ranks.
        hashed: Whether each piece is hashed once it is there, while the processor's cache holds it, as a load does that
            checks digests. They are compared with nothing.
    """

    def __init__(self, state: State, *, part: int = 0, num_parts: int = 1, hashed: bool = False) -> None:
        self._state = state
        self._hashed = hashed
        self._host: list[torch.Tensor] = []
        if state.device == "cuda":
            self._host = [torch.empty_like(each, device="cpu").pin_memory() for each in state.tensors().values()]
        self._part, self._num_parts = part, num_parts

    def read(self, path: Path) -> None:
        """Fill the tensors, which may be others than at the time before: some peers replace them."""
        tensors = [tensor.detach() for tensor in self._state.tensors().values()]
        most = HASHED_BYTES if self._hashed else PIECE_BYTES
        tasks = _reads([view(each) for each in self._host or tensors], most)
        first = self._part * len(tasks) // self._num_parts
        fd = os.open(path, os.O_RDONLY)
        try:
            _spread(lambda task: self._bring(fd, *task), tasks[first:] + tasks[:first], num_threads=NUM_THREADS)
        finally:
            os.close(fd)
        if self._host:
            torch._foreach_copy_(tensors, self._host, non_blocking=True)
            torch.cuda.synchronize()

    def _bring(self, fd: int, offset: int, buffers: list[memoryview]) -> None:
        _read_full(fd, offset, buffers)
        if self._hashed:
            whole = xxhash.xxh3_128()
            for buffer in buffers:
                whole.update(buffer)
            whole.digest()


def _reads(memory: Sequence[memoryview], most: int) -> list[tuple[int, list[memoryview]]]:
    """Return what to read in one call each: a place in the file, and the memory that it fills."""
    tasks: list[tuple[int, list[memoryview]]] = []
    offset, room = 0, 0
    for whole in memory:
        for begin in range(0, len(whole), most):
            piece = whole[begin : begin + most]
            if len(piece) > room or len(tasks[-1][1]) == _MOST_BUFFERS:
                tasks.append((offset, []))
                room = most
            tasks[-1][1].append(piece)
            room -= len(piece)
            offset += len(piece)
    return tasks


def _read_full(fd: int, offset: int, buffers: list[memoryview]) -> None:
    wanted = sum(len(buffer) for buffer in buffers)
    count = os.preadv(fd, buffers, offset)
    while count < wanted:  # the kernel may stop early: what is missing then stands in the last buffers
        done, rest = count, []
        for buffer in buffers:
            skipped = min(done, len(buffer))
            done -= skipped
            if skipped < len(buffer):
                rest.append(buffer[skipped:])
        more = os.preadv(fd, rest, offset + count)
        if more == 0:
            raise EOFError(f"the file ends {wanted - count} bytes early")
        count += more


def _spread(work: Callable[[Task], None], tasks: Sequence[Task], *, num_threads: int) -> None:
    if num_threads == 1 or len(tasks) == 1:
        for task in tasks:
            work(task)
        return
    with ThreadPoolExecutor(num_threads) as threads:
        for _ in threads.map(work, tasks):
            pass


class MemoryCopy:
    """One copy of a state in memory that is warm: what the stall of a background save cannot go below.

    From a GPU it is one copy of as many bytes, in one piece, to pinned memory.

    Args:
        tensors: What is copied.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._from = [tensor.detach() for tensor in tensors]
        num_bytes = sum(-(-tensor.nbytes // 64) * 64 for tensor in self._from)
        self._is_cuda = any(tensor.is_cuda for tensor in self._from)
        flat = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)
        if self._is_cuda:
            self._from, self._to = [torch.ones(num_bytes, dtype=torch.uint8, device="cuda")], [flat]
            return
        self._to, offset = [], 0
        for tensor in self._from:
            self._to.append(flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            offset += -(-tensor.nbytes // 64) * 64

    def copy(self, *, num_times: int = 1) -> None:
        """Copy everything, so many times over."""
        for _ in range(num_times):
            torch._foreach_copy_(self._to, self._from, non_blocking=self._is_cuda)
        if self._is_cuda:
            torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    """Return how many seconds `work` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun

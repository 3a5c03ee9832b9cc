"""Data files: safetensors files written with digests on the way, and read in ranges that are checked on the way.

A file is cut into segments, each with a digest: the header, and then pieces of `SEGMENT_BYTES`; so a reader can check
just what it reads.
Invariant: `read_ranges` hands out no byte that its segment's digest does not vouch for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from distckpt import names
from distckpt.checksum import digest
from distckpt.errors import CheckpointDamagedError
from distckpt.garbage import kept_off
from distckpt.manifest import DataFile, Segment
from distckpt.safetensors import Piece, make_header
from distckpt.storage import Storage

# Large enough that a read is efficient and digests are few, small enough that reading a part of a tensor reads little
# more, and that a segment is still in the processor's cache when it is hashed after it was read.
SEGMENT_BYTES = 4 << 20
# Reading, hashing and copying release the GIL, so that threads overlap them.
NUM_READERS = min(4, 2 * (os.cpu_count() or 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Bytes of a data file that are wanted.

    Attributes:
        begin: The first byte's place in the file.
        into: Writable memory that they go to; its length is how many there are.
    """

    begin: int
    into: memoryview

    @property
    def end(self) -> int:
        """The place behind the last byte."""
        return self.begin + len(self.into)


def write(
    storage: Storage, folder: str, name: str, *, rank: int, pieces: Sequence[Piece], payload: memoryview
) -> tuple[DataFile, list[int]]:
    """Write a data file, durable when this returns but for its directory entry.

    Args:
        storage: The storage.
        folder: The checkpoint's folder in it.
        name: The file's name in the checkpoint.
        rank: The rank that writes it.
        pieces: What the file holds, in order.
        payload: The bytes of all pieces, one after another.

    Returns:
        The file's facts, and the offset of each piece from the file's start.

    Raises:
        StorageError: It could not be written; nothing of that name is left.
    """
    with kept_off():
        header = make_header(pieces, metadata={"format": "pt"})
    cuts = range(0, len(payload), SEGMENT_BYTES)
    parts = [memoryview(header), *(payload[begin : begin + SEGMENT_BYTES] for begin in cuts)]
    offsets, offset = [], len(header)
    for piece in pieces:
        offsets.append(offset)
        offset += piece.num_bytes
    if offset != len(header) + len(payload):
        raise AssertionError(f"{name}: {len(payload)} bytes are not those of its pieces")
    with ThreadPoolExecutor(1, thread_name_prefix="distckpt-digest") as hasher:
        digests = hasher.map(digest, parts)  # while they are written
        storage.put(names.join(folder, name), parts, num_bytes=offset)
        segments = tuple(Segment(num_bytes=len(part), digest=found) for part, found in zip(parts, digests, strict=True))
    return DataFile(name=name, rank=rank, num_bytes=offset, segments=segments), offsets


def read_ranges(
    storage: Storage,
    folder: str,
    file: DataFile,
    ranges: Sequence[Range],
    *,
    path: str,
    step: int | None,
    everything: bool = False,
) -> None:
    """Fill every range from a data file, each segment that they touch read once, in file order, and checked.

    Args:
        storage: The storage.
        folder: The checkpoint's folder in it.
        file: The data file.
        ranges: What is wanted.
        path: The checkpoint's path, for errors.
        step: The checkpoint's step, for errors.
        everything: Whether to check the segments, too, that no range touches.

    Raises:
        CheckpointDamagedError: The file is missing, short, or has other bytes than were written; what `ranges` point
            to is then undefined.
        StorageError: It could not be read for another reason.
    """
    name = names.join(folder, file.name)
    tasks = _tasks(file, ranges, everything=everything)
    if tasks is None:
        raise CheckpointDamagedError(path=path, step=step, file=file.name, problem="is shorter than its tensors")
    memory = _Scratch()

    def read(task: tuple[int, Segment, list[Range]]) -> None:
        first, segment, wanting = task
        target = _inside(wanting, first, first + segment.num_bytes)
        scratch = target is None
        if target is None:
            target = memory.taken(segment.num_bytes)
        _read_checked(storage, name, first, segment, target, file=file, path=path, step=step)
        for wanted in wanting if scratch else []:
            _copy(wanted, target, first, first + segment.num_bytes)

    if len(tasks) == 1:
        read(tasks[0])
        return
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="distckpt-read") as readers:
        try:
            for _ in readers.map(read, tasks):
                pass
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise


def _tasks(
    file: DataFile, ranges: Sequence[Range], *, everything: bool
) -> list[tuple[int, Segment, list[Range]]] | None:
    """Return each segment to be read, where it begins, and the ranges on it; None if the file is too short."""
    waiting = sorted((r for r in ranges if len(r.into)), key=lambda r: r.begin, reverse=True)
    active: list[Range] = []
    tasks = []
    begin = 0
    for segment in file.segments:
        end = begin + segment.num_bytes
        while waiting and waiting[-1].begin < end:
            active.append(waiting.pop())
        if active or everything:
            tasks.append((begin, segment, active))
            active = [wanted for wanted in active if wanted.end > end]
        begin = end
    return None if waiting or active else tasks


class _Scratch(threading.local):
    """Memory that each thread uses again and again: the first touch of fresh memory costs more than a copy."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def taken(self, num_bytes: int) -> memoryview:
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(max(num_bytes, SEGMENT_BYTES))
        return memoryview(self._buffer)[:num_bytes]


def _inside(active: Sequence[Range], begin: int, end: int) -> memoryview | None:
    """Return the memory that a whole segment goes to, if just one range wants it, and all of it."""
    if len(active) == 1 and active[0].begin <= begin and end <= active[0].end:
        return active[0].into[begin - active[0].begin : end - active[0].begin]
    return None


def _copy(wanted: Range, segment: memoryview, begin: int, end: int) -> None:
    """Copy what a segment, which is bytes `begin` to `end` of the file, holds of a range."""
    first, last = max(wanted.begin, begin), min(wanted.end, end)
    wanted.into[first - wanted.begin : last - wanted.begin] = segment[first - begin : last - begin]


def _read_checked(
    storage: Storage,
    name: str,
    begin: int,
    segment: Segment,
    target: memoryview,
    *,
    file: DataFile,
    path: str,
    step: int | None,
) -> None:
    try:
        storage.read(name, begin, target)
    except FileNotFoundError as error:
        raise CheckpointDamagedError(path=path, step=step, file=file.name, problem="is missing") from error
    except EOFError as error:
        problem = f"is shorter than the {file.num_bytes:,} bytes that the manifest says"
        raise CheckpointDamagedError(path=path, step=step, file=file.name, problem=problem) from error
    if digest(target) != segment.digest:
        problem = f"has wrong bytes between {begin:,} and {begin + segment.num_bytes:,}"
        raise CheckpointDamagedError(path=path, step=step, file=file.name, problem=problem)

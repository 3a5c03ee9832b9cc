"""Data files: safetensors files written with digests on the way, and read in ranges that are checked on the way.

A file is cut into segments, each with a digest: the header, large tensors in pieces of `SEGMENT_BYTES`, and runs of
small tensors together; so a reader can check just what it reads.
Invariant: `read_ranges` hands out no byte that its segment's digest does not vouch for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distckpt import names
from distckpt.checksum import digest
from distckpt.errors import CheckpointDamagedError
from distckpt.manifest import DataFile, Segment
from distckpt.safetensors import Piece, make_header
from distckpt.storage import Buffer, Storage

# Large enough that a read is efficient and digests are few, small enough that reading a part of a tensor reads little
# more, and that a segment is still in the processor's cache when it is hashed after it was read.
SEGMENT_BYTES = 4 << 20
_RUN_BYTES = 1 << 20  # small tensors share a segment up to this


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
    storage: Storage, folder: str, name: str, *, rank: int, pieces: Sequence[Piece], data: Sequence[memoryview]
) -> tuple[DataFile, list[int]]:
    """Write a data file, durable when this returns but for its directory entry.

    Args:
        storage: The storage.
        folder: The checkpoint's folder in it.
        name: The file's name in the checkpoint.
        rank: The rank that writes it.
        pieces: What the file holds, in order.
        data: The bytes of each piece.

    Returns:
        The file's facts, and the offset of each piece from the file's start.

    Raises:
        StorageError: It could not be written; nothing of that name is left.
    """
    header = make_header(pieces, metadata={"format": "pt"})
    segments: list[Segment] = []
    size = storage.put(names.join(folder, name), _sealed([memoryview(header), *data], segments))
    offsets, offset = [], len(header)
    for piece in pieces:
        offsets.append(offset)
        offset += piece.num_bytes
    if size != offset:
        raise AssertionError(f"{name}: wrote {size} bytes of {offset}")
    return DataFile(name=name, rank=rank, num_bytes=size, segments=tuple(segments)), offsets


def _sealed(parts: Sequence[memoryview], segments: list[Segment]) -> Iterator[Buffer]:
    """Yield the file's bytes segment by segment, adding to `segments` as they go; the header is one of its own."""
    run: list[memoryview] = []
    run_bytes = 0

    def flushed() -> Buffer:
        joined = run[0] if len(run) == 1 else b"".join(run)
        segments.append(Segment(num_bytes=len(joined), digest=digest(joined)))
        return joined

    for index, part in enumerate(parts):
        if not len(part):
            continue
        alone = index == 0 or len(part) >= _RUN_BYTES
        if run and (alone or run_bytes + len(part) > _RUN_BYTES):
            yield flushed()
            run, run_bytes = [], 0
        if not alone:
            run.append(part)
            run_bytes += len(part)
            continue
        step = len(part) if index == 0 else SEGMENT_BYTES
        for begin in range(0, len(part), step):
            run = [part[begin : begin + step]]
            yield flushed()
        run = []
    if run:
        yield flushed()


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
    waiting = sorted((r for r in ranges if len(r.into)), key=lambda r: r.begin, reverse=True)
    active: list[Range] = []
    scratch = bytearray()
    begin = 0
    for segment in file.segments:
        end = begin + segment.num_bytes
        while waiting and waiting[-1].begin < end:
            active.append(waiting.pop())
        if active or everything:
            target = _inside(active, begin, end)
            if target is None:
                if len(scratch) < segment.num_bytes:
                    scratch = bytearray(max(segment.num_bytes, _RUN_BYTES))
                target = memoryview(scratch)[: segment.num_bytes]
            _read_checked(storage, name, begin, segment, target, file=file, path=path, step=step)
            for wanted in active:
                _copy(wanted, target, begin, end)
            active = [wanted for wanted in active if wanted.end > end]
        begin = end
    if waiting or active:
        raise CheckpointDamagedError(path=path, step=step, file=file.name, problem="is shorter than its tensors")


def _inside(active: Sequence[Range], begin: int, end: int) -> memoryview | None:
    """Return the memory that a whole segment goes to, if just one range wants it, and all of it."""
    if len(active) == 1 and active[0].begin <= begin and end <= active[0].end:
        return active[0].into[begin - active[0].begin : end - active[0].begin]
    return None


def _copy(wanted: Range, target: memoryview, begin: int, end: int) -> None:
    """Copy what a segment holds of a range, unless it was read to its place."""
    first, last = max(wanted.begin, begin), min(wanted.end, end)
    if wanted.begin <= begin and end <= wanted.end and target.obj is wanted.into.obj:
        return
    wanted.into[first - wanted.begin : last - wanted.begin] = target[first - begin : last - begin]


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

"""Chunks: which box of a tensor lies where, one by one, or many in a few numbers.

Where a mesh cuts a tensor evenly, the ranks' pieces are equal boxes side by side, at one place of one file after
another: a run. It is a box itself, so whether runs and chunks tile a tensor is known without a look at each piece.
Invariant: nothing here takes memory or time for all pieces of a run, except who goes through them one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

from distckpt.runs import MAX_REPEATS, Repeat, Run, file_rows, moves, reach
from distckpt.values import Json

MAX_DIMS = 64  # NumPy's own limit
MOST_ROOM_LOOKS = 1 << 24  # files that all runs of a manifest name, each set of files once
_LIMIT = 1 << 62


class Chunk(NamedTuple):
    """A box of a tensor, and where its bytes lie, row by row.

    A tuple, as there may be a great many: a dataclass takes three times as long to make.

    Attributes:
        file: Index into `Manifest.files`.
        offset: Where its bytes begin, from the file's start.
        start: The box's first index in each dimension.
        shape: The box's size in each dimension.
    """

    file: int
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


class Runs(Sequence[Chunk]):
    """The chunks of a tensor, of which some are described as runs; made one by one, as they are asked for.

    Args:
        parts: Chunks and runs.
        begins: Of each file, where its header ends.
    """

    __slots__ = ("begins", "parts")

    def __init__(self, parts: Sequence[Chunk | Run], begins: tuple[int, ...]) -> None:
        self.parts = tuple(parts)
        self.begins = begins

    def __len__(self) -> int:
        return sum(part.num_boxes if isinstance(part, Run) else 1 for part in self.parts)

    def __iter__(self) -> Iterator[Chunk]:
        for part in self.parts:
            if isinstance(part, Run):
                yield from self._of_run(part, None)
            else:
                yield part

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | Sequence[Chunk]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        for part in self.parts:
            count = part.num_boxes if isinstance(part, Run) else 1
            if 0 <= place < count:
                return self._nth(part, place) if isinstance(part, Run) else part
            place -= count
        raise IndexError(index)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Runs):
            return NotImplemented
        return self.parts == other.parts and (self.begins is other.begins or self.begins == other.begins)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Runs({list(self.parts)!r:.200})"

    def overlapping(self, start: Sequence[int], shape: Sequence[int]) -> Iterator[Chunk]:
        """Yield the chunks that share a place with a box, in time for these and the runs; maybe others, too."""
        window = [(first, first + size) for first, size in zip(start, shape, strict=True)]
        for part in self.parts:
            extent = part.extent if isinstance(part, Run) else part.shape
            if all(
                a < last and first < a + size for a, size, (first, last) in zip(part.start, extent, window, strict=True)
            ):
                if isinstance(part, Run):
                    yield from self._of_run(part, window)
                else:
                    yield part

    def _of_run(self, run: Run, window: Sequence[tuple[int, int]] | None) -> Iterator[Chunk]:
        """Yield the chunks of a run, all or those in a window, the innermost row's one after another."""
        levels = moves(run)
        offset, shape, begins = run.offset, run.shape, self.begins

        def walk(level: int, file: int, start: tuple[int, ...]) -> Iterator[Chunk]:
            if level < 0:
                yield Chunk(file, begins[file] + offset, start, shape)
                return
            (dim, count, step), stride = levels[level]
            first, last = 0, count
            if window is not None:
                low, high = window[dim]
                first, last = max(0, (low - start[dim]) // stride), min(count, -((start[dim] - high) // stride))
            for index in range(first, last):
                moved = (*start[:dim], start[dim] + index * stride, *start[dim + 1 :])
                yield from walk(level - 1, file + index * step, moved)

        return walk(len(levels) - 1, run.file, run.start)

    def _nth(self, run: Run, place: int) -> Chunk:
        """Return one chunk of a run, by its number in their order."""
        file, start = run.file, list(run.start)
        for (dim, count, step), stride in moves(run):
            place, index = divmod(place, count)
            start[dim] += index * stride
            file += index * step
        return Chunk(file, self.begins[file] + run.offset, tuple(start), run.shape)


def overlapping(chunks: Sequence[Chunk], start: Sequence[int], shape: Sequence[int]) -> Iterable[Chunk]:
    """Return the chunks that share a place with a box; maybe others, too."""
    return chunks.overlapping(start, shape) if isinstance(chunks, Runs) else chunks


def parts_of(chunks: Sequence[Chunk]) -> Sequence[Chunk | Run]:
    """Return what chunks are described by: their runs, and themselves where they are in none."""
    return chunks.parts if isinstance(chunks, Runs) else chunks


def to_json(chunks: Sequence[Chunk]) -> Json:
    """Return chunks as a manifest has them."""
    found: list[Json] = []
    for part in parts_of(chunks):
        body: list[Json] = [part.file, part.offset, list(part.start), list(part.shape)]
        found.append([*body, list(map(list, part.repeats))] if isinstance(part, Run) else body)
    return found


def from_json(bodies: Json, *, num_dims: int, begins: tuple[int, ...] | None) -> Sequence[Chunk]:
    """Return the chunks that `to_json` described.

    Args:
        bodies: The JSON; hostile.
        num_dims: The tensor's dimensions.
        begins: Of each file, where its header ends; None if there are no runs in this format.

    Raises:
        ValueError: They are malformed; whether they lie in their files and tile the tensor is checked elsewhere.
    """
    parts: list[Chunk | Run] = []
    with_runs = False
    for file, offset, start, size, *more in bodies:
        chunk = Chunk(integer(file), integer(offset), sizes(start), sizes(size))
        if len(chunk.start) != num_dims or len(chunk.shape) != num_dims:
            raise ValueError("a chunk has other dimensions than its tensor")
        if not more:
            parts.append(chunk)
            continue
        if begins is None or len(more) != 1:
            raise ValueError("a chunk has too many parts")
        parts.append(_run(chunk, more[0], num_files=len(begins)))
        with_runs = True
    if with_runs and begins is not None:
        return Runs(parts, begins)
    return tuple(part for part in parts if isinstance(part, Chunk))


def _run(first: Chunk, bodies: Json, *, num_files: int) -> Run:
    """Return a run, of which no two boxes lie in one file.

    Raises:
        ValueError: It is malformed.
    """
    repeats = []
    for dim, count, step in bodies:
        repeats.append(Repeat(integer(dim), integer(count, least=2), integer(step, least=1)))
        if dim >= len(first.shape):
            raise ValueError("a run goes along a dimension that its tensor has not")
    if not 1 <= len(repeats) <= MAX_REPEATS or 0 in first.shape:
        raise ValueError("a run of nothing, or of too much")
    if first.file + reach(repeats) >= num_files:
        raise ValueError("a run goes on behind the last file")
    return Run(*first, tuple(repeats))


class Rooms:
    """How much files hold behind their headers, at least, for sets of files that runs name.

    Args:
        file_bytes: The size of each file.
        begins: Where its header ends.
    """

    def __init__(self, file_bytes: Sequence[int], begins: Sequence[int]) -> None:
        self._rooms = [size - begin for size, begin in zip(file_bytes, begins, strict=True)]
        self._least: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        self._num_looks = 0

    def least(self, run: Run) -> int:
        """Return the room of the run's smallest file.

        Raises:
            ValueError: There are too many different sets of files: nobody saves like that.
        """
        key = (run.file, tuple((count, step) for _, count, step in run.repeats))
        known = self._least.get(key)
        if known is None:
            self._num_looks += run.num_boxes
            if self._num_looks > MOST_ROOM_LOOKS:
                raise ValueError("its runs name files in too many ways")
            known = self._least[key] = min(min(self._rooms[row]) for row in file_rows(run))
        return known


def check_inside(chunks: Sequence[Chunk], *, item_bytes: int, file_bytes: Sequence[int], rooms: Rooms | None) -> None:
    """Return if all chunks lie inside their files.

    Raises:
        ValueError: One does not.
        IndexError: Its file is not there.
    """
    for part in parts_of(chunks):
        num_bytes = math.prod(part.shape) * item_bytes
        if isinstance(part, Run):
            assert rooms is not None
            fits = part.offset + num_bytes <= rooms.least(part)
        else:
            fits = part.offset + num_bytes <= file_bytes[part.file]
        if not fits:
            raise ValueError("lies outside its file")


def sizes(value: Any) -> tuple[int, ...]:
    """Return a list of sizes, or of first indices.

    Raises:
        ValueError: It is none.
    """
    for size in value:
        if type(size) is not int or not 0 <= size < _LIMIT:
            raise ValueError(f"{size!r:.40} is no size")
    return tuple(value)


def integer(value: Any, *, least: int = 0) -> int:
    """Return a whole number from `least` on, below 2^62.

    Raises:
        ValueError: It is none.
    """
    if type(value) is not int or value < least or value >= _LIMIT:
        raise ValueError(f"{value!r:.40} is no integer from {least} on")
    return value

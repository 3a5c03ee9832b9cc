"""Runs: equal boxes of a tensor side by side, at one place of one file after another, in a few numbers.

Invariant: a run is a box itself, and no two of its boxes lie in one file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

MAX_REPEATS = 8  # more dimensions than any mesh has


class Repeat(NamedTuple):
    """A box, and equal ones behind it: each begins where the one before ends, and lies `step` files further.

    Attributes:
        dim: In which of the tensor's dimensions they stand in a row.
        times: How many there are, with the first.
        step: From the file of one to that of the next.
    """

    dim: int
    times: int
    step: int


class Run(NamedTuple):
    """Equal boxes that together are one box, at the same place of as many files.

    Attributes:
        file: Index of the file of the first.
        offset: Where each one's bytes begin, from the end of its file's header: headers differ in length.
        start: The first one's first index in each dimension.
        shape: The size of each.
        repeats: Rows of boxes, rows of these rows, and so on.
    """

    file: int
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    repeats: tuple[Repeat, ...]

    @property
    def num_boxes(self) -> int:
        """How many boxes there are."""
        return math.prod(repeat.times for repeat in self.repeats)

    @property
    def extent(self) -> tuple[int, ...]:
        """The size of the box that all of them are together."""
        extent = list(self.shape)
        for dim, count, _ in self.repeats:
            extent[dim] *= count
        return tuple(extent)

    def start_in(self, file: int) -> tuple[int, ...] | None:
        """Return the first index of the box that lies in a file; None if none does."""
        left, start = file - self.file, list(self.start)
        for (dim, count, step), stride in sorted(moves(self), key=lambda move: -move[0].step):
            index, left = divmod(left, step)
            if not 0 <= index < count:
                return None
            start[dim] += index * stride
        return None if left else tuple(start)


def moves(run: Run) -> list[tuple[Repeat, int]]:
    """Return each repeat, and how far one of its boxes is from the next."""
    extent, found = list(run.shape), []
    for repeat in run.repeats:
        found.append((repeat, extent[repeat.dim]))
        extent[repeat.dim] *= repeat.times
    return found


def reach(repeats: Iterable[Repeat]) -> int:
    """Return how far the last file of a run is from its first.

    Raises:
        ValueError: Two of its boxes might lie in one file.
    """
    last = 0
    for _, count, step in sorted(repeats, key=lambda repeat: repeat.step):
        if step <= last:
            raise ValueError("a run comes to a file twice")
        last += (count - 1) * step
    return last


def file_rows(run: Run) -> Iterator[slice]:
    """Yield the files of a run, in rows, each as long as can be."""
    _, count, step = longest = max(run.repeats, key=lambda repeat: repeat.times)
    others = list(run.repeats)
    others.remove(longest)
    for shifts in product(*(range(0, other.times * other.step, other.step) for other in others)):
        first = run.file + sum(shifts)
        yield slice(first, first + (count - 1) * step + 1, step)


def merged(runs: Iterable[Run]) -> list[Run]:
    """Return the same boxes in fewer runs, as far as neighbours are alike; sorted by where they begin.

    Takes time in proportion to the number of runs, but for sorting them.

    Args:
        runs: Runs that do not overlap; those of a single box have no repeats.
    """
    found = sorted(runs, key=_place)
    if len(found) < 2:
        return found
    num_dims = len(found[0].shape)
    while True:
        before = len(found)
        for dim in reversed(range(num_dims)):
            found.sort(key=lambda run, dim=dim: (*run.start[:dim], *run.start[dim + 1 :], run.start[dim]))  # type: ignore[misc]
            found = _joined(found, dim)
        if len(found) == before:
            return sorted(found, key=_place)


def _place(run: Run) -> tuple[int, ...]:
    return run.start


def _joined(runs: Sequence[Run], dim: int) -> list[Run]:
    """Return runs with those joined that stand behind one another along a dimension."""
    found: list[Run] = []
    row: list[Run] = []
    for run in runs:
        if row and not _goes_on(row, run, dim):
            found.append(_whole(row, dim))
            row = []
        row.append(run)
    return [*found, _whole(row, dim)] if row else found


def _goes_on(row: Sequence[Run], run: Run, dim: int) -> bool:
    """Say whether a run is the next one of a row of equal ones."""
    first, last = row[0], row[-1]
    if (run.offset, run.shape, run.repeats) != (first.offset, first.shape, first.repeats):
        return False
    if len(first.repeats) == MAX_REPEATS or not first.extent[dim]:
        return False
    start = list(last.start)
    start[dim] += last.extent[dim]
    step = run.file - last.file
    if tuple(start) != run.start or (len(row) > 1 and step != row[1].file - first.file):
        return False
    return step >= 1 and _is_apart((*first.repeats, Repeat(dim, len(row) + 1, step)))


def _is_apart(repeats: Sequence[Repeat]) -> bool:
    """Say whether no two boxes of a run lie in one file."""
    try:
        reach(repeats)
    except ValueError:
        return False
    return True


def _whole(row: Sequence[Run], dim: int) -> Run:
    """Return the run of a row of equal ones."""
    first = row[0]
    if len(row) == 1:
        return first
    return first._replace(repeats=(*first.repeats, Repeat(dim, len(row), row[1].file - first.file)))

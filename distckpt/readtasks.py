"""Reads of data files: what is wanted, which neighbouring segments are read together, and the memory they go to.

Invariant: memory that a read fills lies in a range that is wanted, or is this thread's own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distckpt.manifest import Segment
from distckpt.storage.mapping import copy

_LEAST_SCRATCH_BYTES = 4 << 20  # a segment


class Range(NamedTuple):
    """Bytes of a data file that are wanted. A tuple, as there may be a great many.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Neighbouring segments of one file that are read together.

    Attributes:
        index: Which file.
        number: The first one's number in the file.
        begin: Where it begins.
        segments: They themselves.
        ranges: What is wanted of them, in order; nothing, if they are only to be checked.
    """

    index: int
    number: int
    begin: int
    segments: list[Segment]
    ranges: list[Range]

    @property
    def num_bytes(self) -> int:
        """The size of all segments."""
        return sum(segment.num_bytes for segment in self.segments)


def split(task: Task, most: int) -> Iterator[Task]:
    """Yield a task in parts of at most so many bytes, or of one segment, each with what is wanted of it."""
    begin, number = task.begin, task.number
    group: list[Segment] = []
    num_bytes = 0
    for segment in [*task.segments, None]:
        if group and (segment is None or num_bytes + segment.num_bytes > most):
            end = begin + num_bytes
            ranges = [wanted for wanted in task.ranges if wanted.begin < end and wanted.end > begin]
            yield Task(index=task.index, number=number, begin=begin, segments=group, ranges=ranges)
            begin, number, group, num_bytes = end, number + len(group), [], 0
        if segment is not None:
            group.append(segment)
            num_bytes += segment.num_bytes


def copy_part(wanted: Range, source: memoryview, origin: int, first: int, last: int) -> None:
    """Copy what `source`, which begins at the file's byte `origin`, holds of a range between two bytes of the file."""
    first, last = max(wanted.begin, first), min(wanted.end, last)
    if first < last:
        copy(wanted.into[first - wanted.begin : last - wanted.begin], source[first - origin : last - origin])


class Scratch(threading.local):
    """Memory that each thread uses again and again: the first touch of fresh memory costs more than a copy."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def taken(self, num_bytes: int) -> memoryview:
        """Return so much of it; what it held is lost."""
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(max(num_bytes, _LEAST_SCRATCH_BYTES))
        return memoryview(self._buffer)[:num_bytes]


def tiling(task: Task, end: int, memory: Scratch) -> list[memoryview] | None:
    """Return the memory that a task's bytes go to, in order, holes filled up; None if ranges overlap, or are none."""
    if not task.ranges:
        return None
    spare = memory.taken(task.num_bytes)
    parts: list[memoryview] = []
    place = task.begin
    for wanted in task.ranges:
        first, last = max(wanted.begin, task.begin), min(wanted.end, end)
        if first < place:
            return None
        if first > place:
            parts.append(spare[place - task.begin : first - task.begin])
        parts.append(wanted.into[first - wanted.begin : last - wanted.begin])
        place = last
    if place < end:
        parts.append(spare[place - task.begin :])
    return parts


def cut(parts: Sequence[memoryview], sizes: Sequence[int]) -> Iterator[list[memoryview]]:
    """Yield the pieces of `parts` that make up runs of the given sizes, one after another."""
    waiting = list(reversed(parts))
    for size in sizes:
        pieces: list[memoryview] = []
        num_left = size
        while num_left:
            part = waiting.pop()
            if len(part) > num_left:
                waiting.append(part[num_left:])
                part = part[:num_left]
            pieces.append(part)
            num_left -= len(part)
        yield pieces

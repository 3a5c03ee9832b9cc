"""Parts of an upload: chunks of memory cut and put together, without a copy, into pieces of equal size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from distckpt.storage.contract import Buffer

MIB = 1 << 20
LEAST_PART = 8 * MIB  # S3's own limit is 5 MiB
USUAL_PART = 16 * MIB
AT_ONCE = 16  # parts on their way together, 256 MiB of usual ones
GRAIN = 64 << 10  # parts of known size are cut to multiples of it
MOST_PARTS = 9_000  # S3 takes 10,000
PARTS_BEFORE_GROWTH = 2_000  # of files of unknown size: 2,000 of 16 MiB and 7,000 of 64 MiB make 468 GiB
SMALL_CHUNK = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Memory that is sent by one request.

    Attributes:
        views: The bytes, as one-dimensional views of unsigned bytes on the caller's memory.
        num_bytes: How many there are in all.
    """

    views: tuple[memoryview, ...]
    num_bytes: int

    def joined(self) -> bytes:
        """Return a copy of the bytes in one piece."""
        return b"".join(self.views)


def part_size(num_bytes: int | None, num_sent: int = 0) -> int:
    """Return the size in bytes of the next part of a file of `num_bytes`, None if that is not known.

    Parts of a file of known size are of one size, as some servers demand, and at most the usual one. There are as many
    as travel together, or a multiple of that: with a few left over, the last round would take as long as a full one.
    """
    if num_bytes is None:
        return USUAL_PART if num_sent < PARTS_BEFORE_GROWTH else 4 * USUAL_PART
    num_rounds = max(1, min(-(-num_bytes // (AT_ONCE * USUAL_PART)), MOST_PARTS // AT_ONCE))
    needed = -(-num_bytes // (num_rounds * AT_ONCE))
    return max(LEAST_PART, -(-needed // GRAIN) * GRAIN)


def cut(chunks: Iterable[Buffer], num_bytes: int | None) -> Iterator[Part]:
    """Yield the parts of a file, the last one smaller, at least one; chunks are taken only as far as needed."""
    views: list[memoryview] = []
    num_filled = num_sent = 0
    size = part_size(num_bytes)
    for chunk in chunks:
        left = memoryview(chunk)
        left = left.cast("B") if left.nbytes else memoryview(b"")
        while left:
            view = left[: size - num_filled]
            left = left[len(view) :]
            num_filled += len(view)
            _append(views, view)
            if num_filled == size:
                yield Part(views=tuple(views), num_bytes=num_filled)
                views, num_filled = [], 0
                num_sent += 1
                size = part_size(num_bytes, num_sent)
    if num_filled or num_sent == 0:
        yield Part(views=tuple(views), num_bytes=num_filled)


def _append(views: list[memoryview], view: memoryview) -> None:
    """Add a view; neighbours that are small are copied together, for each view costs a system call."""
    if views and len(view) < SMALL_CHUNK and len(views[-1]) < SMALL_CHUNK:
        views[-1] = memoryview(b"".join((views[-1], view)))
    else:
        views.append(view)


def between(views: Sequence[memoryview], begin: int, end: int) -> list[memoryview]:
    """Return bytes `begin` to `end` of views that stand one after another."""
    found, place = [], 0
    for view in views:
        first, last = max(begin - place, 0), min(end - place, len(view))
        if first < last:
            found.append(view[first:last])
        place += len(view)
    return found

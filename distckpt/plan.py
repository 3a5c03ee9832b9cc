"""The plan: who writes which bytes. A pure function of names, shapes, dtypes and the number of writers.

Every rank computes the same plan alone; nothing is exchanged.
Invariant: the blocks of all writers cover each tensor exactly once, and no writer of shared state has more than its
equal share plus one row; of a great many ranks only some write it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distckpt.safetensors import ALIGNMENT, ITEM_BYTES

# A restore of shared state reads the files of all who wrote it: beyond so many writers, each has to be worth a file.
MANY_WRITERS = 64
LEAST_SHARE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A tensor that some rank has to write.

    Attributes:
        name: Its name in the checkpoint.
        dtype: Its dtype's name.
        shape: Its shape.
        owner: The one writer that may write it; None if any may.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    owner: int | None = None

    @property
    def num_bytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A box of a tensor that one rank writes in one piece.

    Attributes:
        name: The tensor's name.
        dtype: The tensor's dtype.
        whole: The tensor's shape.
        start: The box's first index in each dimension.
        shape: The box's size in each dimension.
    """

    name: str
    dtype: str
    whole: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The box's size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def stored_name(self) -> str:
        """The name in the data file: the tensor's, and for a part of it the rows, or the box, in brackets."""
        if self.shape == self.whole:
            return self.name
        spans = [f"{first}:{first + size}" for first, size in zip(self.start, self.shape, strict=True)]
        if self.shape[1:] == self.whole[1:]:
            spans = spans[:1]
        return f"{self.name}[{','.join(spans)}]"


def split(items: Sequence[Item], num_writers: int, *, only: int | None = None) -> list[list[Block]]:
    """Return each writer's blocks: owned items whole to their owners, the rest as even as rows allow.

    The items without an owner are laid end to end and cut where each writer's share of all bytes is full; a cut inside
    a tensor is moved to the nearest row.
    Beyond `MANY_WRITERS`, they go to only as many as get `LEAST_SHARE_BYTES` each, spread evenly over all.

    Args:
        items: In an order that is the same on every rank.
        num_writers: At least 1.
        only: The one writer whose blocks are wanted; the others' lists are empty then.

    Ranks: any.
    """
    shares: list[list[Block]] = [[] for _ in range(num_writers)]
    used = [0] * num_writers
    free: list[Item] = []
    for item in items:
        if item.owner is None:
            free.append(item)
        else:
            if only is None or item.owner == only:
                shares[item.owner].append(_rows(item, 0, None))
            used[item.owner] += item.num_bytes
    total = sum(item.num_bytes for item in free)
    seats = _seats(total, num_writers)
    ends = _ends(total, [used[seat] for seat in seats])
    for seat, item, begin, end in _cuts(free, ends):
        if only is None or seats[seat] == only:
            shares[seats[seat]].append(_rows(item, begin, end))
    return shares


def _seats(total: int, num_writers: int) -> list[int]:
    """Return which writers take part in writing `total` bytes that any of them may write."""
    count = min(num_writers, max(MANY_WRITERS, total // LEAST_SHARE_BYTES))
    return [seat * num_writers // count for seat in range(count)]


def _cuts(free: Sequence[Item], ends: Sequence[float]) -> Iterator[tuple[int, Item, int, int | None]]:
    """Yield who writes which rows of which item, by the ends of each one's share of all bytes; None is the last row."""
    last = len(ends) - 1
    writer, end_of_share, begin = 0, ends[0], 0
    for item in free:
        item_bytes = item.num_bytes
        if writer == last or begin + item_bytes <= end_of_share:  # nearly all of them
            yield writer, item, 0, None
            begin += item_bytes
            continue
        num_rows = item.shape[0] if item.shape else 1
        row_bytes = item_bytes // num_rows if num_rows else 0
        row = 0
        while writer < last and begin + item_bytes > end_of_share:
            cut = round((end_of_share - begin) / row_bytes) if row_bytes and item.shape else 0
            if not item.shape and end_of_share - begin > item_bytes / 2:
                cut = num_rows
            cut = min(max(cut, row), num_rows)
            if cut > row:
                yield writer, item, row, cut
            row = cut
            writer += 1
            end_of_share = ends[writer]
        if row < num_rows or not item_bytes:
            yield writer, item, row, None
        begin += item_bytes


def _ends(total: int, used: Sequence[int]) -> list[float]:
    """Return where each writer's part of `total` bytes ends, so that with what it has used all come out even."""
    level = _level(total, used)
    ends, end = [], 0.0
    for own in used:
        end += max(0.0, level - own)
        ends.append(end)
    return ends


def _level(total: int, used: Sequence[int]) -> float:
    """Return the height to which `total` fills vessels that hold `used` already."""
    ordered = sorted(used)
    filled = 0
    for count, own in enumerate(ordered, start=1):
        filled += own
        level = (total + filled) / count
        if count == len(ordered) or level <= ordered[count]:
            return level
    return 0.0


def _rows(item: Item, begin: int, end: int | None) -> Block:
    """Return the block of rows `begin` to `end` of an item; None is the end of it."""
    if not item.shape:
        return Block(name=item.name, dtype=item.dtype, whole=(), start=(), shape=())
    last = item.shape[0] if end is None else end
    return Block(
        name=item.name,
        dtype=item.dtype,
        whole=item.shape,
        start=(begin, *(0 for _ in item.shape[1:])),
        shape=(last - begin, *item.shape[1:]),
    )


def in_file_order(blocks: Sequence[Block]) -> list[Block]:
    """Return blocks as they stand in a file: those first whose size more powers of two divide.

    So each is aligned to the largest one, up to `ALIGNMENT`, that divides its size, which is at least its item's width.
    Source: the system copies to and from memory that lies as the file does, modulo 64 bytes, in two thirds of the time.

    Ranks: any.
    """
    return sorted(blocks, key=_file_order)


def _file_order(block: Block) -> tuple[int, int, str]:
    return file_order(block.dtype, block.num_bytes)


def file_order(dtype: str, num_bytes: int) -> tuple[int, int, str]:
    """Return the key by which blocks stand in a file.

    Ranks: any.
    """
    return -alignment(num_bytes), -ITEM_BYTES[dtype], dtype


def alignment(num_bytes: int) -> int:
    """Return to what a block of this size is aligned.

    Ranks: any.
    """
    return min(num_bytes & -num_bytes, ALIGNMENT) if num_bytes else ALIGNMENT

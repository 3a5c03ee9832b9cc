"""The plan: who writes which bytes. A pure function of names, shapes, dtypes and the number of writers.

Every rank computes the same plan alone; nothing is exchanged.
Invariant: the blocks of all writers cover each tensor exactly once, and no writer of shared state has more than its
equal share plus one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distckpt.safetensors import ALIGNMENT, ITEM_BYTES


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


def split(items: Sequence[Item], num_writers: int) -> list[list[Block]]:
    """Return each writer's blocks: owned items whole to their owners, the rest as even as rows allow.

    The items without an owner are laid end to end and cut where each writer's share of all bytes is full; a cut inside
    a tensor is moved to the nearest row.

    Args:
        items: In an order that is the same on every rank.
        num_writers: At least 1.

    Ranks: any.
    """
    shares: list[list[Block]] = [[] for _ in range(num_writers)]
    used = [0] * num_writers
    free: list[Item] = []
    for item in items:
        if item.owner is None:
            free.append(item)
        else:
            shares[item.owner].append(_rows(item, 0, None))
            used[item.owner] += item.num_bytes
    total = sum(item.num_bytes for item in free)
    writer, end_of_share, begin = 0, 0.0, 0
    ends = _ends(total, used)
    end_of_share = ends[0]
    for item in free:
        item_bytes = item.num_bytes
        if writer == num_writers - 1 or begin + item_bytes <= end_of_share:  # nearly all of them
            shares[writer].append(_rows(item, 0, None))
            begin += item_bytes
            continue
        num_rows = item.shape[0] if item.shape else 1
        row_bytes = item_bytes // num_rows if num_rows else 0
        row = 0
        while writer < num_writers - 1 and begin + item_bytes > end_of_share:
            cut = round((end_of_share - begin) / row_bytes) if row_bytes and item.shape else 0
            if not item.shape and end_of_share - begin > item_bytes / 2:
                cut = num_rows
            cut = min(max(cut, row), num_rows)
            if cut > row:
                shares[writer].append(_rows(item, row, cut))
            row = cut
            writer += 1
            end_of_share = ends[writer]
        if row < num_rows or not item_bytes:
            shares[writer].append(_rows(item, row, None))
        begin += item_bytes
    return shares


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
    num_bytes = block.num_bytes
    alignment = min(num_bytes & -num_bytes, ALIGNMENT) if num_bytes else ALIGNMENT
    return -alignment, -ITEM_BYTES[block.dtype], block.dtype

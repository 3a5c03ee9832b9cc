"""Spreads: how a tensor is cut over a mesh of ranks. Pure, so that each rank knows every other rank's piece.

Invariant: a spread says of each rank of its mesh what torch says there; `tensors.spread_of` makes no other.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Mesh(NamedTuple):
    """Ranks in rows, rows of rows, and so on: that at a coordinate is `first`, and in each dimension so many steps on.

    Attributes:
        first: The rank at the origin.
        sizes: How many there are in each dimension.
        steps: How far neighbours in a dimension are from each other; 0 where there are none.
    """

    first: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    def rank_at(self, coordinate: tuple[int, ...]) -> int:
        """Return the rank at a coordinate."""
        return self.first + sum(place * step for place, step in zip(coordinate, self.steps, strict=True))

    def coordinate_of(self, rank: int) -> tuple[int, ...] | None:
        """Return the place of a rank; None if it is not in the mesh."""
        left = rank - self.first
        coordinate = [0] * len(self.sizes)
        for dim in sorted(range(len(self.sizes)), key=self.steps.__getitem__, reverse=True):
            if self.sizes[dim] > 1:
                coordinate[dim], left = divmod(left, self.steps[dim])
                if not 0 <= coordinate[dim] < self.sizes[dim]:
                    return None
        return None if left else tuple(coordinate)


class Spread(NamedTuple):
    """How a tensor is cut over a mesh.

    Attributes:
        mesh: The mesh.
        shape: The tensor's shape.
        splits: (dimension of the mesh, dimension of the tensor), in the order in which the one cuts the other; the
            mesh's other dimensions hold replicas.
    """

    mesh: Mesh
    shape: tuple[int, ...]
    splits: tuple[tuple[int, int], ...]

    @property
    def replicas(self) -> tuple[int, ...]:
        """The dimensions of the mesh that hold replicas."""
        cutting = {dim for dim, _ in self.splits}
        return tuple(dim for dim in range(len(self.mesh.sizes)) if dim not in cutting)

    def box_at(self, coordinate: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the first index and the size of the piece at a coordinate."""
        return _box(self, coordinate)

    def writers(self, name: str) -> dict[int, int]:
        """Return which of the replicas writes the tensor of this name: its place in each dimension that holds some."""
        return writers(name, self.replicas, self.mesh.sizes)


def writers(name: str, replicas: Sequence[int], sizes: Sequence[int]) -> dict[int, int]:
    """Return which of the replicas writes the tensor of this name; names are spread over them by their checksum.

    Args:
        name: The tensor's name.
        replicas: The dimensions of a mesh that hold replicas.
        sizes: The sizes of all of them.
    """
    found, chosen = {}, zlib.crc32(name.encode())
    for dim in replicas:
        chosen, found[dim] = divmod(chosen, sizes[dim])
    return found


def span(size: int, parts: int, index: int) -> tuple[int, int]:
    """Return where a part begins of what is cut as torch does, and how long it is: all are even but the last ones."""
    length = -(-size // parts)
    begin = min(index * length, size)
    return begin, min(length, size - begin)


@lru_cache(maxsize=1 << 16)
def _box(spread: Spread, coordinate: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start, shape = [0] * len(spread.shape), list(spread.shape)
    for mesh_dim, dim in spread.splits:
        begin, shape[dim] = span(shape[dim], spread.mesh.sizes[mesh_dim], coordinate[mesh_dim])
        start[dim] += begin
    return tuple(start), tuple(shape)


def mesh_of(first: int, sizes: tuple[int, ...], steps: tuple[int, ...]) -> Mesh | None:
    """Return a mesh, or None if its ranks cannot be told from their numbers one dimension after the other."""
    reach = 0
    for size, step in sorted(zip(sizes, steps, strict=True), key=lambda pair: pair[1]):
        if size > 1:
            if step <= reach:
                return None
            reach += (size - 1) * step
    return Mesh(first, sizes, tuple(0 if size == 1 else step for size, step in zip(sizes, steps, strict=True)))


def is_even(spread: Spread) -> bool:
    """Say whether all pieces are of one size."""
    parts: dict[int, int] = {}
    for mesh_dim, dim in spread.splits:
        parts[dim] = parts.get(dim, 1) * spread.mesh.sizes[mesh_dim]
    return all(spread.shape[dim] % count == 0 for dim, count in parts.items()) and math.prod(spread.shape) > 0

"""The allotment: what every rank writes of tensors that are spread over meshes, computed by each rank alone.

In a rank's file the spread tensors stand first, group by group, so that where they lie depends on their shapes alone;
ranks with pieces of the same shapes then have them at the same places, and what all ranks write is a few runs a tensor.
Invariant: nothing takes time or memory for ranks times tensors. A rank that finds other pieces in the allotment than
it writes says so, and then nobody goes by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from distckpt.checksum import digest
from distckpt.plan import Block, alignment, file_order, in_file_order
from distckpt.runs import Repeat, Run, merged
from distckpt.safetensors import ITEM_BYTES
from distckpt.spread import Mesh, Spread, is_even

MOST_RUNS = 1 << 22  # beyond, what cuts the tensors is too uneven to be described by runs

Cell = tuple[tuple[int, int], ...]  # of each dimension of a mesh, from which place to which; pieces are alike in it


class SpreadItem(NamedTuple):
    """A tensor that is spread over a mesh."""

    name: str
    dtype: str
    spread: Spread


class _Sketch(NamedTuple):
    """The boxes that the ranks of a cell write of a tensor: runs without the offset, and each one's size."""

    cell: Cell
    num_bytes: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Allotment:
    """What all ranks write of the tensors that are spread over meshes.

    Attributes:
        items: The tensors, by name.
        runs: Of each its pieces, where "file" is a rank.
    """

    items: Mapping[str, SpreadItem]
    runs: Mapping[str, tuple[Run, ...]]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all of it.

        Ranks: any.
        """
        facts = [(item.name, item.dtype, item.spread.shape, self.runs[name]) for name, item in self.items.items()]
        return digest(json.dumps(facts, separators=(",", ":")).encode())

    def is_what(self, rank: int, blocks: Sequence[Block], offsets: Sequence[int]) -> bool:
        """Say whether these are the blocks that `rank` writes by it, and where.

        Args:
            rank: The rank.
            blocks: Its blocks of spread tensors.
            offsets: Where each begins, from the end of the file's header.

        Ranks: any.
        """
        written = {b.name: (b.start, b.shape, offset) for b, offset in zip(blocks, offsets, strict=True)}
        found: dict[str, tuple[Any, ...]] = {}
        for name, runs in self.runs.items():
            for run in runs:
                start = run.start_in(rank)
                if start is not None:
                    if name in found:
                        return False
                    found[name] = start, run.shape, run.offset
        return found == written


def grouped(items: Sequence[SpreadItem]) -> list[list[SpreadItem]]:
    """Return the tensors in groups, as they stand in a file: those of a mesh together, the least troublesome first.

    Where pieces are of several sizes, or a rank has none, what stands behind them is moved; which of the replicas
    writes a tensor depends on its name, so these move it most.

    Ranks: any.
    """
    groups: dict[tuple[int, bool, Mesh, tuple[int, ...]], list[SpreadItem]] = {}
    for item in sorted(items, key=lambda item: item.name):
        replicas = item.spread.replicas
        num_replicas = math.prod(item.spread.mesh.sizes[dim] for dim in replicas)
        groups.setdefault((num_replicas, not is_even(item.spread), item.spread.mesh, replicas), []).append(item)
    return [groups[key] for key in sorted(groups)]


def own_blocks_of(items: Sequence[SpreadItem], rank: int) -> list[list[Block]]:
    """Return what a rank writes of spread tensors, group by group, each in the order of the file.

    Ranks: any.
    """
    return [in_file_order(list(_own_blocks(group, rank))) for group in grouped(items)]


def _own_blocks(group: Sequence[SpreadItem], rank: int) -> Iterator[Block]:
    coordinate = group[0].spread.mesh.coordinate_of(rank)
    if coordinate is None:
        return
    for name, dtype, spread in group:
        start, shape = spread.box_at(coordinate)
        if 0 in shape or any(coordinate[dim] != place for dim, place in spread.writers(name).items()):
            continue
        yield Block(name=name, dtype=dtype, whole=spread.shape, start=start, shape=shape)


def allot(items: Sequence[SpreadItem], world_size: int) -> Allotment | None:
    """Return what all ranks write of spread tensors; None if it cannot be said in few words.

    Args:
        items: The tensors, none of them empty.
        world_size: How many ranks there are.

    Ranks: any.
    """
    begins = np.zeros(world_size, np.int64)  # where each rank's next group begins, from the end of its file's header
    runs: dict[str, tuple[Run, ...]] = {}
    budget = MOST_RUNS
    for group in grouped(items):
        found = _allot_group(group, begins, budget)
        if found is None:
            return None
        runs.update(found)
        budget -= sum(map(len, found.values()))
    return Allotment(
        {item.name: item for item in sorted(items, key=lambda item: item.name)}, dict(sorted(runs.items()))
    )


def _allot_group(group: Sequence[SpreadItem], begins: Any, budget: int) -> dict[str, tuple[Run, ...]] | None:
    """Return a group's runs, and move on to behind it where each rank's next group begins."""
    mesh = group[0].spread.mesh
    ranks = _ranks(mesh)
    if ranks.max() >= len(begins):
        return None
    cuts = _refined(_cuts({item.spread for item in group}), begins[ranks])
    known: dict[tuple[Spread, tuple[tuple[int, int], ...]], list[_Sketch]] = {}
    sketches: list[list[_Sketch]] = []
    for name, _, spread in group:
        writers = spread.writers(name)
        key = spread, tuple(writers.items())
        if key not in known:
            known[key] = list(_sketches(spread, writers, cuts))
        sketches.append(known[key])
        budget -= sum(len(sketch.runs) for sketch in known[key])
        if budget < 0:
            return None
    in_cells: dict[Cell, list[tuple[int, int]]] = {}  # the tensors in each, and their items' number
    for index, of_tensor in enumerate(sketches):
        for sketch in of_tensor:
            in_cells.setdefault(sketch.cell, []).append((index, sketch.num_bytes))
    offsets: dict[tuple[Cell, int], int] = {}
    for cell, parts in in_cells.items():
        place = tuple(slice(first, last) for first, last in cell)
        offset = int(begins[mesh.rank_at(tuple(first for first, _ in cell))])
        sized = [(index, count * ITEM_BYTES[group[index].dtype]) for index, count in parts]
        sized.sort(key=lambda part: file_order(group[part[0]].dtype, part[1]))
        offset = aligned(offset, sized[0][1])
        for index, num_bytes in sized:
            offsets[cell, index] = offset
            offset += num_bytes
        begins[ranks[place]] = offset
    found = {}
    for index, (item, of_tensor) in enumerate(zip(group, sketches, strict=True)):
        runs = [run._replace(offset=offsets[s.cell, index]) for s in of_tensor for run in s.runs]
        found[item.name] = tuple(merged(runs))
    return found


def aligned(offset: int, num_bytes: int) -> int:
    """Return where a group begins whose first block has so many bytes, behind what ends at `offset`.

    Ranks: any.
    """
    return offset + -offset % alignment(num_bytes)


def _ranks(mesh: Mesh) -> Any:
    """Return the ranks of a mesh, by coordinate."""
    ranks = np.full(mesh.sizes, mesh.first, np.int64)
    for dim, (size, step) in enumerate(zip(mesh.sizes, mesh.steps, strict=True)):
        ranks += (np.arange(size) * step).reshape([-1 if each == dim else 1 for each in range(len(mesh.sizes))])
    return ranks


def _cuts(spreads: set[Spread]) -> list[list[int]]:
    """Return where, in each dimension of their mesh, the size of pieces changes, or the tensors that there are."""
    mesh = next(iter(spreads)).mesh
    cuts: list[set[int]] = [{0, size} for size in mesh.sizes]
    for spread in spreads:
        for dim in spread.replicas:
            cuts[dim].update(range(mesh.sizes[dim]))
        sizes: dict[int, set[int]] = {dim: {size} for dim, size in enumerate(spread.shape)}
        for mesh_dim, dim in spread.splits:
            parts, after = mesh.sizes[mesh_dim], set()
            for size in sizes[dim]:
                length = -(-size // parts)
                num_full, rest = divmod(size, length) if length else (0, 0)
                cuts[mesh_dim].update(cut for cut in (num_full, num_full + bool(rest)) if cut < parts)
                after |= {length, rest, 0}
            sizes[dim] = after
    return [sorted(each) for each in cuts]


def _refined(cuts: Sequence[Sequence[int]], begins: Any) -> list[list[int]]:
    """Return the cuts and more, so that in each cell the group begins at one place."""
    if (begins == begins.flat[0]).all():
        return [list(each) for each in cuts]
    refined = []
    for dim, each in enumerate(cuts):
        others = tuple(other for other in range(begins.ndim) if other != dim)
        changes = (np.diff(begins, axis=dim) != 0).any(axis=others)
        refined.append(sorted({*each, *(int(place) + 1 for place in np.flatnonzero(changes))}))
    return refined


def _sketches(spread: Spread, writers: Mapping[int, int], cuts: Sequence[Sequence[int]]) -> Iterator[_Sketch]:
    """Yield what the ranks of each cell write of a tensor."""
    spans = [
        [(writers[dim], writers[dim] + 1)] if dim in writers else list(pairwise(of_dim))
        for dim, of_dim in enumerate(cuts)
    ]
    for cell in product(*spans):
        _, shape = spread.box_at(tuple(first for first, _ in cell))
        if 0 not in shape:
            num_items = 1
            for size in shape:
                num_items *= size
            yield _Sketch(cell, num_items, tuple(_runs(spread, cell, shape)))


def _runs(spread: Spread, cell: Cell, shape: tuple[int, ...]) -> Iterator[Run]:
    """Yield the boxes of a cell as runs, without the offset; nearly always one."""
    extent, repeats = list(shape), []
    fixed: list[range] = [range(first, first + 1) for first, _ in cell]
    corner = tuple(first for first, _ in cell)
    for mesh_dim, dim in reversed(spread.splits):
        first, last = cell[mesh_dim]
        if last - first == 1:
            continue
        beside = (*corner[:mesh_dim], first + 1, *corner[mesh_dim + 1 :])
        if spread.box_at(beside)[0][dim] - spread.box_at(corner)[0][dim] == extent[dim]:
            repeats.append(Repeat(dim, last - first, spread.mesh.steps[mesh_dim]))
            extent[dim] *= last - first
        else:  # what lies between is in another cell
            fixed[mesh_dim] = range(first, last)
    for coordinate in product(*fixed):
        start, _ = spread.box_at(coordinate)
        yield Run(spread.mesh.rank_at(coordinate), 0, start, shape, tuple(repeats))

"""The allotment says of every rank what it writes: the same as each of them does, one by one."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from distckpt.allotment import Allotment, SpreadItem, allot, own_blocks_of
from distckpt.chunks import Runs
from distckpt.fileplan import FilePlan
from distckpt.plan import Block, in_file_order
from distckpt.spread import Mesh, Spread, is_even, mesh_of
from distckpt.tiling import tiles

REST = Block(name="rest", dtype="F64", whole=(3,), start=(0,), shape=(3,))


def row_major(first: int, sizes: tuple[int, ...]) -> Mesh:
    steps, step = [], 1
    for size in reversed(sizes):
        steps.append(step)
        step *= size
    mesh = mesh_of(first, sizes, tuple(reversed(steps)))
    assert mesh is not None
    return mesh


def plans(items: list[SpreadItem], world_size: int) -> list[FilePlan]:
    """Return every rank's file, as it would plan it alone; odd ranks write something else, too."""
    rest = [[], [REST]]
    return [FilePlan.of(rest[rank % 2], spread=own_blocks_of(items, rank)) for rank in range(world_size)]


def pieces_of(plan: FilePlan) -> set[tuple[str, tuple[int, ...], tuple[int, ...], int]]:
    each = zip(plan.blocks[: plan.num_spread], plan.offsets, strict=False)
    return {(block.name, block.start, block.shape, offset - len(plan.header)) for block, offset in each}


def expanded(allotment: Allotment, world_size: int) -> list[set[tuple[str, tuple[int, ...], tuple[int, ...], int]]]:
    found: list[set[tuple[str, tuple[int, ...], tuple[int, ...], int]]] = [set() for _ in range(world_size)]
    for name, runs in allotment.runs.items():
        for chunk in Runs(runs, (0,) * world_size):
            found[chunk.file].add((name, chunk.start, chunk.shape, chunk.offset))
    return found


@st.composite
def states(draw):
    """Tensors over one or more meshes of up to 24 ranks, which need not be all ranks."""
    sizes = draw(st.sampled_from([(2,), (3,), (8,), (2, 3), (4, 2), (2, 2, 3), (1, 4), (5, 1), (24,), (4, 6)]))
    first = draw(st.integers(0, 2))
    meshes = [row_major(first, sizes)]
    total = torch.Size(sizes).numel()
    if draw(st.booleans()):
        meshes.append(row_major(first, (total,)))
    if total % 2 == 0 and draw(st.booleans()):
        meshes.append(row_major(first, (2, total // 2)))
    items = []
    for number in range(draw(st.integers(1, 7))):
        mesh = draw(st.sampled_from(meshes))
        shape = tuple(draw(st.lists(st.integers(1, 13), min_size=1, max_size=3)))
        along = [draw(st.none() | st.integers(0, len(shape) - 1)) for _ in mesh.sizes]
        splits = tuple((mesh_dim, dim) for mesh_dim, dim in enumerate(along) if dim is not None)
        items.append(SpreadItem(f"t{number}", draw(st.sampled_from(["F32", "U8", "F64"])), Spread(mesh, shape, splits)))
    return items, first + total + draw(st.integers(0, 1))


@settings(deadline=None)
@given(states())
def test_the_allotment_is_what_each_rank_writes(state):
    items, world_size = state
    allotment = allot(items, world_size)
    written = plans(items, world_size)
    assert expanded(allotment, world_size) == [pieces_of(plan) for plan in written]
    for rank, plan in enumerate(written):
        offsets = [offset - len(plan.header) for offset in plan.offsets]
        assert allotment.is_what(rank, plan.blocks[: plan.num_spread], offsets[: plan.num_spread])
    for item in items:
        boxes = [(run.start, run.extent) for run in allotment.runs[item.name]]
        assert tiles(item.spread.shape, boxes)


@settings(deadline=None)
@given(states(), st.data())
def test_a_rank_that_writes_anything_else_says_so(state, data):
    items, world_size = state
    allotment, written = allot(items, world_size), plans(items, world_size)
    rank = data.draw(st.integers(0, world_size - 1))
    blocks = list(written[rank].blocks[: written[rank].num_spread])
    offsets = [offset - len(written[rank].header) for offset in written[rank].offsets][: len(blocks)]
    if not blocks:
        stray = Block(name="t0", dtype="F32", whole=(1,), start=(0,), shape=(1,))
        assert not allotment.is_what(rank, [stray], [0])
        return
    victim = data.draw(st.integers(0, len(blocks) - 1))
    assert not allotment.is_what(rank, blocks[:victim] + blocks[victim + 1 :], offsets[:victim] + offsets[victim + 1 :])
    offsets[victim] += 1
    assert not allotment.is_what(rank, blocks, offsets)


@settings(deadline=None)
@given(states())
def test_every_tensor_in_a_file_lies_at_a_multiple_of_its_alignment_and_no_byte_is_left_over(state):
    items, world_size = state
    for plan in plans(items, world_size):
        if not plan.blocks:
            continue
        spans = [(o, o + b.num_bytes) for b, o in zip(plan.blocks, plan.offsets, strict=True)]
        spans += [(begin, begin + size) for begin, size in plan.gaps]
        end = len(plan.header)
        for begin, after in sorted(spans):
            assert begin == end
            end = after
        assert end == plan.num_bytes
        for block, offset in zip(plan.blocks, plan.offsets, strict=True):
            assert offset % min(block.num_bytes & -block.num_bytes, 4096) == 0


@given(states())
def test_a_spread_says_of_each_rank_what_torch_says(state):
    items, _ = state
    for _, _, (mesh, shape, splits) in items:
        placements = [
            Shard(dict(splits)[dim]) if dim in dict(splits) else Replicate() for dim in range(len(mesh.sizes))
        ]
        for coordinate in itertools.product(*map(range, mesh.sizes)):
            size, start = _compute_local_shape_and_global_offset(shape, mesh.sizes, list(coordinate), placements)
            found_start, found_size = Spread(mesh, shape, splits).box_at(coordinate)
            assert found_size == tuple(size)
            assert 0 in size or found_start == tuple(start)
            assert mesh.coordinate_of(mesh.rank_at(coordinate)) == coordinate


def test_fsdp_over_tensor_parallelism_is_what_torch_says():
    mesh = row_major(0, (4, 2))
    spread = Spread(mesh, (24, 3), ((1, 0), (0, 0)))
    assert is_even(spread)
    for coordinate in itertools.product(range(4), range(2)):
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        size, start = _compute_local_shape_and_global_offset((24, 3), (4, 2), list(coordinate), placements)
        assert spread.box_at(coordinate) == (tuple(start), tuple(size))
    assert len(allot([SpreadItem("w", "F32", spread)], 8).runs["w"]) == 1


def runs_of(items: list[SpreadItem], world_size: int) -> list[int]:
    return [len(runs) for runs in allot(items, world_size).runs.values()]


@pytest.mark.parametrize("world_size", [8, 1024])
def test_an_even_state_is_one_run_a_tensor(world_size):
    rows, grid = row_major(0, (world_size,)), row_major(0, (world_size // 4, 4))
    fsdp = [SpreadItem(f"a{n}", "F32", Spread(rows, (world_size * 2, 5 + n), ((0, 0),))) for n in range(5)]
    columns = [SpreadItem("b", "BF16", Spread(rows, (3, world_size * 8), ((0, 1),)))]
    assert runs_of(fsdp + columns, world_size) == [1] * 6
    hsdp = [SpreadItem(f"h{n}", "F32", Spread(grid, (8, 5), ((1, 0),))) for n in range(9)]
    assert runs_of(hsdp, world_size) == [1] * 9
    both = [SpreadItem("c", "F32", Spread(grid, (world_size, 8), ((0, 0), (1, 1))))]
    strided = [SpreadItem("d", "F32", Spread(grid, (world_size * 3,), ((1, 0), (0, 0))))]
    norms = [SpreadItem(f"n{n}", "F32", Spread(grid, (world_size,), ((0, 0),))) for n in range(9)]
    assert runs_of(both + strided + norms, world_size) == [1] * 11
    # Who writes which norm depends on the place in one dimension, and what lies behind them on that, too.
    assert max(runs_of(fsdp + both + strided + norms + hsdp, world_size)) <= 4


def test_an_uneven_state_is_a_few_runs_a_tensor():
    mesh = row_major(0, (1000,))
    items = [
        SpreadItem(f"t{n}", "F32", Spread(mesh, (size, 3), ((0, 0),))) for n, size in enumerate((7, 999, 1001, 2500))
    ]
    assert max(runs_of(items, 1000)) <= 2 * len(items)


def test_what_is_cut_in_ever_other_ways_is_told_one_by_one(monkeypatch):
    from distckpt import allotment

    monkeypatch.setattr(allotment, "MOST_RUNS", 100)
    mesh = row_major(0, (64,))
    items = [SpreadItem(f"t{n}", "F32", Spread(mesh, (n,), ((0, 0),))) for n in range(1, 64)]
    assert allot(items, 64) is None
    assert allot(items[:3], 64) is not None


def test_planning_for_sixteen_thousand_ranks_takes_no_longer_than_for_few():
    def seconds(world_size: int) -> float:
        mesh = row_major(0, (world_size,))
        items = [SpreadItem(f"t{n}", "F32", Spread(mesh, (world_size * 4, 2), ((0, 0),))) for n in range(2000)]
        begun = time.process_time()
        assert allot(items, world_size).fingerprint
        return time.process_time() - begun

    assert seconds(16_384) < 5 * seconds(8) + 0.5


def test_the_order_of_a_group_is_the_order_of_a_file():
    mesh = row_major(0, (2,))
    shapes = [(6,), (4, 1024), (2, 3), (128,)]
    items = [SpreadItem(f"t{n}", "F32", Spread(mesh, shape, ((0, 0),))) for n, shape in enumerate(shapes)]
    [group] = own_blocks_of(items, 1)
    assert group == in_file_order(sorted(group, key=lambda block: block.name))

"""Staging: the bytes of a rank's file, in memory that stays."""

from __future__ import annotations

import mmap
import os

import pytest
import torch
from safetensors.torch import load

from distckpt.datafiles import SEGMENT_BYTES
from distckpt.fileplan import FilePlan
from distckpt.hostmemory import HostMemory
from distckpt.plan import Block, in_file_order
from distckpt.staging import STEP_BYTES, Staging, stage_once
from distckpt.storage.direct import address
from distckpt.tensors import DTYPE_NAMES


def share_of(tensors: dict[str, torch.Tensor]) -> list[tuple[Block, torch.Tensor]]:
    blocks = [
        Block(name=name, dtype=DTYPE_NAMES[t.dtype], whole=tuple(t.shape), start=(0,) * t.dim(), shape=tuple(t.shape))
        for name, t in tensors.items()
    ]
    return [(block, tensors[block.name]) for block in in_file_order(blocks)]


TENSORS = {
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3.5),
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(5, 7).bfloat16(),
    "turned": torch.randn(6, 4).T,
    "strided": torch.arange(40)[::3],
    "negated": torch._neg_view(torch.randn(3)),
    "large": torch.randn(3 * STEP_BYTES // 4 + 5),
    "large turned": torch.randn(3000, 4000).T,
    "last": torch.arange(3, dtype=torch.int32),
}


@pytest.mark.parametrize("begun", [True, False], ids=["now", "while writing"])
def test_the_parts_are_a_safetensors_file(begun: bool):
    staged = stage_once(share_of(TENSORS))
    if begun:
        staged.begin()
    parts = [bytes(part) for part in staged.parts()]
    assert all(len(part) == SEGMENT_BYTES for part in parts[1:-1])
    assert len(parts[0]) == len(staged.plan.header)
    loaded = load(b"".join(parts))
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor), name


def test_what_is_begun_is_of_one_moment():
    tensors = {"a": torch.zeros(10), "b": torch.zeros(STEP_BYTES)}
    staged = stage_once(share_of(tensors))
    staged.begin()
    for tensor in tensors.values():
        tensor.fill_(7)
    assert not any(load(b"".join(staged.parts()))[name].any() for name in tensors)


def test_a_second_save_of_the_same_plan_uses_the_same_memory():
    staging, share = Staging(), share_of(TENSORS)
    plan = FilePlan.of([block for block, _ in share])
    sources = [data for _, data in share]
    first = address(next(iter(staging.stage(plan, sources).parts())))
    second = address(next(iter(staging.stage(plan, sources).parts())))
    assert first == second


def test_a_larger_plan_gets_more_memory_and_a_smaller_one_keeps_it():
    staging = Staging()
    for size in (10, 5_000_000, 20):
        tensors = {"x": torch.randn(size)}
        share = share_of(tensors)
        staged = staging.stage(FilePlan.of([block for block, _ in share]), [data for _, data in share])
        assert torch.equal(load(b"".join(staged.parts()))["x"], tensors["x"])


def test_the_memory_is_aligned_and_holds_zeros():
    memory = HostMemory(20 << 20)
    assert address(memory.view) % mmap.PAGESIZE == 0
    assert not memory.tensor.any()
    assert len(memory.view) == 20 << 20


def test_too_much_memory_is_a_memory_error():
    with pytest.raises(MemoryError, match="no room to stage"):
        HostMemory(1 << 60)


def test_a_process_that_is_forked_off_neither_sees_nor_shares_staged_bytes():
    memory = HostMemory(3 << 20)
    memory.view[:] = bytes([7]) * len(memory.view)
    child = os.fork()
    if not child:
        seen = bytes(memory.view)
        memory.view[:2] = b"no"
        os._exit(0 if seen == bytes(len(seen)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bytes(memory.view) == bytes([7]) * len(memory.view)

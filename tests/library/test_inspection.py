"""A state that has gone bad in silence is told of as it is saved, or never becomes a checkpoint; a good one is not."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from inspected_jobs import save_after_an_error_of_one_bit
from rank_pool import RankPools

from distckpt import CheckpointManager
from distckpt.datafiles import STEP_BYTES
from distckpt.errors import ConfigError, NonFiniteStateError
from distckpt.inspection import Inspection
from distckpt.staging import stage_once
from distckpt.state import flatten
from distckpt.workspace import Workspace

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
FLOAT8 = [torch.float8_e5m2, torch.float8_e4m3fn]


class Holder(torch.nn.Module):
    """A module of these tensors, and a mask."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            trains = tensor.is_floating_point() or tensor.is_complex()
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=trains))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))


def found_in(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return what is found in a module while it is written."""
    objects = flatten({"model": Holder(tensors)}, rng=False)
    share = Workspace().share(objects, rank=0, num_writers=1, received={})
    staged = stage_once(
        list(zip(share.plan.blocks, share.sources([t for o in objects for t in o.tensors]), strict=True))
    )
    check = Inspection(replicas="off", finite="warn").finite_check(staged.plan, objects)
    begin = 0
    for part in staged.parts():
        for first in range(0, len(part), STEP_BYTES):
            check.look(begin + first, part[first : first + STEP_BYTES])
        begin += len(part)
    assert begin == share.plan.num_bytes
    return sorted(check.found())


@pytest.mark.parametrize("dtype", FLOATS + FLOAT8, ids=str)
def test_every_bad_number_is_found_and_named_and_none_that_is_good(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    good = torch.tensor([largest, -largest, 0.0, torch.finfo(dtype).tiny], dtype=torch.float64).to(dtype)
    bad = torch.tensor([1.0, math.nan, 2.0]).to(dtype)
    tensors = {
        "a": good,
        "b": bad,
        "c": good.clone(),
        "empty": good[:0].clone(),
        "whole": torch.tensor([-1, 2**31 - 1]),
    }
    if dtype != torch.float8_e4m3fn:
        tensors["d"] = torch.tensor([-math.inf]).to(dtype)
    assert found_in(tensors) == [f"model.{name}" for name in ("b", "d") if name in tensors]


@pytest.mark.parametrize("others", [1.0, -1.0])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, (4 << 18) - 1, 4 << 18, (4 << 18) + 1, 2_999_999])
def test_a_bad_number_is_found_wherever_it_stands_in_a_large_tensor(place: int, value: float, others: float) -> None:
    tensor = torch.full((3_000_000,), others)
    tensor[place] = value
    assert found_in({"before": torch.ones(5), "large": tensor, "then": torch.ones(7)}) == ["model.large"]


def state(value: float) -> dict[str, Any]:
    return {"model": Holder({"weight": torch.tensor([1.0, value])}), "best_loss": torch.tensor(math.inf)}


@pytest.mark.parametrize("background", [True, False])
def test_a_state_with_nan_never_becomes_the_newest_checkpoint_if_it_is_refused(
    tmp_path: Path, background: bool
) -> None:
    with CheckpointManager(tmp_path, check_finite="error", background=background) as ckpt:
        ckpt.save(1, state(1.0))
        with pytest.raises(NonFiniteStateError, match=r"step 2: NaN or infinities in model\.weight\nFix: "):  # noqa: PT012
            ckpt.save(2, state(math.nan))
            ckpt.wait()
        assert [checkpoint.step for checkpoint in ckpt.checkpoints] == [1]
        assert not list(tmp_path.glob("step-*2/*/*")), "what was written is left"
        ckpt.save(3, state(2.0))
        ckpt.wait()
        assert [checkpoint.step for checkpoint in ckpt.checkpoints] == [1, 3]


def test_a_state_with_an_infinity_is_saved_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "distckpt"), CheckpointManager(tmp_path) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state(math.inf))
        ckpt.wait()
        assert [checkpoint.step for checkpoint in ckpt.checkpoints] == [1, 2]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("step 1: NaN or infinities in model.weight\n")


def test_nobody_looks_if_that_is_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "distckpt"), CheckpointManager(tmp_path, check_finite="off") as ckpt:
        ckpt.save(1, state(math.nan))
    assert not caplog.records


def test_another_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match='check_finite must be "off", "warn" or "error", is \'loud\''):
        CheckpointManager("unused", check_finite="loud")  # type: ignore[arg-type]


def test_as_many_samples_as_there_are_parts_cover_every_byte() -> None:
    torch.manual_seed(0)
    tensors = {f"p{number}": torch.randn(200_000 + number) for number in range(7)}
    tensors |= {f"small{number}": torch.randn(3) for number in range(200)} | {"odd": torch.randn(40, 50).t()}
    objects = flatten({"model": Holder(tensors)}, rng=False)
    inspection = Inspection(replicas="warn", finite="off")
    seen: dict[str, int] = {}
    num_saves = -(-sum(t.nbytes + (16 << 10) for t in tensors.values()) // (1 << 20))
    for _ in range(num_saves):
        sampled = inspection.sample(objects, attempt="0123456789abcdef")
        assert sampled is not None
        assert sum(num_bytes for _, num_bytes in sampled.pieces) <= (1 << 20) + 8
        for name, num_bytes in sampled.pieces:
            seen[name] = seen.get(name, 0) + num_bytes
    assert seen.keys() == {f"model.{name}" for name in tensors}  # the mask is a buffer, of which rank 0's counts
    for name, tensor in tensors.items():
        assert seen[f"model.{name}"] >= tensor.nbytes


@pytest.mark.parametrize("layout", ["sharded", "full"])
def test_one_flipped_bit_on_one_rank_is_told_with_its_name_and_rank(
    ranks: RankPools, tmp_path: Path, layout: str
) -> None:
    results = ranks(3).run(save_after_an_error_of_one_bit, str(tmp_path), {"layout": layout})
    assert [result["told"] for result in results] == [""] * 3
    assert results[0]["before"] == 0
    warnings = [line for line in results[0]["warnings"] if "diverged" in line]
    assert warnings
    assert "rank 1 has other values in model.weight\n" in warnings[0]
    assert not results[1]["warnings"]


def test_a_state_that_has_diverged_is_refused_on_all_ranks(ranks: RankPools, tmp_path: Path) -> None:
    results = ranks(3).run(save_after_an_error_of_one_bit, str(tmp_path), {"check_replicas": "error"})
    assert len({result["told"] for result in results}) == 1
    assert results[0]["told"].startswith("StateDivergedError: step ")
    with CheckpointManager(tmp_path) as ckpt:
        refused = int(results[0]["told"].split()[2].rstrip(":"))
        assert max(checkpoint.step for checkpoint in ckpt.checkpoints) == refused - 1
    assert not list(tmp_path.glob(f"step-*{refused}/*/*")), "what was written is left"

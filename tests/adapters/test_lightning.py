"""The callbacks for Lightning: what a stopped `fit` goes on to is what it would have become, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning_jobs as jobs
import pytest
import torch
from rank_pool import RankPools

import distckpt
from distckpt.errors import UsageError

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Lightning's, on what these small runs do on purpose
]

L, PL = "lightning.pytorch", "pytorch_lightning"


def assert_same_end(found: dict[str, Any], expected: dict[str, Any]) -> None:
    compared = ("step", "epoch", "count", "rate", "stopping")
    assert {name: str(found[name]) for name in compared} == {name: str(expected[name]) for name in compared}
    assert all(torch.equal(found["model"][name], value) for name, value in expected["model"].items())
    assert len(found["optimizer"]) == len(expected["optimizer"]) > 0
    assert all(map(torch.equal, found["optimizer"], expected["optimizer"]))
    assert torch.equal(found["random"], expected["random"])
    assert found["seen"] == expected["seen"][-len(found["seen"]) :]


@pytest.mark.parametrize(
    ("package", "every", "crash_at", "options"),
    [
        pytest.param(L, 5, 17, {"max_epochs": 3}, id="in the middle of an epoch"),
        pytest.param(PL, 5, 17, {"max_steps": 30}, id="by steps, with pytorch_lightning"),
        pytest.param(L, 12, 14, {"max_epochs": 3}, id="between epochs"),
        pytest.param(L, 12, 26, {"max_steps": 30}, id="between epochs, by steps", marks=pytest.mark.slow),
        pytest.param(L, 5, 11, {"max_epochs": 2, "val_check_interval": 5}, id="after a validation inside an epoch"),
        pytest.param(
            L,
            1,
            4,
            {"max_epochs": 3, "accumulate_grad_batches": 5},
            id="with accumulated gradients",
            marks=pytest.mark.slow,
        ),
        pytest.param(L, 5, 8, {"max_epochs": 2, "workers": 2, "validation": False}, id="with workers"),
        pytest.param(
            L, 5, 8, {"max_epochs": 2, "precision": "bf16-mixed"}, id="in mixed precision", marks=pytest.mark.slow
        ),
    ],
)
def test_a_crashed_fit_ends_as_an_undisturbed_one(
    tmp_path: Path, package: str, every: int, crash_at: int, options: dict[str, Any]
):
    whole = jobs.fit(package, str(tmp_path / "whole"), every=every, **options)
    crashed = jobs.fit(package, str(tmp_path / "run"), every=every, crash_at=crash_at, **options)
    resumed = jobs.fit(package, str(tmp_path / "run"), every=every, seed=1, **options)
    assert crashed["crashed"]
    assert [each["handlers_are_back"] for each in (whole, crashed, resumed)] == [True] * 3
    assert 0 < len(resumed["seen"]) < len(whole["seen"])
    assert_same_end(resumed, whole)


def test_a_finished_fit_goes_on_with_more_epochs(tmp_path: Path):
    whole = jobs.fit(L, str(tmp_path / "whole"), max_epochs=3)
    jobs.fit(L, str(tmp_path / "run"), max_epochs=2)
    assert_same_end(jobs.fit(L, str(tmp_path / "run"), seed=1, max_epochs=3), whole)


def test_a_finished_fit_has_nothing_left_to_do(tmp_path: Path):
    done = jobs.fit(L, str(tmp_path), max_steps=7, validation=False)
    again = jobs.fit(L, str(tmp_path), seed=1, max_steps=7, validation=False)
    assert (again["seen"], again["step"]) == ([], 7)
    assert all(torch.equal(again["model"][name], value) for name, value in done["model"].items())


def test_a_signal_ends_fit_with_the_step_saved_and_no_more_validation(tmp_path: Path):
    whole = jobs.fit(L, str(tmp_path / "whole"), max_epochs=3)
    stopped = jobs.fit(L, str(tmp_path / "run"), preempt_at=17, every=100, max_epochs=3, min_epochs=3)
    assert (stopped["preempted"], stopped["step"], stopped["handlers_are_back"]) == (True, 17, True)
    assert stopped["validations"] == 1
    resumed = jobs.fit(L, str(tmp_path / "run"), seed=1, every=100, max_epochs=3, min_epochs=3)
    assert not resumed["preempted"]
    assert_same_end(resumed, whole)


def test_what_validation_measured_stands_with_the_step_and_ranks_it(tmp_path: Path):
    jobs.fit(L, str(tmp_path), every=12, max_epochs=3)
    found = distckpt.CheckpointManager(tmp_path).checkpoints
    assert [each.step for each in found] == [12, 24, 36]
    losses = [each.metrics["val/loss"] for each in found]
    assert len(set(losses)) == 3


def test_a_strategy_that_keeps_its_state_elsewhere_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="does not know how the strategy"):
        jobs.fit_with_unknown_strategy(L, str(tmp_path))


def test_two_ranks_go_on_in_a_later_epoch_with_their_own_samples(ranks: RankPools, tmp_path: Path):
    pool = ranks(2)
    whole = pool.run(jobs.fit, L, str(tmp_path / "whole"), max_epochs=3)
    crashed = pool.run(jobs.fit, L, str(tmp_path / "run"), crash_at=9, max_epochs=3, every=4)
    assert all(each["crashed"] for each in crashed)
    resumed = pool.run(jobs.fit, L, str(tmp_path / "run"), seed=1, max_epochs=3, every=4)
    for found, expected in zip(resumed, whole, strict=True):
        assert_same_end(found, expected)
    assert not set(whole[0]["seen"][:24]) & set(whole[1]["seen"][:24])


def test_an_order_that_cannot_be_found_again_is_told(ranks: RankPools, tmp_path: Path):
    said = ranks(2).run(jobs.fit_and_listen, L, str(tmp_path), own_sampler=False, max_steps=1, validation=False)
    assert ["will see samples twice" in text for text in said] == [True, True]


def test_a_signal_to_one_rank_stops_both(ranks: RankPools, tmp_path: Path):
    pool = ranks(2)
    whole = pool.run(jobs.fit, L, str(tmp_path / "whole"), max_epochs=2)
    stopped = pool.run(jobs.fit, L, str(tmp_path / "run"), preempt_at=4, every=100, max_epochs=2)
    assert [each["preempted"] for each in stopped] == [True, True]
    assert stopped[0]["step"] == stopped[1]["step"] < 8
    resumed = pool.run(jobs.fit, L, str(tmp_path / "run"), seed=1, every=100, max_epochs=2)
    for found, expected in zip(resumed, whole, strict=True):
        assert_same_end(found, expected)

"""The Hugging Face Trainer: what a stopped `train` goes on to is what it would have become, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers_jobs as jobs
from rank_pool import RankPools
from safetensors.torch import load_file
from typer.testing import CliRunner

import distckpt
from distckpt.adapters.transformers import CheckpointedTrainer
from distckpt.cli.application import application
from distckpt.errors import UsageError

pytestmark = [pytest.mark.filterwarnings("ignore")]  # of transformers and accelerate, on what the tests do on purpose


def assert_same_end(found: dict[str, Any], expected: dict[str, Any]) -> None:
    compared = ("step", "epoch", "log", "flos", "best", "rate", "stopping")
    assert {name: found[name] for name in compared} == {name: expected[name] for name in compared}
    assert all(torch.equal(found["model"][name], value) for name, value in expected["model"].items())
    assert len(found["optimizer"]) == len(expected["optimizer"]) > 0
    assert all(map(torch.equal, found["optimizer"], expected["optimizer"]))
    assert torch.equal(found["random"], expected["random"])
    assert found["seen"] == expected["seen"][-len(found["seen"]) :]


@pytest.mark.parametrize(
    ("every", "crash_at", "options"),
    [
        pytest.param(5, 17, {}, id="in the middle of an epoch"),
        pytest.param(12, 14, {}, id="between epochs"),
        pytest.param(5, 11, {"eval_strategy": "steps", "eval_steps": 5}, id="after an evaluation inside an epoch"),
        pytest.param(2, 5, {"gradient_accumulation_steps": 5}, id="with accumulated gradients", marks=pytest.mark.slow),
        pytest.param(
            5,
            8,
            {"max_steps": 14, "dataloader_num_workers": 1, "eval_strategy": "no"},
            id="with a worker",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_crashed_training_ends_as_an_undisturbed_one(
    tmp_path: Path, every: int, crash_at: int, options: dict[str, Any]
):
    whole = jobs.train(str(tmp_path / "whole"), every=every, **options)
    crashed = jobs.train(str(tmp_path / "run"), every=every, crash_at=crash_at, **options)
    resumed = jobs.train(str(tmp_path / "run"), every=every, **options)
    assert crashed["crashed"]
    assert [each["handlers_are_back"] for each in (whole, crashed, resumed)] == [True] * 3
    assert 0 < len(resumed["seen"]) < len(whole["seen"])
    assert_same_end(resumed, whole)
    assert resumed["files"] == []  # the Trainer has written no checkpoint of its own


def test_a_signal_ends_training_with_the_step_saved_and_no_more_evaluation(tmp_path: Path):
    whole = jobs.train(str(tmp_path / "whole"))
    stopped = jobs.train(str(tmp_path / "run"), preempt_at=17, every=100)
    assert (stopped["preempted"], stopped["step"], stopped["evaluations"]) == (True, 17, 1)
    resumed = jobs.train(str(tmp_path / "run"), every=100)
    assert not resumed["preempted"]
    assert_same_end(resumed, whole)


def test_what_evaluation_measured_stands_with_the_step(tmp_path: Path):
    run = jobs.train(str(tmp_path / "run"), every=12)
    found = distckpt.CheckpointManager(tmp_path / "run").checkpoints
    logged = {each["step"]: each["eval_loss"] for each in run["log"] if "eval_loss" in each}
    assert {each.step: each.metrics["eval_loss"] for each in found} == logged
    assert sorted(logged) == [12, 24, 36]


def test_what_is_exported_opens_with_safetensors_and_from_pretrained(tmp_path: Path):
    run = jobs.train(str(tmp_path / "run"), max_steps=3, eval_strategy="no")
    target = tmp_path / "exported"
    done = CliRunner().invoke(application, ["export", str(tmp_path / "run"), str(target), "--format", "hf"])
    assert done.exit_code == 0, done.output
    tensors = load_file(target / "model.safetensors")
    assert all(torch.equal(value, run["model"][name]) for name, value in tensors.items())
    jobs.tiny_model().config.save_pretrained(target)
    opened = transformers.GPT2LMHeadModel.from_pretrained(target).state_dict()
    assert all(torch.equal(opened[name], value) for name, value in run["model"].items())


def test_two_ranks_go_on_with_their_own_samples_and_stop_together(ranks: RankPools, tmp_path: Path):
    pool = ranks(2)
    options = {"num_train_epochs": 2}
    whole = pool.run(jobs.train, str(tmp_path / "whole"), **options)
    stopped = pool.run(jobs.train, str(tmp_path / "run"), preempt_at=8, every=100, **options)
    assert [each["preempted"] for each in stopped] == [True, True]
    assert stopped[0]["step"] == stopped[1]["step"] < 12
    resumed = pool.run(jobs.train, str(tmp_path / "run"), every=100, **options)
    for found, expected in zip(resumed, whole, strict=True):
        assert_same_end(found, expected)
    assert not set(whole[0]["seen"][:24]) & set(whole[1]["seen"][:24])


def make(directory: Path, **options: Any) -> CheckpointedTrainer:
    args = transformers.TrainingArguments(str(directory / "output"), report_to=[], use_cpu=True, **options)
    manager = distckpt.CheckpointManager(directory / "run", every=5)
    return CheckpointedTrainer(model=jobs.tiny_model(), args=args, train_dataset=jobs.Numbers(), checkpoints=manager)


def test_checkpoints_of_the_trainers_own_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match='save_strategy="no"'):
        make(tmp_path)
    with pytest.raises(UsageError, match="says where to go on"):
        make(tmp_path, save_strategy="no").train("out/checkpoint-500")

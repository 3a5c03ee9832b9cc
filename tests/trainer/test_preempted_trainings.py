"""Signals at random moments of a training, on one rank or all: no step is lost, and the end is the same to the bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import signal
from collections import Counter
from pathlib import Path

import preempted_jobs as jobs
import pytest
from rank_pool import RankPools
from test_training import LONG_EVALUATION, assert_equal_to_the_bit, small

from distckpt.catalog import committed, scan
from distckpt.leasefiles import standing
from distckpt.manager import SIGNALS
from distckpt.storage import open_storage
from distckpt.trainer import TrainConfig
from distckpt.trainer.logs import LOG_NAME

TOTAL, STEPS_PER_EPOCH = 32, 8
GRACE_S = 30.0


def training(directory: Path) -> TrainConfig:
    """Return a training of 4 epochs; an evaluation takes about as long as the steps between two of them."""
    data = dataclasses.replace(LONG_EVALUATION, num_train=7 * STEPS_PER_EPOCH, num_test=500)
    plain = small(directory, data=data, epochs=TOTAL // STEPS_PER_EPOCH)
    return dataclasses.replace(plain, checkpoint=dataclasses.replace(plain.checkpoint, every=3, grace_s=GRACE_S))


def draw(chance: random.Random, *, within_s: float) -> dict[int, tuple[signal.Signals, float]]:
    """Return which ranks get which signal, and when; on both, they come up to a few milliseconds apart."""
    number, at_s = chance.choice(SIGNALS), chance.uniform(0, within_s)
    chosen = chance.choice([[0], [1], [0, 1]])
    return {rank: (number, at_s + chance.uniform(0, 0.003)) for rank in chosen}


def check_after(directory: Path, *, before: int, step: int, preempted: bool) -> str:
    """Check what a job left that was asked to stop; return what it was doing then."""
    storage = open_storage(directory)
    newest = max((found.step for found in committed(storage, scan(storage))), default=0)
    assert newest == step, "the step that the ranks agreed on is the newest checkpoint"
    lines = [json.loads(line) for line in (directory / LOG_NAME).read_text().splitlines()] if step else []
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, step + 1))
    found = standing(storage)
    assert found is not None
    assert found.state == ("preempted" if preempted else "complete")
    assert found.record.outcome is not None
    assert found.record.outcome.step == (step or None)
    if not preempted:
        return "complete"
    if step == before:
        return "before the first step"
    evaluated = [line["step"] for line in lines if line["kind"] == "eval"]
    return "in training" if step % STEPS_PER_EPOCH or step in evaluated else "in an evaluation"


def campaign(ranks: RankPools, whole: Path, folder: Path, *, num_requests: int) -> Counter[str]:
    """Train run after run, each with requests at random moments until it is complete, and compare it with `whole`."""
    run_ranks = ranks(2, timeout_s=250).run
    run_ranks(jobs.time_of, training(whole))  # what is slow the first time is no part of the time of a training
    within_s = 0.6 * max(run_ranks(jobs.time_of, training(folder / "timed")))
    counts = Counter[str]()
    for seed in itertools.count():
        chance, run, before = random.Random(seed), folder / str(seed), 0
        while before < TOTAL or standing(open_storage(run)).state != "complete":  # type: ignore[union-attr]
            asked = counts.total() - counts["complete"] < num_requests
            moments = draw(chance, within_s=within_s) if asked else {}
            results = run_ranks(jobs.fit_and_be_asked, training(run), moments)
            [(step, preempted)] = {(result.step, result.preempted) for result in results}
            came_to = check_after(run, before=before, step=step, preempted=preempted)
            print(f"seed {seed}: {moments}: {came_to}, step {step}", flush=True)
            counts[came_to] += 1
            before = step
        assert_equal_to_the_bit(whole, run, TOTAL)
        if counts.total() - counts["complete"] >= num_requests:
            print(f"{num_requests} requests: {dict(counts)}", flush=True)
            return counts
    raise AssertionError


def test_three_requests_at_random_moments_lose_no_step(ranks: RankPools, tmp_path: Path) -> None:
    assert campaign(ranks, tmp_path / "whole", tmp_path / "runs", num_requests=3).total() >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_requests_at_random_moments_lose_no_step_on_any_rank(ranks: RankPools, tmp_path: Path) -> None:
    counts = campaign(ranks, tmp_path / "whole", tmp_path / "runs", num_requests=50)
    assert {"in training", "in an evaluation", "before the first step"} <= counts.keys()

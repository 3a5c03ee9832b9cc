"""A training that is asked to stop at random moments, again and again, and what has to hold after each of them."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from training_job import POLL_S, TrainingJob, distckpt, last_step, logged

EPOCHS, STEPS_PER_EPOCH = 5, 20
TOTAL = EPOCHS * STEPS_PER_EPOCH
SETTINGS = (
    "--data.name=synthetic",
    "--data.image_size=32",
    "--data.num_classes=10",
    f"--data.num_train={32 * STEPS_PER_EPOCH}",
    "--data.num_test=4000",  # an evaluation takes about as long as the steps between two of them
    "--train.global_batch_size=32",
    f"--train.epochs={EPOCHS}",
    "--train.log_every=1",
    "--checkpoint.every=7",
)
LONGEST_START_S = 15.0  # of a job, from its first instruction to its first step

# Schedulers mostly send the first. torchrun hands on SIGUSR1 only where it is told to, so the ranks get that.
_LAUNCHER_SIGNALS = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
_RANK_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What asks a job to stop, and when.

    Attributes:
        number: The signal.
        target: Who gets it: "torchrun", which hands it on to all ranks, "rank 0", "rank 1" or "both ranks".
        step: Once the log has this step; 0: since the job's start.
        later_s: How much later.
    """

    number: signal.Signals
    target: str
    step: int
    later_s: float

    def __str__(self) -> str:
        return f"{self.number.name} to {self.target} {self.later_s:.3f} s after {self.step or 'the start'}"


def settings(run: Path) -> list[str]:
    """Return the arguments of train.py for a run."""
    return [*SETTINGS, f"--checkpoint.directory={run}"]


def draw(chance: random.Random, *, done: int) -> Request:
    """Return a request at a random moment after `done` steps; one in five comes before the next step is done."""
    target = chance.choice(["torchrun", "torchrun", "rank 0", "rank 1", "both ranks"])
    number = chance.choice(_LAUNCHER_SIGNALS if target == "torchrun" else _RANK_SIGNALS)
    is_early = chance.random() < 0.2
    step = 0 if is_early else done + chance.randint(1, max(1, (TOTAL - done) // 3))
    later_s = chance.uniform(0, LONGEST_START_S if is_early else 0.3)
    return Request(number=number, target=target, step=step, later_s=later_s)


def ask(job: TrainingJob, run: Path, request: Request) -> None:
    """Wait for the moment, and send the signal to those that are still there."""
    if request.step:
        job.wait_until(lambda: last_step(run) >= request.step, or_end=True)
    began = time.monotonic()
    while job.is_running and time.monotonic() - began < request.later_s:
        time.sleep(POLL_S)
    if request.target == "torchrun":
        job.signal(request.number)
        return
    for rank in job.ranks():
        if request.target == "both ranks" or rank.environ()["RANK"] == request.target[-1]:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(request.number)


def newest_step(run: Path) -> int:
    """Return the newest committed step; 0 if there is none."""
    return max((int(path.parent.name.removeprefix("step-")) for path in run.glob("step-*/manifest.json")), default=0)


def outcome(run: Path) -> dict[str, Any]:
    """Return how the latest job ended, as a launcher reads it."""
    listed = distckpt("ls", str(run), "--json")
    assert listed.returncode == 0, listed.stderr
    found: dict[str, Any] = json.loads(listed.stdout)["outcome"]
    return found


def interrupt(run: Path, request: Request) -> str:
    """Start the job, ask it to stop, check what it left, and return what came of it.

    Once the ranks train, the step that they agreed on is committed, the log holds each step up to it and none after it,
    and the outcome is recorded. Before they listen, a signal ends a process that has nothing to lose.
    """
    before = newest_step(run)
    with TrainingJob(settings(run), run.parent) as job:
        ask(job, run, request)
        said = f"{request}\n{job.wait_for_end()}"
    newest = newest_step(run)
    if "preempted:" not in said and "complete:" not in said:
        assert "configuration:" not in said, said
        assert newest == before, said
        return "not begun"
    assert "SIGKILL" not in said, said
    ended = outcome(run)
    steps = [line["step"] for line in logged(run) if line["kind"] == "train"]
    assert steps == list(range(1, newest + 1)), f"a step was lost, or done twice: {said}"
    if "complete:" in said:
        assert (ended["state"], ended["step"]) == ("complete", newest), said
        return "complete"
    assert "asked to stop: " in said, said
    assert (ended["state"], ended["step"]) == ("preempted", newest or None), said
    assert (f"saved step {newest}; run" if newest else "nothing is saved; run") in said, said
    if newest == before:
        return "before the first step"
    evaluated = [line["step"] for line in logged(run) if line["kind"] == "eval"]
    return "in training" if newest % STEPS_PER_EPOCH or newest in evaluated else "in an evaluation"


def campaign(run: Path, *, seed: int, num_requests: int) -> Counter[str]:
    """Interrupt a run so many times, or until it is complete; return how often what came of it."""
    chance, counts = random.Random(seed), Counter[str]()
    while counts.total() < num_requests and newest_step(run) < TOTAL:
        request = draw(chance, done=newest_step(run))
        counts[came_to := interrupt(run, request)] += 1
        print(f"seed {seed}: {request}: {came_to}, step {newest_step(run)}", flush=True)
    return counts

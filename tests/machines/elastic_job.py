"""A training on several machines, as users start it: launch/torchrun.sh on each of them, and machines that go and come.

What the run writes lies on a disk that all machines see; each writes its output to a file of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from machines import Machine, Room

from distckpt.trainer.order import Plan, epoch_order

ROOT = Path(__file__).parents[2]
PATIENCE_S = 600.0
POLL_S = 0.02
NUM_SAMPLES = 1438
STEPS_PER_EPOCH = 23
TIMEOUT_S = 15

SETTINGS = (
    "--seed=3",
    "--data.augment=false",
    "--train.global_batch_size=64",
    "--train.log_every=1",
    f"--train.timeout_s={TIMEOUT_S}",
    "--checkpoint.every=10",
    f"--checkpoint.timeout_s={TIMEOUT_S}",
)


class ElasticJob:
    """A job on the machines of a room, one rank on each; leaving its context ends nothing but the room does.

    Args:
        room: The machines.
        epochs: How long to train.
        num_machines: How many machines it takes, as torchrun's --nnodes: "2" or "1:3".
        settings: More arguments of train.py.
    """

    def __init__(self, room: Room, *, epochs: int, num_machines: str, settings: Sequence[str] = ()) -> None:
        self.room = room
        self.run = room.folder / "run"
        self.epochs = epochs
        self.total = epochs * STEPS_PER_EPOCH
        self._notes = room.folder / "samples"
        self._notes.mkdir(exist_ok=True)
        self._settings = [*SETTINGS, f"--train.epochs={epochs}", f"--checkpoint.directory={self.run}", *settings]
        self._num_machines = num_machines
        self._agents: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for machine in self.room.machines:
            if machine.is_on:
                machine.end()
        for agent in self._agents.values():
            agent.wait()

    def start(self, *machines: Machine) -> None:
        """Start the line that every machine starts, on these machines or on all."""
        for machine in machines or self.room.machines:
            env = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PYTHON": sys.executable,
                "SCRIPT": "tests/machines/sampled_training.py",
                "SAMPLES": str(self._notes),
                "NNODES": self._num_machines,
                "NPROC_PER_NODE": "1",
                "HEAD": f"{self.room.machines[0].name}:29500",
                "JOIN_S": "1",
                "LOST_S": "6",
                "MAX_RESTARTS": "100",
                "STOP_S": "20",
            }
            if machine.number in self._agents:
                self._agents[machine.number].wait()
            self._agents[machine.number] = machine.start(
                [str(ROOT / "launch/torchrun.sh"), *self._settings], log=self._log(machine), env=env, cwd=ROOT
            )

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Return once a condition holds; fail if that takes too long or all machines are done before."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            over = all(agent.poll() is not None for agent in self._agents.values())
            if (over and not holds()) or time.monotonic() > deadline:
                raise AssertionError(
                    f"the job {'has ended' if over else 'hangs'} at step {self.last_step}\n{self.output}"
                )
            time.sleep(POLL_S)

    def wait_until_step(self, step: int) -> None:
        """Return once the run's log has a step."""
        self.wait_until(lambda: self.last_step >= step)

    def ask_to_stop(self, machine: Machine) -> None:
        """Send SIGTERM to torchrun on one machine, as a scheduler does before it takes that."""
        [agent] = psutil.Process(self._agents[machine.number].pid).children()
        agent.terminate()

    def wait(self, *machines: Machine) -> None:
        """Return once the training is complete, and has ended well on these machines or on all that are on."""
        self.wait_until(lambda: all(agent.poll() is not None for agent in self._agents.values()))
        awaited = [machine.number for machine in machines or self.room.machines if machine.is_on]
        codes = {number: self._agents[number].returncode for number in awaited}
        assert set(codes.values()) == {0}, f"{codes}\n{self.output}"
        assert self.last_step == self.total, self.output

    def has_ended(self, machine: Machine) -> bool:
        """Say whether torchrun has ended on a machine."""
        return self._agents[machine.number].poll() is not None

    @property
    def last_step(self) -> int:
        """The newest step in the run's log; 0 if there is none."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of the run's log that are whole."""
        log = self.run / "log.jsonl"
        text = log.read_text() if log.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def world_size(self) -> int:
        """The number of ranks that trained last; 0 if none did."""
        notes = self._read_notes()
        return max(notes, key=lambda note: note["time"])["world_size"] if notes else 0

    @property
    def output(self) -> str:
        """What the machines have printed last."""
        return "\n".join(f"== {m.name}\n{self.said(m)[-4000:]}" for m in self.room.machines)

    def said(self, machine: Machine) -> str:
        """Return all that a machine has printed."""
        log = self._log(machine)
        return log.read_text(errors="replace") if log.exists() else ""

    def assert_every_sample_was_seen_once(self) -> None:
        """Check, step by step, that all ranks together took the samples that the run's seed says, in that order.

        A step that was done again, because a machine was lost before it was saved, counts as it was done last.
        """
        plan = Plan(seed=3, num_samples=NUM_SAMPLES, global_batch_size=64, epochs=self.epochs)
        assert plan.total_steps == self.total
        last: dict[int, tuple[float, str]] = {}
        taken: dict[tuple[int, str], dict[int, list[list[int]]]] = {}
        for note in self._read_notes():
            step, start = note["step"], note["start"]
            last[step] = max(last.get(step, (0.0, "")), (note["time"], start))
            taken.setdefault((step, start), {})[note["rank"]] = note["keys"]
        for step in range(1, self.total + 1):
            by_rank = taken[step, last[step][1]]
            seen = [tuple(key) for rank in sorted(by_rank) for key in by_rank[rank]]
            epoch, begin, end = plan.bounds(step - 1)
            wanted = epoch_order(plan.seed, epoch, plan.num_samples)[begin:end].tolist()
            assert seen == [(epoch, index) for index in wanted], f"step {step}, by rank {by_rank}"

    def _read_notes(self) -> list[dict[str, Any]]:
        texts = [file.read_text() for file in self._notes.glob("*.jsonl")]
        return [json.loads(line) for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def _log(self, machine: Machine) -> Path:
        return self.room.folder / f"{machine.name}.txt"


def distckpt(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return subprocess.run(
        [sys.executable, "-m", "distckpt.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

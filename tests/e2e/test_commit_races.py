"""Two jobs that commit the same step at the same moment, with nothing that keeps them apart but the storage.

The lease, which would refuse the second job, is put aside: each job saves as a manager does below its lease, and both
stand right before the publish of their manifests when they are told to go on.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from training_job import ROOT

import distckpt
from distckpt import names

NUM_NUMBERS = 64

JOB = """
import sys
import torch
from distckpt.commit import commit
from distckpt.errors import CheckpointExistsError
from distckpt.names import step_name
from distckpt.preparation import SaveRequest, prepare
from distckpt.ranks import Ranks
from distckpt.storage import open_storage
from distckpt.workspace import Workspace

url, job, num_numbers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
storage, ranks, workspace = open_storage(url), Ranks(timeout_s=60), Workspace()

def meet():
    print("ready", flush=True)
    sys.stdin.readline()

for step in map(int, iter(sys.stdin.readline, "")):
    request = SaveRequest(step=step, folder=step_name(step), run=f"job-{job}", layout="sharded")
    state = {"weight": torch.full((num_numbers,), float(job)), "step": step}
    save = prepare(state, request, ranks=ranks, storage=storage, workspace=workspace)
    try:
        commit(save, ranks=ranks, storage=storage, insist=meet)
        print("won", save.attempt, flush=True)
    except CheckpointExistsError as error:
        print("lost", str(error).splitlines()[0], flush=True)
"""


class Job:
    """A process that saves the steps that it is told; leaving its context ends it."""

    def __init__(self, url: str, number: int, stack: ExitStack) -> None:
        self.process: subprocess.Popen[str] = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", JOB, url, str(number), str(NUM_NUMBERS)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
        )
        stack.callback(self.process.kill)

    def tell(self, line: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"s3://{request.getfixturevalue('s3_bucket')}/run"


@pytest.fixture
def jobs(url: str) -> Iterator[list[Job]]:
    with ExitStack() as stack:
        yield [Job(url, number, stack) for number in range(2)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_races", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_one_of_two_jobs_that_commit_a_step_at_once_wins_and_the_other_is_told_who(
    url: str, jobs: list[Job], num_races: int
) -> None:
    wins = [0, 0]
    for step in range(1, num_races + 1):
        for job in jobs:
            job.tell(step)
        assert [job.hear() for job in jobs] == ["ready", "ready"]
        for job in jobs:
            job.tell("publish")
        said = [job.hear().split(" ", 1) for job in jobs]
        assert sorted(word for word, _ in said) == ["lost", "won"], f"step {step}: {said}"
        winner = [word for word, _ in said].index("won")
        wins[winner] += 1
        attempt, told = said[winner][1], said[1 - winner][1]
        pid, host = jobs[winner].process.pid, re.escape(socket.gethostname())
        assert re.search(rf"by process {pid} on {host}, attempt {attempt}, run job-{winner}\b", told)
        state: dict[str, Any] = {"weight": torch.zeros(NUM_NUMBERS), "step": 0}
        assert distckpt.load(f"{url}/{names.step_name(step)}", state).attempt == attempt
        assert state["weight"].tolist() == [float(winner)] * NUM_NUMBERS
        assert state["step"] == step
    assert sum(wins) == num_races

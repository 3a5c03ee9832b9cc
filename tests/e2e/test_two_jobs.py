"""Two jobs on one directory, as processes that are started, stopped and killed: one owns it, and the other is told."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from training_job import ROOT

from distckpt.leasefiles import look, standing
from distckpt.owner import fate_of
from distckpt.storage import Storage, open_storage

SOON_S = 20.0  # to start Python on a busy machine; a dead owner that is waited for costs the whole of
LONG_S = 600.0
BRIEF_S = 1.0

JOB = """
import sys
from distckpt.errors import DirectoryBusyError
from distckpt.lease import Lease
from distckpt.storage import open_storage

url, duration_s = sys.argv[1:]
storage = open_storage(url)
storage.list()
lease = Lease(storage, duration_s=float(duration_s))
for command in map(str.strip, sys.stdin):
    try:
        if command == "leave":
            lease.release()
        else:
            getattr(lease, command)()
        print("done", flush=True)
    except DirectoryBusyError as error:
        print("refused", repr(str(error)), flush=True)
"""


class Job:
    """A process that does with its lease what it is told."""

    def __init__(self, url: str, *, duration_s: float = LONG_S) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, url, str(duration_s)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, command: str) -> str:
        self.tell(command)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"s3://{request.getfixturevalue('s3_bucket')}/run"


@pytest.fixture
def jobs() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def state(storage: Storage) -> str:
    found = standing(storage)
    assert found is not None
    return found.state


def test_the_second_job_is_told_whose_the_directory_is_and_gets_in_when_it_is_free(url: str, jobs: ExitStack) -> None:
    first, second = jobs.enter_context(Job(url)), jobs.enter_context(Job(url))
    assert first.ask("acquire") == "done"
    told = second.ask("acquire")
    assert re.search(r"belongs to another job: process \d+ on host .*, since 20\d\d-.* UTC\\nFix: ", told)
    assert f"process {first.process.pid} " in told
    assert socket.gethostname() in told
    assert first.ask("check") == "done"
    assert state(open_storage(url)) == "running"
    assert first.ask("leave") == "done"
    assert second.ask("acquire") == "done"


def test_a_job_that_starts_again_after_a_kill_gets_in_at_once(url: str, jobs: ExitStack) -> None:
    dead, next_one = jobs.enter_context(Job(url)), jobs.enter_context(Job(url))
    assert dead.ask("acquire") == "done"
    dead.kill()
    assert state(open_storage(url)) == "unknown"
    begun = time.monotonic()
    assert next_one.ask("acquire") == "done"
    assert time.monotonic() - begun < SOON_S
    assert next_one.ask("check") == "done"


def test_a_job_that_stands_still_is_taken_over_and_told_when_it_goes_on(tmp_path: Path, jobs: ExitStack) -> None:
    url = str(tmp_path / "run")
    still, taker = (jobs.enter_context(Job(url, duration_s=BRIEF_S)) for _ in range(2))
    assert still.ask("acquire") == "done"
    record = look(open_storage(url)).record
    assert record is not None
    still.process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + SOON_S
    while fate_of(record.owner) == "runs":
        assert time.monotonic() < deadline, "it was never stopped"
    assert taker.ask("acquire") == "done"
    still.process.send_signal(signal.SIGCONT)
    told = still.ask("check")
    assert told.startswith("refused")
    assert f"was taken over from this job by process {taker.process.pid} " in told
    assert taker.ask("check") == "done"


def race(jobs: ExitStack, url: str, *, num_jobs: int) -> list[Job]:
    """Let jobs acquire at the same moment; return the one that got it, and the others."""
    contenders = [jobs.enter_context(Job(url)) for _ in range(num_jobs)]
    for contender in contenders:
        assert contender.ask("still_held") == "done", "it is up"
    for contender in contenders:
        contender.tell("acquire")
    said = [contender.hear() for contender in contenders]
    winners = [contender for contender, word in zip(contenders, said, strict=True) if word == "done"]
    assert len(winners) == 1, said
    assert all(word.startswith("refused") for word in said if word != "done")
    return [*winners, *(contender for contender in contenders if contender not in winners)]


def test_of_jobs_that_start_at_once_one_gets_the_directory(url: str, jobs: ExitStack) -> None:
    winner, *_ = race(jobs, url, num_jobs=4)
    assert winner.ask("check") == "done"
    winner.kill()
    heir, *_ = race(jobs, url, num_jobs=3)
    assert heir.ask("check") == "done"
    assert heir.ask("leave") == "done"
    assert len(look(open_storage(url)).files) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_of_jobs_that_start_at_once_one_gets_the_directory_each_time(tmp_path: Path) -> None:
    for _ in range(50):
        with ExitStack() as jobs:
            winner, *_ = race(jobs, str(tmp_path / "run"), num_jobs=3)
            assert winner.ask("check") == "done"

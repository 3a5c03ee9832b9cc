"""A whole training as a user starts it: torchrun, train.py, and the `distckpt` command, as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

ROOT = Path(__file__).parents[2]
END_TIMEOUT_S = 280.0
POLL_S = 0.002


class TrainingJob:
    """A running `torchrun train.py`; leaving its context kills what is left of it.

    Args:
        settings: Arguments of train.py.
        folder: Where it runs, and where its output goes.
        num_ranks: How many ranks.
        max_restarts: How often torchrun starts them again after one has failed.
    """

    def __init__(self, settings: Sequence[str], folder: Path, *, num_ranks: int = 2, max_restarts: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    *launcher,
                    f"--nproc_per_node={num_ranks}",
                    f"--max-restarts={max_restarts}",
                    str(ROOT / "train.py"),
                    *settings,
                ],
                cwd=folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What the job has printed."""
        return self.log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        """Whether torchrun is there."""
        return self._process.poll() is None

    def ranks(self) -> list[psutil.Process]:
        """Return the ranks that are there, in their order."""
        found = {}
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    found[child.environ().get("RANK", "")] = child
        return [found[rank] for rank in sorted(found) if rank]

    def signal(self, number: signal.Signals) -> None:
        """Send torchrun a signal."""
        self._process.send_signal(number)

    def wait_for_end(self) -> str:
        """Wait for the end, whatever it is, and return what the job printed."""
        self._process.wait(END_TIMEOUT_S)
        return self.output

    def wait_until(self, holds: Callable[[], bool], *, or_end: bool = False) -> None:
        """Return once a condition holds; fail if the job ends before, unless that will do, too."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while not holds():
            code = self._process.poll()
            if code is not None and or_end:
                return
            if code is not None or time.monotonic() > deadline:
                raise AssertionError(f"the job (exit code {code}) never came there:\n{self.output}")
            time.sleep(POLL_S)

    def wait(self) -> str:
        """Wait for the end, which must be a success, and return what the job printed."""
        code = self._process.wait(END_TIMEOUT_S)
        assert code == 0, f"exit code {code}:\n{self.output}"
        return self.output

    def terminate(self) -> str:
        """Send SIGTERM to torchrun, as a scheduler does, wait for the end, and return what the job printed.

        torchrun's own exit code is 1 then, whatever its ranks do; it says so if it had to kill one.
        """
        self.signal(signal.SIGTERM)
        self.wait_for_end()
        assert "SIGKILL" not in self.output, self.output
        return self.output

    def kill(self) -> None:
        """End torchrun, every rank and their children with SIGKILL, torchrun first: nobody gets to say goodbye."""
        family: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            family = [root, *root.children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.wait()
        psutil.wait_procs(family, timeout=END_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def train(settings: Sequence[str], folder: Path, *, num_ranks: int = 2) -> str:
    """Train until the end, which must be a success, and return what the job printed."""
    with TrainingJob(settings, folder, num_ranks=num_ranks) as job:
        return job.wait()


def distckpt(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return subprocess.run(
        [sys.executable, "-m", "distckpt.cli", *arguments],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=END_TIMEOUT_S,
        check=False,
    )


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log that are whole."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(folder: Path) -> int:
    """Return the newest step in a run's log; 0 if there is none."""
    return max((int(line["step"]) for line in logged(folder)), default=0)


def _environment() -> dict[str, str]:
    """Return this process's environment, with the repository's own code first."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

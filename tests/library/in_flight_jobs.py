"""What ranks run in the tests of saves that are due by the clock or find another one in flight."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from distckpt import CheckpointManager
from distckpt.interval import Every
from distckpt.pace import Pace
from distckpt.preemption import Preemption
from distckpt.ranks import Ranks
from distckpt.schedule import Schedule
from distckpt.storage import Buffer, Capabilities, FileInfo, Storage


class GatedStorage:
    """A storage that can be made to wait.

    Attributes:
        writing: Puts wait until it is set; so do the following, each until its own gate is.
        publishing: Publishing.
        looking: Listing.
        listed: Handing over what was listed.
        deleting: Deletions.
        reached: Is set by whoever comes to a gate that is closed.
        most_at_once: How many deletions were under way at once, at most.
    """

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        gates = [threading.Event() for _ in range(5)]
        self.writing, self.publishing, self.looking, self.listed, self.deleting = gates
        for gate in gates:
            gate.set()
        self.reached = threading.Event()
        self.most_at_once = 0
        self._num_deleting = 0

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
        self._pass(self.writing)
        return self.inner.put(name, chunks, num_bytes=num_bytes)

    def publish(self, name: str, data: bytes) -> None:
        if not name.startswith("lease/"):
            self._pass(self.publishing)
        self.inner.publish(name, data)

    def list(self, folder: str = "") -> list[FileInfo]:
        if folder == "lease":
            return self.inner.list(folder)
        self._pass(self.looking)
        found = self.inner.list(folder)
        self._pass(self.listed)
        return found

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        if all(name.startswith("lease/") for name in names):
            self.inner.delete(names)
            return
        self._num_deleting += 1
        self.most_at_once = max(self.most_at_once, self._num_deleting)
        self._pass(self.deleting)
        self.inner.delete(names)
        self._num_deleting -= 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _pass(self, gate: threading.Event) -> None:
        if not gate.is_set():
            self.reached.set()
            assert gate.wait(60), "the gate stayed closed"


def gated(ckpt: CheckpointManager) -> GatedStorage:
    """Put gates round a manager's storage; they are open."""
    ckpt._home.storage = ckpt._saver.storage = storage = GatedStorage(ckpt._home.storage)
    return storage


class Recorder:
    """State that knows when it was saved."""

    def __init__(self) -> None:
        self.step = 0
        self.saved: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        self.saved.append(self.step)
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def run_steps(
    directory: str, options: dict[str, Any], *, until: int, together: bool, signalled: dict[int, int]
) -> dict[str, Any]:
    """Run a loop of steps that cost nothing, and return what was saved.

    Args:
        directory: Where to save.
        options: Of the manager.
        until: The last step.
        together: Whether the ranks wait for each other in every step; if not, one may be thousands of steps ahead.
        signalled: After which step a rank gets a signal.
    """
    rank, recorder, done = dist.get_rank(), Recorder(), 0
    with CheckpointManager(directory, rng=False, timeout_s=30, **options) as ckpt:
        for step in ckpt.steps({"recorder": recorder}, until=until):
            if together:
                dist.barrier()
            if signalled.get(rank) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            recorder.step = done = step
        newest = ckpt.latest
        assert newest is not None
        facts = {"saved": recorder.saved, "done": done, "preempted": ckpt.preempted, "newest": newest.step}
        return facts | {"skipped": ckpt.num_skipped}


def save_without_a_pause(directory: str, *, num_saves: int) -> dict[str, Any]:
    """Save by hand, one right after the other, until so many are not skipped; return what was saved and skipped."""
    recorder = Recorder()
    with CheckpointManager(directory, rng=False, timeout_s=30, when_busy="skip") as ckpt:
        while len(recorder.saved) < num_saves:
            recorder.step += 1
            ckpt.save(recorder.step, {"recorder": recorder})
        return {"saved": recorder.saved, "skipped": ckpt.num_skipped}


def refuse_beside_a_slow_rank(directory: str, when_busy: str) -> list[str]:
    """Save twice while rank 1 cannot write, and once more after it has; return what came of each."""
    told = []
    with CheckpointManager(directory, rng=False, timeout_s=30, when_busy=when_busy) as ckpt:  # type: ignore[arg-type]
        gates = gated(ckpt)
        if dist.get_rank() == 1:
            gates.writing.clear()
        for step in (1, 2):
            try:
                ckpt.save(step, {"step": step})
                told.append(f"{ckpt.num_skipped} skipped")
            except RuntimeError as error:
                told.append(f"{type(error).__name__}: {error}")
        gates.writing.set()
        ckpt.wait()
        dist.barrier()
        ckpt.save(3, {"step": 3})
    return told


def due_by_a_clock_of_each_ranks_own(num_steps: int) -> list[tuple[int, bool]]:
    """Ask a schedule after every step; return the steps after which a save was due, and whether one was in flight.

    A step takes a second by rank 0's clock, no time by rank 1's, and a minute by those of the others. Only rank 1 is
    busy.
    """
    rank, now_s = dist.get_rank(), 0.0
    every = Every.of("10s")
    pace = Pace(every, clock=lambda: now_s)
    schedule = Schedule(every, pace=pace, preemption=Preemption(()))
    ranks, found = Ranks(timeout_s=30), []
    for step in range(1, num_steps + 1):
        dist.barrier()
        now_s += {0: 1.0, 1: 0.0}.get(rank, 60.0)
        due = schedule.after(step, ranks, busy=rank == 1)
        if due.save:
            found.append((step, due.busy))
            pace.restart(step)
    return found

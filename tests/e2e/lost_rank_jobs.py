"""What ranks run when one of them is to be killed or stopped, or to raise: saves or restores, until that is felt."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from forked_ranks import Pen

from distckpt import CheckpointManager
from distckpt.errors import DistckptError
from distckpt.manifest import Layout
from distckpt.storage import Buffer, Storage

What = Literal["save", "restore", "between"]
How = Literal["killed", "stopped", "raising"]
START_TIMEOUT_S = 120.0  # until all ranks are up
MOST_ROUNDS = 2000
WIDTH = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One trial.

    Attributes:
        directory: The run's directory.
        what: What all ranks do, again and again, when it happens; "between": it happens to one that does nothing.
        how: What happens.
        victim: To which rank.
        at: At which of the points that this rank passes, counted from 0; or after so many seconds, if it is a float.
        layout: Who writes.
        background: Whether to save on a thread.
        timeout_s: How long ranks wait for each other.
    """

    directory: str
    what: What
    how: How
    victim: int
    at: int | float
    layout: Layout
    background: bool
    timeout_s: float


class Fate:
    """What is to happen to this rank, and when."""

    def __init__(self, trial: Trial, pen: Pen) -> None:
        self._trial, self._pen = trial, pen
        self._num_passed = 0
        self._is_armed = False
        self._lock = threading.Lock()

    def arm(self) -> None:
        """Let it happen from here on."""
        self._is_armed = True
        if isinstance(self._trial.at, float):
            threading.Timer(self._trial.at, self._strike, ["at any moment"]).start()

    def passes(self, point: str) -> None:
        """Count a point; it may be the last one."""
        with self._lock:
            if not self._is_armed or isinstance(self._trial.at, float):
                return
            if (point == "between saves") != (self._trial.what == "between"):
                return
            if self._trial.how == "raising" and threading.current_thread().name == "distckpt-prune":
                return  # a warning, and nothing that the others need to know
            number, self._num_passed = self._num_passed, self._num_passed + 1
        if number == self._trial.at:
            self._strike(point)

    def _strike(self, point: str) -> None:
        self._is_armed = False
        self._pen.tell("struck", point=point)
        if self._trial.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._trial.how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise ArithmeticError("made by the trial")


class FatefulStorage:
    """A storage on which every operation of a save and a restore is a point."""

    def __init__(self, inner: Storage, fate: Fate) -> None:
        self._inner, self._fate = inner, fate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
        def passing() -> Iterator[Buffer]:
            for chunk in chunks:
                self._fate.passes("put a chunk")
                yield chunk

        self._fate.passes("put")
        size = self._inner.put(name, passing(), num_bytes=num_bytes)
        self._fate.passes("have put")
        return size

    def sync(self, names: Iterable[str]) -> None:
        self._inner.sync(names)
        self._fate.passes("have synced")

    def publish(self, name: str, data: bytes) -> None:
        if not name.startswith("lease/"):
            self._fate.passes("publish")
        self._inner.publish(name, data)
        if not name.startswith("lease/"):
            self._fate.passes("have published")

    def list(self, folder: str = "") -> Any:
        if folder != "lease":
            self._fate.passes("list")
        return self._inner.list(folder)

    def read_all(self, name: str, *, limit_bytes: int) -> bytes:
        if not name.startswith("lease/"):
            self._fate.passes("read a manifest")
        return self._inner.read_all(name, limit_bytes=limit_bytes)

    def reading(self, name: str) -> Any:
        self._fate.passes("open a data file")
        return self._inner.reading(name)  # type: ignore[attr-defined]


class Counter:
    """State whose saving and loading are points, too."""

    def __init__(self, fate: Fate) -> None:
        self._fate = fate
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        self._fate.passes("state_dict")
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._fate.passes("load_state_dict")
        self.count = state["count"]


def live(rank: int, pen: Pen, trial: Trial) -> None:
    """Save once, then do the trial's work until it fails; tell how, and that this rank came to its end."""
    fate = Fate(trial, pen)
    state: dict[str, Any] = {
        "weights": torch.arange(WIDTH, dtype=torch.float64),
        "own": torch.full((7,), float(rank)),
        "counter": Counter(fate),
    }
    with managed(replace(trial, timeout_s=START_TIMEOUT_S), fate) as ckpt:
        ckpt.save(1, state)
        ckpt.wait()
    dist.barrier()
    if rank == trial.victim:
        fate.arm()
    try:
        (restores if trial.what == "restore" else saves)(rank, trial, state, fate, pen)
    except DistckptError as error:
        named = getattr(error, "missing", None) or [getattr(error, "rank", None)]
        pen.tell("raised", named=named, error=type(error).__name__, text=str(error))
    except ArithmeticError:  # its own, outside of what all ranks do together
        pen.tell("raised", named=[rank], error="ArithmeticError", text="")
    pen.tell("left")


def managed(trial: Trial, fate: Fate) -> CheckpointManager:
    """Return a manager whose storage has points."""
    ckpt = CheckpointManager(
        trial.directory,
        layout=trial.layout,
        background=trial.background,
        timeout_s=trial.timeout_s,
        rng=False,
        signals=(),
    )
    ckpt._home.storage = ckpt._saver.storage = FatefulStorage(ckpt._home.storage, fate)  # type: ignore[assignment]
    return ckpt


def saves(rank: int, trial: Trial, state: dict[str, Any], fate: Fate, pen: Pen) -> None:
    """Save again and again."""
    with managed(trial, fate) as ckpt:
        for step in range(2, MOST_ROUNDS):
            if trial.what == "between" and rank == trial.victim:
                fate.passes("between saves")
            pen.tell("entered", step=step)
            state["counter"].count = step
            ckpt.save(step, state)
            if not trial.background or step % 2:
                ckpt.wait()


def restores(rank: int, trial: Trial, state: dict[str, Any], fate: Fate, pen: Pen) -> None:
    """Restore again and again, each time as a job does that has just started."""
    for number in range(MOST_ROUNDS):
        with managed(trial, fate) as ckpt:
            pen.tell("entered", number=number)
            assert ckpt.restore(state) == 1

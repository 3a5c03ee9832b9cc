"""distckpt, and the raw copy and write that it cannot beat."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distckpt
from benchmarks.ceilings import MemoryCopy, RawBytes
from benchmarks.states import State
from benchmarks.team import Team

KEEP_ALL = 1_000_000  # a save is then durable when `wait` returns: there is nothing to prune after it


class WrongStepError(Exception):
    """A restore that took another checkpoint than the one that was meant."""


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's path names."""
    return int(path.name.removeprefix("step-"))


class Distckpt:
    """distckpt's manager, which keeps what it needs for the next save; a load is the restore of a job that restarts."""

    def __init__(self, state: State, team: Team) -> None:
        self._state = state
        self._managers: dict[Path, distckpt.CheckpointManager] = {}

    def save(self, path: Path) -> None:
        """Save as the manager's next checkpoint, which then stands at `path`."""
        manager = self._managers.get(path.parent)
        if manager is None:
            self.close()
            manager = distckpt.CheckpointManager(path.parent, background=False, keep=KEEP_ALL, signals=())
            self._managers[path.parent] = manager
        manager.save(step_of(path), self._state.objects)

    def load(self, path: Path) -> None:
        """Find the newest checkpoint with a new manager and restore it, with every digest checked.

        Raises:
            WrongStepError: The newest is not the one at `path`.
        """
        with distckpt.CheckpointManager(path.parent, signals=()) as manager:
            found = manager.restore(self._state.objects)
        if found != step_of(path):
            raise WrongStepError(f"step {found} was restored, not {step_of(path)}")

    def other_loads(self) -> dict[str, Callable[[Path], object]]:
        """Return `distckpt.load`, which is told the checkpoint."""
        return {"distckpt load": lambda path: distckpt.load(path, self._state.objects)}

    def close(self) -> None:
        """Close the managers."""
        for manager in self._managers.values():
            manager.close()
        self._managers.clear()


class DistckptInBackground:
    """distckpt's manager with its defaults, in a job that has asked it for what there is to restore.

    Args:
        state: What it saves.
        team: The ranks.
        prewarm: Whether it makes its buffers before the first save.
        settings: For the manager.

    Raises:
        NotImplementedError: This version of distckpt does not have the setting, or it does not matter here.
    """

    def __init__(self, state: State, team: Team, *, prewarm: bool = False, **settings: Any) -> None:
        known = inspect.signature(distckpt.CheckpointManager).parameters
        missing = [name for name in settings if name not in known]
        if missing:
            raise NotImplementedError(f"this distckpt's CheckpointManager has no setting {missing[0]!r}")
        if prewarm and not hasattr(distckpt.CheckpointManager, "prewarm"):
            raise NotImplementedError("this distckpt's CheckpointManager has no `prewarm`")
        if "overlap" in settings and state.device != "cuda":
            raise NotImplementedError("only copies from a GPU overlap with training")
        self._state = state
        self._prewarm = prewarm
        self._settings = settings
        self._manager: distckpt.CheckpointManager | None = None

    def prepare(self, directory: Path) -> None:
        """Make the manager, let it look for a checkpoint, and prewarm it if that is what is measured."""
        self._manager = distckpt.CheckpointManager(directory, keep=KEEP_ALL, signals=(), **self._settings)
        self._manager.restore(self._state.objects)
        if self._prewarm:
            getattr(self._manager, "prewarm")(self._state.objects)  # noqa: B009  older versions do not have it

    def start(self, path: Path) -> None:
        """Save as the manager's next checkpoint, which then stands at `path`."""
        assert self._manager is not None  # `prepare` is called first
        self._manager.save(step_of(path), self._state.objects)

    def finish(self) -> None:
        """Wait for the commit."""
        if self._manager is not None:
            self._manager.wait()

    def close(self) -> None:
        """Close the manager."""
        if self._manager is not None:
            self._manager.close()


class RawCopyAndWrite:
    """The ceiling: one memory copy, then one direct write on a thread; no format, no digest, no commit."""

    def __init__(self, state: State, team: Team) -> None:
        tensors = list(state.tensors().values())
        self._copy = MemoryCopy(tensors)
        self._copy.copy()
        self._bytes = RawBytes(state.num_bytes // team.world_size)
        self._rank = team.rank
        self._path = Path()

    def prepare(self, directory: Path) -> None:
        """Have nothing to prepare."""

    def start(self, path: Path) -> None:
        """Copy."""
        path.mkdir(exist_ok=True)
        self._path = path / f"rank-{self._rank}"
        self._copy.copy()

    def finish(self) -> None:
        """Write."""
        self._bytes.write_direct(self._path)

    def close(self) -> None:
        """Hold nothing."""

"""What ranks run in the trials in which a disk is full: a save that cannot be, and what comes after it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from forked_ranks import Pen

import distckpt
from distckpt import CheckpointManager
from distckpt.errors import DistckptError
from distckpt.manifest import Layout
from distckpt.names import step_name
from distckpt.storage import Buffer, Storage

When = Literal["before", "put", "chunk", "synced", "publish"]
WIDTH = 131_072  # float64: a megabyte
STATE_BYTES = 8 * WIDTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One trial.

    Attributes:
        disk: Where the small file system is mounted.
        when: When somebody fills it: before the save, or when a rank is about to write its file, or is in the midst of
            it, or has written it, or is about to publish the manifest.
        leave_bytes: How much is left free then.
        num_ranks: How many ranks there are.
        layout: Who writes.
        background: Whether to save on a thread.
    """

    disk: str
    when: When
    leave_bytes: int
    num_ranks: int
    layout: Layout
    background: bool

    @property
    def directory(self) -> str:
        """The run's directory."""
        return f"{self.disk}/run"


class FillingStorage:
    """A storage whose disk somebody fills when it comes to some point."""

    def __init__(self, inner: Storage, trial: Trial) -> None:
        self._inner, self._trial = inner, trial
        self.is_armed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def room(self) -> Any:
        return self._inner.room()  # type: ignore[attr-defined]

    def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
        def passing() -> Iterator[Buffer]:
            for number, chunk in enumerate(chunks):
                if number == 1:
                    self._reach("chunk")
                yield chunk

        self._reach("put")
        # Room that is reserved cannot be taken away any more, so there the file system has no such thing.
        return self._inner.put(name, passing(), num_bytes=None if self._trial.when == "chunk" else num_bytes)

    def sync(self, names: Iterable[str]) -> None:
        self._inner.sync(names)
        self._reach("synced")

    def publish(self, name: str, data: bytes) -> None:
        if not name.startswith("lease/"):
            self._reach("publish")
        self._inner.publish(name, data)

    def _reach(self, when: When) -> None:
        if self.is_armed and when == self._trial.when:
            self.is_armed = False
            fill(self._trial)


def fill(trial: Trial) -> None:
    """Leave so many bytes of the disk free; where two ranks do so at once, one of them is enough."""
    status = os.statvfs(trial.disk)
    size = status.f_bavail * status.f_frsize - trial.leave_bytes
    if size > 0:
        fd = os.open(f"{trial.disk}/filler-{os.getpid()}", os.O_WRONLY | os.O_CREAT)
        with suppress(OSError):
            os.posix_fallocate(fd, 0, size)
        os.close(fd)


def content(step: int) -> dict[str, Any]:
    return {"weights": torch.full((WIDTH,), float(step), dtype=torch.float64), "step": step}


def is_content(state: dict[str, Any], step: int) -> bool:
    return state["step"] == step and bool((state["weights"] == step).all())


def live(rank: int, pen: Pen, trial: Trial) -> None:
    """Save, fail to save, load what was saved, and save again once there is room; tell of each."""
    manager = CheckpointManager(
        trial.directory, layout=trial.layout, background=trial.background, timeout_s=60, rng=False, signals=()
    )
    manager._home.storage = manager._saver.storage = storage = FillingStorage(manager._home.storage, trial)  # type: ignore[assignment]
    with manager as ckpt:
        ckpt.save(1, content(1))
        ckpt.wait()
        dist.barrier()
        storage.is_armed = True
        if trial.when == "before" and rank == 0:
            fill(trial)
        dist.barrier()
        try:
            ckpt.save(2, content(2))
            ckpt.wait()
            pen.tell("saved")
        except DistckptError as error:
            pen.tell("failed", error=type(error).__name__, text=str(error), errno=getattr(error, "errno", None))
        storage.is_armed = False
        dist.barrier()
        pen.tell("left", names=left(trial))
        older = content(0)
        distckpt.load(f"{trial.directory}/{step_name(1)}", older, rng=False, timeout_s=60)
        pen.tell("older", good=is_content(older, 1))
        dist.barrier()
        for filler in Path(trial.disk).glob("filler-*"):
            filler.unlink(missing_ok=True)
        dist.barrier()
        ckpt.save(3, content(3))
        ckpt.wait()
        newest = content(0)
        step = ckpt.restore(newest)
        pen.tell("again", step=step, good=is_content(newest, 3))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(trial.directory)


def left(trial: Trial) -> list[str]:
    """Return what lies in the run's directory beside its lease and the first checkpoint, empty folders included."""
    root = Path(trial.directory)
    names = [str(path.relative_to(root)) for path in sorted(root.rglob("*"))]
    return [name for name in names if name.partition("/")[0] not in ("lease", step_name(1))]

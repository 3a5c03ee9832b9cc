"""Events: what happens to a run's checkpoints, one frozen fact each; and `EventLog`, the file that keeps them.

`docs/events.md` holds the same as a table, and the tests compare the two.
Invariant: an event says what has happened, and nobody who is told of it can change that; no failure to write one
reaches the training.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from distckpt.manifest import Layout
from distckpt.outcome import Ending
from distckpt.values import Json

__all__ = [
    "Callback",
    "Ended",
    "Evaluated",
    "Event",
    "EventLog",
    "Preempted",
    "Pruned",
    "Quarantined",
    "Restored",
    "SaveFailed",
    "SaveSkipped",
    "Saved",
    "Started",
    "Trained",
]

logger = logging.getLogger("distckpt")

MAX_TEXT_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a run.

    Attributes:
        kind: What it is, in one word; each class has its own.
        time: When it happened, in seconds since 1970, by the clock of rank 0's host.
        job: Which job of the run it happened in: a short name, new for each start.
        step: The step that it is about, in optimizer steps completed; None if it is about none.
    """

    kind: ClassVar[str] = ""
    time: float = field(default_factory=time.time)
    job: str = ""
    step: int | None = None

    @property
    def figures(self) -> dict[str, float]:
        """What can be drawn as a curve: every number of this event, as "saved/stall_s" or "val/loss"."""
        own = self._own()
        names = {name: name if "/" in name else f"{self.kind}/{name}" for name in own}
        return {names[name]: value for name, value in own.items() if type(value) in (int, float)}

    def to_json(self) -> dict[str, Json]:
        """Return this as plain JSON values: the four that every event has, then its own."""
        head = {"time": round(self.time, 6), "job": self.job, "kind": self.kind, "step": self.step}
        return {**head, **{name: _plain(value) for name, value in self._own().items()}}

    def _own(self) -> dict[str, Any]:
        """Return what only this kind has."""
        return {name: getattr(self, name) for name in own_names(type(self))}


def own_names(kind: type[Event]) -> list[str]:
    """Return the names of what a kind of event has beyond what all have."""
    common = {each.name for each in dataclasses.fields(Event)}
    return [each.name for each in dataclasses.fields(kind) if each.name not in common]


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """A job has begun to work with the run's directory.

    Attributes:
        world_size: Its number of ranks.
        host: The host of its rank 0.
        pid: Its rank 0's process on that host.
        directory: The run's directory, as a path or URL without credentials.
        version: distckpt's version.
    """

    kind: ClassVar[str] = "started"
    world_size: int
    host: str
    pid: int
    directory: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored(Event):
    """A restore has ended; at step 0, with 0 bytes, if there was nothing to restore.

    Attributes:
        seconds: How long it took, on rank 0.
        num_bytes: The checkpoint's size.
        memory_bytes: What all ranks together have read of its data files from the memory tier.
        storage_bytes: And from the storage.
    """

    kind: ClassVar[str] = "restored"
    seconds: float
    num_bytes: int
    memory_bytes: int = 0
    storage_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined(Event):
    """The checkpoint of `step` is damaged, and is passed over.

    Attributes:
        reason: What is wrong with it, and whether it could be put aside.
    """

    kind: ClassVar[str] = "quarantined"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(Event):
    """The checkpoint of `step` is committed.

    Attributes:
        stall_s: How long the training stood still for it, on rank 0.
        write_s: How long it took to write and commit, from host memory on.
        durable_s: How long it took in all, from the call to the commit.
        num_bytes: Its size, over all ranks.
        world_size: How many ranks saved it.
        layout: Who wrote.
    """

    kind: ClassVar[str] = "saved"
    stall_s: float
    write_s: float
    durable_s: float
    num_bytes: int
    world_size: int
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(Event):
    """The save of `step` failed, on whatever rank; there is no such checkpoint.

    Attributes:
        error: The class of the exception.
        reason: The first line of its message.
    """

    kind: ClassVar[str] = "save_failed"
    error: str
    reason: str

    @classmethod
    def of(cls, error: BaseException, *, step: int) -> SaveFailed:
        """Return the event of a save that `error` ended."""
        return cls(step=step, error=type(error).__name__, reason=first_line(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSkipped(Event):
    """The save of `step` was skipped, as another one was still being written.

    Attributes:
        in_flight: That one's step.
    """

    kind: ClassVar[str] = "save_skipped"
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned(Event):
    """The retention deleted checkpoints; `step` is the newest one that it knew of.

    Attributes:
        steps: Their steps, oldest first.
        num_bytes: Their size in all.
    """

    kind: ClassVar[str] = "pruned"
    steps: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted(Event):
    """The job was asked to stop, and all ranks agreed to do so after `step`.

    Attributes:
        signal: The signal that asked first, on whatever rank, such as "SIGTERM"; None if it was no signal.
        left_s: How much time was left then, on the rank that had least; None if nobody knows.
        choice: What was decided, and on what grounds, in words.
    """

    kind: ClassVar[str] = "preempted"
    signal: str | None
    left_s: float | None
    choice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Event):
    """The job is over; one that was killed says nothing. `step` is the newest that it saved or restored.

    Attributes:
        ending: "complete", "preempted" or "failed", as in `distckpt ls`.
        reason: Why it failed; None if it did not.
    """

    kind: ClassVar[str] = "ended"
    ending: Ending
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained(Event):
    """The trainer has logged `step`: the figures of its line in `log.jsonl`, and the rate.

    Attributes:
        epoch: The epoch, from 1.
        loss: The mean loss of the step's samples.
        lr: The learning rate.
        samples: Samples seen since the run's beginning.
        samples_per_s: Samples per second since the step that was logged before.
        grad_norm: The gradients' norm before they were clipped; None if they are not.
    """

    kind: ClassVar[str] = "train"
    epoch: int
    loss: float
    lr: float
    samples: int
    samples_per_s: float
    grad_norm: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """The trainer has evaluated the model after `step`.

    Attributes:
        epoch: The epochs done.
        metrics: "val/loss", "val/top1", "val/top5"; each stands by itself in `figures` and `to_json`.
    """

    kind: ClassVar[str] = "eval"
    epoch: int
    metrics: Mapping[str, float]

    def _own(self) -> dict[str, Any]:
        return {"epoch": self.epoch, **self.metrics}


Callback = Callable[[Event], None]


class EventLog:
    """A callback that appends each event to a file, as one line of JSON.

    The file is history: it is never rewritten, and whoever starts again appends to it.
    Unlike other callbacks, it is told of an event at once, on the thread where that happened, so that a kill loses
    nothing that had happened before. If it cannot write, it warns once, and goes on trying.

    Args:
        path: The file; folders above it are made when the first event comes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._turn = threading.Lock()
        self._has_warned = False

    def __call__(self, event: Event) -> None:
        """Append an event; it is in the file, though not yet on disk, when this returns."""
        line = json.dumps(event.to_json(), allow_nan=False).encode() + b"\n"
        with self._turn:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("ab+", buffering=0) as file:
                    if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                        line = b"\n" + line  # what a kill has left of a line stays by itself
                    if file.write(line) != len(line):
                        raise OSError("only a part of the line could be written")
            except OSError as error:
                if not self._has_warned:
                    self._has_warned = True
                    logger.warning("events are not logged: could not write %s: %s", self._path, error)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, of a length that fits a log."""
    return str(error).partition("\n")[0][:MAX_TEXT_CHARS]


def _plain(value: Any) -> Json:
    """Return a fact as JSON knows it; null for a number that it does not."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value

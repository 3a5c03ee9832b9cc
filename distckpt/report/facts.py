"""What happened in a run, as plain data: all that the page shows, and nothing about how it looks.

Invariant: pure; the same storage, logs and moment give the same facts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distckpt.catalog import Checkpoint
from distckpt.inventory import Found
from distckpt.leasefiles import Standing
from distckpt.report.evaluations import EvaluationRecord
from distckpt.report.history import Row, Save, retention_of, rows_of, saves_of
from distckpt.report.jobs import Ending, Job, jobs_by_checkpoints, jobs_of
from distckpt.report.records import Event, Logs, Point
from distckpt.retention import Retention

MarkKind = Literal["restart", "preemption", "damage", "failure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that happened at a step, other than progress.

    Attributes:
        step: The step.
        kind: What it was.
        text: What there is to say of it.
    """

    step: int
    kind: MarkKind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A run.

    Attributes:
        name: The run's name.
        url: Its directory.
        made: When this was gathered, in seconds since 1970.
        state: How its latest job stands.
        reason: Why it ended like that, in a few words.
        step: Optimizer steps completed, as far as anything says.
        total_steps: How many there are to be; None if nobody said.
        jobs: Its jobs, first one first.
        has_events: Whether an event log tells of them, rather than the checkpoints that are left.
        saves: Its saves, oldest first.
        rows: The checkpoints that are there, and those that were, oldest first.
        retention: Which are kept; None if nobody said.
        marks: What else happened, by step.
        curves: What was measured, by name.
        evaluation: The last evaluation by class; None if there is none.
        versions: Of distckpt, torch and Python, at the newest checkpoint.
        config: The run's configuration, if the newest checkpoint has one.
    """

    name: str
    url: str
    made: float
    state: Ending
    reason: str | None = None
    step: int | None = None
    total_steps: int | None = None
    jobs: tuple[Job, ...] = ()
    has_events: bool = False
    saves: tuple[Save, ...] = ()
    rows: tuple[Row, ...] = ()
    retention: Retention | None = None
    marks: tuple[Mark, ...] = ()
    curves: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    evaluation: EvaluationRecord | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None

    @property
    def kept(self) -> list[Row]:
        """The checkpoints that can be restored."""
        return [row for row in self.rows if row.fate == "kept"]

    @property
    def restarts(self) -> int:
        """How often the training was started again."""
        return max(0, len(self.jobs) - 1)


def gather(found: Sequence[Found], standing: Standing | None, logs: Logs, *, url: str, now: float) -> Facts:
    """Return what the checkpoints of a run, its lease and its logs say together.

    Args:
        found: What lies in the run's directory.
        standing: How its latest job stands; None if nobody said.
        logs: Its local logs.
        url: Its directory.
        now: The present, in seconds since 1970.
    """
    checkpoints = [one.checkpoint for one in found if one.checkpoint is not None]
    newest = max(checkpoints, key=lambda one: one.step, default=None)
    jobs = jobs_of(logs.events, standing) or jobs_by_checkpoints(checkpoints, standing)
    config = newest.config if newest else None
    retention = retention_of(config)
    saves = saves_of(logs.events, found)
    resumed_from = jobs[-1].first_step if jobs else None
    return Facts(
        name=_name(url, newest),
        url=url,
        made=now,
        state=jobs[-1].ending if jobs else "unknown",
        reason=jobs[-1].reason if jobs else None,
        step=_step(checkpoints, logs),
        total_steps=_total_steps(config),
        jobs=tuple(jobs),
        has_events=bool(logs.events),
        saves=tuple(saves),
        rows=tuple(rows_of(logs.events, found, saves, retention=retention, resumed_from=resumed_from, now=now)),
        retention=retention,
        marks=tuple(_marks(logs.events, jobs)),
        curves=logs.curves or _curves_by_checkpoints(checkpoints),
        evaluation=logs.evaluation,
        versions=newest.versions if newest else {},
        config=config,
    )


def _name(url: str, newest: Checkpoint | None) -> str:
    """Return the last name of the directory: people know a run by it."""
    return url.rstrip("/").rpartition("/")[2] or (newest.run if newest else "") or url


def _step(checkpoints: Sequence[Checkpoint], logs: Logs) -> int | None:
    steps = [checkpoint.step for checkpoint in checkpoints]
    steps += [points[-1][0] for points in logs.curves.values() if points]
    return max(steps, default=None)


def _total_steps(config: Mapping[str, Any] | None) -> int | None:
    """Return the number of steps that the trainer's configuration asks for."""
    try:
        train, dataset = (config or {})["train"], (config or {})["dataset"]
        total = int(train["epochs"] * -(-dataset["num_train"] // train["global_batch_size"]))
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    return total if 0 < total < 1 << 53 else None


def _curves_by_checkpoints(checkpoints: Sequence[Checkpoint]) -> dict[str, tuple[Point, ...]]:
    """Return what was measured at the checkpoints that are left."""
    curves: dict[str, list[Point]] = {}
    for checkpoint in sorted(checkpoints, key=lambda one: one.step):
        for name, value in checkpoint.metrics.items():
            curves.setdefault(name, []).append((checkpoint.step, value))
    return {name: tuple(points) for name, points in curves.items()}


def _marks(events: Sequence[Event], jobs: Sequence[Job]) -> list[Mark]:
    """Return what happened at which step."""
    marks = [
        Mark(step=job.first_step, kind="restart", text=f"job {job.number} went on from here; {_end_text(before)}")
        for before, job in itertools.pairwise(jobs)
        if job.first_step is not None
    ]
    for event in events:
        if event.step is None:
            continue
        match event.kind:
            case "preempted":
                marks.append(Mark(step=event.step, kind="preemption", text=_preemption_text(event)))
            case "quarantined":
                text = f"checkpoint put aside: {event.text('reason') or 'damaged'}"
                marks.append(Mark(step=event.step, kind="damage", text=text))
            case "save_failed":
                text = f"save failed: {event.text('reason') or event.text('error') or 'nobody said why'}"
                marks.append(Mark(step=event.step, kind="failure", text=text))
    for job in jobs:
        if job.ending == "failed" and job.last_step is not None:
            text = f"job {job.number} failed: {job.reason or 'nobody said why'}"
            marks.append(Mark(step=job.last_step, kind="failure", text=text))
    return sorted(marks, key=lambda mark: mark.step)


def _end_text(job: Job) -> str:
    words = {"killed": "was killed", "unknown": "ended", "complete": "was complete", "running": "is running"}
    return f"job {job.number} {words.get(job.ending, 'had failed' if job.ending == 'failed' else 'was preempted')}"


def _preemption_text(event: Event) -> str:
    signal, choice = event.text("signal"), event.text("choice")
    return f"preempted{f' by {signal}' if signal else ''}{f': {choice}' if choice else ''}"

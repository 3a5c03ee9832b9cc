"""What the local logs of a run say: `events.jsonl`, `log.jsonl` and `evaluation.json`.

Invariant: files are read as they are found, cut off, damaged or hostile: what makes no sense is left out, and nothing
raises for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from distckpt.errors import StorageError
from distckpt.logfolder import EVALUATION_NAME, EVENTS_NAME, LOG_NAME
from distckpt.report.evaluations import EvaluationRecord, parse_evaluation

MOST_TEXT_CHARS = 500
_NO_CURVES = frozenset({"kind", "step", "epoch", "samples", "time"})
_MOST_CURVES = 40  # a log of the trainer's has five

Point = tuple[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of the event log.

    Attributes:
        time: When, in seconds since 1970.
        job: The name of the process's job.
        kind: What happened.
        step: The step that it is about; None if it is about none.
        facts: What else the line says, unchecked.
    """

    time: float
    job: str
    kind: str
    step: int | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def number(self, key: str) -> float | None:
        """Return a fact that is a number from 0 on; None if it is not there, or is something else."""
        value = self.facts.get(key)
        return float(value) if _is_number(value) and value >= 0 else None

    def whole(self, key: str) -> int | None:
        """Return a fact that is a whole number from 0 on; None if it is not there, or is something else."""
        value = self.facts.get(key)
        return value if _is_step(value) else None

    def text(self, key: str) -> str | None:
        """Return a fact that is text, cut to a bearable length; None if it is not there, or is something else."""
        value = self.facts.get(key)
        return value[:MOST_TEXT_CHARS] if isinstance(value, str) and value else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """What a run's local folder holds.

    Attributes:
        folder: Where it lies.
        events: What happened, oldest first.
        curves: What was measured, by name ("train/loss", "val/top1"): points (step, value), by step; NaN where a
            number was not finite.
        evaluation: The last evaluation of a classifier; None if there is none.
    """

    folder: Path
    events: tuple[Event, ...] = ()
    curves: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
    evaluation: EvaluationRecord | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it."""
        return not (self.events or self.curves or self.evaluation)


def read_logs(folder: Path) -> Logs:
    """Return what the logs in a folder say; a file that is not there says nothing.

    Raises:
        StorageError: A file is there, and cannot be read.
    """
    return Logs(
        folder=folder,
        events=tuple(sorted(_events(folder / EVENTS_NAME), key=lambda event: event.time)),
        curves=_curves(folder / LOG_NAME),
        evaluation=_evaluation(folder / EVALUATION_NAME),
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each line that is a JSON object."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(found, dict):
                    yield found
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> StorageError:
    fix = "give a folder that can be read: --log-dir DIR"
    return StorageError(path=str(path), action="read", cause=str(error.strerror), errno=error.errno, fix=fix)


def _events(path: Path) -> Iterator[Event]:
    for line in _lines(path):
        time, job, kind, step = line.get("time"), line.get("job"), line.get("kind"), line.get("step")
        if not _is_number(time) or not 0 <= time < 1e11 or not isinstance(kind, str):
            continue
        yield Event(
            time=float(time),
            job=str(job)[:MOST_TEXT_CHARS],
            kind=kind,
            step=step if _is_step(step) else None,
            facts=line,
        )


def _curves(path: Path) -> dict[str, tuple[Point, ...]]:
    """Return each number that the lines state, by its name; of a step that stands there twice, the later line's."""
    curves: dict[str, dict[int, float]] = {}
    for line in _lines(path):
        step, kind = line.get("step"), line.get("kind")
        if not _is_step(step):
            continue
        for key, value in line.items():
            if key in _NO_CURVES or not (value is None or _is_number(value)):
                continue
            name = (key if "/" in key else f"{kind}/{key}")[:MOST_TEXT_CHARS]
            if name in curves or len(curves) < _MOST_CURVES:
                curves.setdefault(name, {})[step] = math.nan if value is None else float(value)
    return {name: tuple(sorted(points.items())) for name, points in curves.items()}


def _evaluation(path: Path) -> EvaluationRecord | None:
    try:
        return parse_evaluation(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_step(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 53

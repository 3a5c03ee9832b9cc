"""Retention: which checkpoints of a run to keep. Pure decisions; the catalog carries them out.

Invariant: the newest checkpoint, the one that the run resumed from, those that branches went off from, and pinned ones
are always kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

from distckpt.errors import ConfigError


class Candidate(Protocol):
    """What retention needs to know of a committed checkpoint."""

    @property
    def step(self) -> int:
        """Optimizer steps completed."""
        ...

    @property
    def created(self) -> float:
        """When it was committed, in seconds since 1970."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """What was measured at this step."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints to keep: those that any of the rules names.

    Attributes:
        last: Keep the newest so many; at least 1.
        best: Keep the so many with the best `metric`.
        metric: The metric that `best` looks at, such as "val/loss".
        mode: Whether a small ("min") or a large ("max") metric is good.
        every: Keep those whose step is a multiple of this.
        within_s: Keep those committed within the last so many seconds.

    Raises:
        ConfigError: A value is out of range, or `best` is asked for without a metric.
    """

    last: int = 3
    best: int = 0
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    every: int | None = None
    within_s: float | None = None

    def __post_init__(self) -> None:
        """Refuse what would keep nothing, or makes no sense."""
        if type(self.last) is not int or self.last < 1:
            raise ConfigError(
                source="Retention.last", problem=f"must be at least 1, is {self.last!r}", fix="Retention(last=3)"
            )
        if type(self.best) is not int or self.best < 0:
            raise ConfigError(source="Retention.best", problem=f"must be 0 or more, is {self.best!r}")
        if self.best and not self.metric:
            raise ConfigError(
                source="Retention.best",
                problem="needs the name of a metric",
                fix=f'Retention(best={self.best}, metric="val/loss", mode="min")',
            )
        if self.mode not in ("min", "max"):
            raise ConfigError(source="Retention.mode", problem=f'must be "min" or "max", is {self.mode!r}')
        if self.every is not None and (type(self.every) is not int or self.every < 1):
            raise ConfigError(source="Retention.every", problem=f"must be at least 1 step, is {self.every!r}")
        if self.within_s is not None and not self.within_s >= 0:
            raise ConfigError(source="Retention.within_s", problem=f"must be 0 s or more, is {self.within_s!r}")

    @classmethod
    def of(cls, keep: int | Retention) -> Retention:
        """Return `keep` as a Retention: an int means `last`."""
        return keep if isinstance(keep, cls) else cls(last=keep)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What retention does with one checkpoint.

    Attributes:
        step: The checkpoint's step.
        reasons: Why it is kept; empty if it goes.
    """

    step: int
    reasons: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Whether it stays."""
        return bool(self.reasons)


def decide(
    checkpoints: Sequence[Candidate],
    retention: Retention,
    *,
    now: float,
    resumed_from: int | None = None,
    pinned: Collection[int] = (),
    branches: Mapping[int, Sequence[str]] = MappingProxyType({}),
) -> list[Decision]:
    """Return what happens to each committed checkpoint, oldest first.

    Args:
        checkpoints: The committed ones, in any order.
        retention: The rules.
        now: The present, in seconds since 1970.
        resumed_from: The step that the run resumed from.
        pinned: Steps that a user has pinned.
        branches: By step, the names of the branches that went off there.
    """
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    best = _best(ordered, retention)
    decisions = []
    for age, checkpoint in enumerate(reversed(ordered)):
        step = checkpoint.step
        rules = {
            "newest": age == 0,
            f"last {retention.last}": age < retention.last,
            f"best {retention.best} by {retention.metric}": step in best,
            f"every {retention.every} steps": retention.every is not None and step % retention.every == 0,
            f"within {retention.within_s or 0:g} s": retention.within_s is not None
            and now - checkpoint.created <= retention.within_s,
            "the run resumed from it": step == resumed_from,
            f"{', '.join(branches.get(step, ()))} went off from it": bool(branches.get(step)),
            "pinned": step in pinned,
        }
        decisions.append(Decision(step=step, reasons=tuple(reason for reason, holds in rules.items() if holds)))
    return decisions[::-1]


def _best(checkpoints: Sequence[Candidate], retention: Retention) -> set[int]:
    """Return the steps of the best; of equal ones the newer is the better. NaN is never good."""
    if not retention.best or retention.metric is None:
        return set()
    sign = 1 if retention.mode == "min" else -1
    rated = [
        (sign * value, -checkpoint.step)
        for checkpoint in checkpoints
        if (value := checkpoint.metrics.get(retention.metric)) is not None and not math.isnan(value)
    ]
    return {-negative_step for _, negative_step in sorted(rated)[: retention.best]}

"""Targets: what distckpt should reach in a run, whether it did, and who of its peers was ahead of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.rounds import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the table.

    Attributes:
        title: What stands above it.
        measure: The measure that it shows.
        ceiling: The contenders and measures of which the best is the ceiling; empty if there is none.
        against: What stands above the ratio to it.
        scale: What a value is multiplied by.
        target: The most that distckpt's ratio, or its value where there is no ceiling, may be; None sets no target.
        aim: What it should be.
        figure: What a list of targets calls it.
        of: Who has to reach it, if not all of the report's own contenders.
    """

    title: str
    measure: str
    ceiling: Sequence[tuple[str, str]] = ()
    against: str = "x ceiling"
    scale: float = 1.0
    target: float | None = None
    aim: float | None = None
    figure: str = ""
    of: Sequence[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of one target.

    Attributes:
        contender: Whose figure it is.
        figure: What was measured.
        value: The median, in the measure's own unit; None if the run was too noisy, or the contender has none.
        ratio: What the target is compared with; the value itself where there is no ceiling.
        target: The most that it may be.
        aim: What it should be.
        best_peer: The peer with the least value in the same run.
        against_peer: The contender's value over that peer's, in the same rounds.
    """

    contender: str
    figure: str
    value: float | None
    ratio: float | None
    target: float
    aim: float | None
    best_peer: str | None
    against_peer: float | None

    @property
    def word(self) -> str:
        """The target's fate in a word."""
        if self.ratio is None:
            return "no number"
        if self.ratio > self.target:
            return "BEHIND"
        return "reached" if self.aim is None or self.ratio > self.aim else "aim reached"

    @property
    def place(self) -> str:
        """Where distckpt stands beside its best peer; within 2 % of it they are level, and "" is no peer."""
        if self.against_peer is None:
            return ""
        return "ahead" if self.against_peer < 0.98 else "level" if self.against_peer <= 1.02 else "behind"

    @property
    def line(self) -> str:
        """The verdict as a line below a table."""
        seen = brief(self.ratio) if self.ratio is not None else "?"
        aim = f" (aim {brief(self.aim)})" if self.aim is not None else ""
        line = f"target  {self.contender}, {self.figure}: {seen} of at most {brief(self.target)}{aim}: {self.word}"
        if self.against_peer is None:
            return line
        return f"{line}; {self.place}: {brief(self.against_peer)} x the best peer, {self.best_peer}"

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return {**asdict(self), "word": self.word}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Verdict:
        """Return what `to_json` gave."""
        return cls(**{name: value for name, value in body.items() if name != "word"})


def brief(value: float) -> str:
    """Return a number with three digits that count, near 1 with four, and without an exponent unless it is tiny."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if 0.9 <= value < 2 else f"{value:.3g}"


def ratio(run: Run, name: str, column: Column) -> float | None:
    """Return a contender's median ratio to a column's ceiling, or its median value where there is none."""
    if not column.ceiling:
        found = run.spread(name, column.measure)
        return found.median if found else None
    ceiling = run.best(column.ceiling)
    spread = run.ratio(name, column.measure, ceiling) if ceiling else None
    return spread.median if spread else None


def judge(
    run: Run, columns: Sequence[Column], *, own: Sequence[str], names: Sequence[str], limits: Sequence[str]
) -> list[Verdict]:
    """Return what came of each target.

    Args:
        run: What was measured.
        columns: The table's columns; those with a target count.
        own: distckpt's contenders.
        names: All contenders that have numbers.
        limits: Those of them that are what the machine can do.
    """
    verdicts = []
    peers = [name for name in names if name not in limits and not name.startswith("distckpt")]
    for column in columns:
        if column.target is None:
            continue
        best = run.best([(peer, column.measure) for peer in peers])
        for name in own if column.of is None else column.of:
            if name not in names or not any(column.measure in each.get(name, {}) for each in run.rounds):
                continue
            numbers = not run.is_too_noisy
            spread = run.spread(name, column.measure) if numbers else None
            beside = run.ratio(name, column.measure, best) if numbers and best else None
            verdicts.append(
                Verdict(
                    contender=name,
                    figure=column.figure or column.title,
                    value=spread.median if spread else None,
                    ratio=ratio(run, name, column) if numbers else None,
                    target=column.target,
                    aim=column.aim,
                    best_peer=best[0] if best and beside else None,
                    against_peer=beside.median if beside else None,
                )
            )
    return verdicts

"""Rounds: every contender once a round, in an order drawn anew each time, and whether the result can be believed.

The references (a memory copy, a raw write) run in every round like everybody else. A round in which one of them strays
from its median says that the machine had other work: that round counts for nobody. If too few rounds remain, the run
is too noisy, and has no number.
Invariant: what decides over a round is the references alone, never a contender.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.team import Team

Cell = Callable[[], Mapping[str, float]]
Measured = Mapping[str, Mapping[str, float]]

LEAST_ROUNDS = 3  # of a run that was cut short
SELDOM = 3  # a slow contender runs in the first of so many rounds

# What several ranks measure becomes one value: a duration is that of the slowest, work and bytes add up.
_SUMMED = ("cpu_s", "_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A median and what lies around it."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(median=statistics.median(values), low=min(values), high=max(values), values=tuple(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How many rounds, and how still the machine has to be.

    Attributes:
        num_rounds: How many good rounds are wanted; up to twice as many are run to get them.
        max_noise: How far a reference may stray from its median in a good round, as a fraction of it.
        seed: What the orders are drawn from.
        limit_s: Seconds after which no further round begins; the first always does.
        slow_s: Who takes longer than so many seconds is measured in every third round only.
    """

    num_rounds: int = 5
    max_noise: float = 0.25
    seed: int = 0
    limit_s: float = float("inf")
    slow_s: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What was measured.

    Attributes:
        rounds: By round, contender and measure.
        references: The contenders and measures that say how still the machine was.
        rules: What was asked for.
        failed: The error of each contender that failed, by name.
        loads: The load average before each round.
    """

    rounds: tuple[Measured, ...]
    references: tuple[tuple[str, str], ...]
    rules: Rules
    failed: Mapping[str, str] = field(default_factory=dict)
    loads: tuple[float, ...] = ()

    @property
    def good(self) -> tuple[int, ...]:
        """The rounds in which no reference strayed."""
        return good_rounds(self.rounds, self.references, max_noise=self.rules.max_noise)

    @property
    def is_too_noisy(self) -> bool:
        """Whether there are too few good rounds for a number."""
        return len(self.good) < self._num_needed

    @property
    def _num_needed(self) -> int:
        """How many good rounds make a number; a run that its time limit has cut short is content with few."""
        num_rounds = self.rules.num_rounds
        return min(num_rounds, LEAST_ROUNDS) if len(self.rounds) < 2 * num_rounds else num_rounds

    @property
    def verdict(self) -> str:
        """One line on how far the run can be believed."""
        noise = ", ".join(f"{name} {self._noise(name, measure):.0%}" for name, measure in self.references)
        counted = f"{len(self.good)} of {len(self.rounds)} rounds were still (references strayed up to: {noise or '-'})"
        if self.is_too_noisy:
            return f"too noisy: {counted}, {self._num_needed} are needed"
        return counted if len(self.good) >= self.rules.num_rounds else f"{counted}; cut short by its time limit"

    def _noise(self, name: str, measure: str) -> float:
        values = [each[name][measure] for each in self.rounds if measure in each.get(name, {})]
        median = statistics.median(values) if values else 0.0
        return max((abs(value - median) / median for value in values), default=0.0) if median else 0.0

    def spread(self, name: str, measure: str) -> Spread | None:
        """Return a contender's measure over the good rounds; None if it has none."""
        values = [self.rounds[i][name][measure] for i in self.good if measure in self.rounds[i].get(name, {})]
        return Spread.of(values) if values else None

    def ratio(self, name: str, measure: str, ceiling: tuple[str, str]) -> Spread | None:
        """Return a contender's measure as a multiple of a ceiling's in the same round, over the good rounds."""
        other, under = ceiling
        pairs = [
            (self.rounds[i][name][measure], self.rounds[i][other][under])
            for i in self.good
            if measure in self.rounds[i].get(name, {}) and self.rounds[i].get(other, {}).get(under, 0) > 0
        ]
        return Spread.of([value / limit for value, limit in pairs]) if pairs else None

    def best(self, candidates: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
        """Return the candidate, a contender and its measure, with the least median; nothing takes no time at all."""
        found = [(spread.median, each) for each in candidates if (spread := self.spread(*each)) is not None]
        return min((each for each in found if each[0] > 0), default=(0.0, None))[1]


def good_rounds(
    rounds: Sequence[Measured], references: Sequence[tuple[str, str]], *, max_noise: float
) -> tuple[int, ...]:
    """Return the rounds in which every reference is within `max_noise` of its own median over all rounds."""
    good = set(range(len(rounds)))
    for name, measure in references:
        values = {i: each[name][measure] for i, each in enumerate(rounds) if measure in each.get(name, {})}
        if not values:
            continue
        median = statistics.median(values.values())
        good &= {i for i, value in values.items() if abs(value - median) <= max_noise * median}
    return tuple(sorted(good))


def interleave(
    cells: Mapping[str, Cell],
    *,
    team: Team,
    rules: Rules,
    references: Sequence[tuple[str, str]] = (),
    between: Callable[[], object] = lambda: None,
) -> Run:
    """Run every cell once a round, in random order, until there are enough good rounds, or twice as many were run.

    Args:
        cells: By contender: does its work once and returns what it measured.
        team: The ranks; each runs the same cells in the same order.
        rules: How many rounds, and how still.
        references: The contenders and measures that say how still the machine was.
        between: Is called before each turn.

    Returns:
        All rounds. A contender that raised is out from then on; its error is kept.
    """
    order = random.Random(rules.seed)
    deadline = time.monotonic() + rules.limit_s
    rounds: list[Measured] = []
    failed: dict[str, str] = {}
    loads: list[float] = []
    slow: set[str] = set()
    while len(rounds) < 2 * rules.num_rounds:
        resting = slow if len(rounds) % SELDOM else set()
        names = [name for name in cells if name not in failed and name not in resting]
        order.shuffle(names)
        loads.append(os.getloadavg()[0])
        measured = {}
        for name in names:
            between()
            begun = time.monotonic()
            value = _measure(cells[name], team)
            if rules.slow_s < float("inf") and team.agree(time.monotonic() - begun > rules.slow_s):
                slow.add(name)
            if isinstance(value, str):
                failed[name] = value
            else:
                measured[name] = value
        rounds.append(measured)
        if team.rank == 0:
            print(f"  round {len(rounds)}, load average {loads[-1]:.1f}", file=sys.stderr, flush=True)
        enough = len(good_rounds(rounds, references, max_noise=rules.max_noise)) >= rules.num_rounds
        if team.agree(enough or time.monotonic() > deadline):
            break
    return Run(rounds=tuple(rounds), references=tuple(references), rules=rules, failed=failed, loads=tuple(loads))


def _measure(cell: Cell, team: Team) -> Mapping[str, float] | str:
    """Run a cell on all ranks; return what it measured, or its error if any rank raised."""
    value: Mapping[str, float] | str
    team.barrier()
    try:
        value = dict(cell())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  some peers' errors are no Exception; all are reported
        value = f"rank {team.rank}: {type(error).__name__}: {error}".strip()
    values = team.gather(value)
    errors = [each for each in values if isinstance(each, str)]
    if errors:
        return errors[0]
    measured = [each for each in values if not isinstance(each, str)]
    return {name: _combined(name, [each[name] for each in measured]) for name in measured[0]}


def _combined(name: str, values: Sequence[float]) -> float:
    return sum(values) if name.endswith(_SUMMED) else max(values)

"""The interval: how often to save. Pure decisions from durations; the schedule measures, and carries them out.

Invariant: whatever is measured, the chosen interval is finite, at least one step, and never so short that saves cost
more than `MOST_LOST` of the training or wait for each other.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from distckpt.errors import ConfigError

MOST_LOST = 0.05  # the fraction of the training that saves may cost
SHORTEST_S = 10.0  # a failure costs a restart, which lasts longer: less work lost than this is not worth a save
LONGEST_S = 3600.0
DEFAULT_MTBF_S = 6 * 3600.0
RANK_MTBF_S = 50_000 * 3600.0
FIRST_STEPS = 10  # before the first save of "auto": enough to know a step's time, few enough to lose nothing

_RECENT_STEPS = 64
_RECENT_SAVES = 8
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(rf"([0-9]{{1,12}}(?:\.[0-9]{{1,12}})?) ?({'|'.join(_UNITS)})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Every:
    """When saves are due; at most one of these is set, and with none of them nothing is ever due by itself.

    Attributes:
        steps: After each so many steps.
        duration_s: After each so many seconds.
        auto: When it costs least.
    """

    steps: int | None = None
    duration_s: float | None = None
    auto: bool = False

    @classmethod
    def of(cls, every: int | str | None, *, source: str = "CheckpointManager") -> Every:
        """Return what a user means: a number of steps, "90s", "10min", "2h", "auto", or None.

        Raises:
            ConfigError: It is none of these.
        """
        if every is None:
            return cls()
        if type(every) is int and every >= 1:
            return cls(steps=every)
        if every == "auto":
            return cls(auto=True)
        duration = _DURATION.fullmatch(every) if isinstance(every, str) else None
        if duration is not None and float(duration[1]) > 0:
            return cls(duration_s=float(duration[1]) * _UNITS[duration[2]])
        raise ConfigError(
            source=source,
            problem=f'every must be at least 1 step, a duration ("90s", "10min", "2h") or "auto", is {every!r}',
        )

    @property
    def is_timed(self) -> bool:
        """Whether it takes a clock to say when a save is due."""
        return self.auto or self.duration_s is not None


def young_daly(cost_s: float, mtbf_s: float) -> float:
    """Return the time of training between two saves at which saves and failures together cost least, in seconds.

    Args:
        cost_s: Training time that one save costs.
        mtbf_s: Mean time between failures.

    Source: sqrt(2 C M) is J. W. Young, "A first order approximation to the optimum checkpoint interval",
    Communications of the ACM 17(9), 1974; the correction, and M where C is 2 M or more, are equation 37 of J. T. Daly,
    "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer
    Systems 22(3), 2006.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An interval, and what it is predicted to cost.

    Attributes:
        interval_s: Seconds of training between the end of a save's stall and the next save.
        steps: The same in steps.
        cost_s: Training time that a save costs.
        mtbf_s: The mean time between failures that it rests on.
        lost_to_saves: The fraction of the time that goes into saves.
        lost_to_failures: The fraction of the time that goes into steps that have to be done again.
    """

    interval_s: float
    steps: int
    cost_s: float
    mtbf_s: float
    lost_to_saves: float
    lost_to_failures: float

    @property
    def lost(self) -> float:
        """The fraction of the time that is lost."""
        return 1 - (1 - self.lost_to_saves) * (1 - self.lost_to_failures)

    def differs(self, other: Choice | None) -> bool:
        """Say whether this interval is another one: by more than a fifth."""
        return other is None or abs(self.interval_s - other.interval_s) > 0.2 * other.interval_s

    def __str__(self) -> str:
        return (
            f"every {self.steps} steps ({_in_words(self.interval_s)}): a save costs {self.cost_s:.3f} s of training, "
            f"a failure is expected every {_in_words(self.mtbf_s)}; predicted loss {100 * self.lost_to_saves:.2f} % to "
            f"saves and {100 * self.lost_to_failures:.2f} % to steps done again"
        )


def choose(*, cost_s: float, durable_s: float, step_s: float, mtbf_s: float) -> Choice:
    """Return the interval that loses least, within bounds.

    Young's and Daly's interval, at most `LONGEST_S`; but, which weighs more, at least so long that saves cost no more
    than `MOST_LOST` of the training, that one is durable before the next begins, and `SHORTEST_S`; in whole steps.

    Args:
        cost_s: Training time that one save costs.
        durable_s: Seconds from a save's beginning until it is durable: a failure before takes the one before it.
        step_s: Seconds that one step takes.
        mtbf_s: Mean time between failures.
    """
    least_s = max(cost_s * (1 / MOST_LOST - 1), durable_s, SHORTEST_S)
    wanted_s = max(least_s, min(young_daly(cost_s, mtbf_s), LONGEST_S))
    steps = max(1, math.ceil(wanted_s / step_s - 1e-9)) if step_s > 0 else 1
    interval_s = max(wanted_s, steps * step_s)
    # A failure comes, on average, in the middle of an interval, and finds the last save durable only after a while.
    lost_s = (interval_s + cost_s) / 2 + durable_s
    return Choice(
        interval_s=interval_s,
        steps=steps,
        cost_s=cost_s,
        mtbf_s=mtbf_s,
        lost_to_saves=cost_s / (interval_s + cost_s),
        lost_to_failures=lost_s / (mtbf_s + lost_s),
    )


class Estimator:
    """What steps and saves have cost lately, and the interval that follows.

    A step's time is the median of the recent ones in which nothing was written; a save costs its stall, and what the
    steps took longer while it was written. One strange step or save moves neither.
    """

    def __init__(self) -> None:
        self._quiet_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._busy_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._beside_s = 0.0
        self._num_beside = 0
        self._saves: deque[tuple[float, float]] = deque(maxlen=_RECENT_SAVES)

    @property
    def step_s(self) -> float | None:
        """Seconds that a step takes; None before the first."""
        known = self._quiet_s or self._busy_s
        return statistics.median_low(known) if known else None

    def note_step(self, seconds: float, *, writing: bool) -> None:
        """Take note of a step's time.

        Args:
            seconds: From the end of the step before, less what was spent on checkpoints.
            writing: Whether a save was being written when it began.
        """
        if writing:
            self._busy_s.append(seconds)
            self._beside_s += seconds
            self._num_beside += 1
        else:
            self._quiet_s.append(seconds)

    def note_save(self, *, stall_s: float, durable_s: float) -> None:
        """Take note of a save that is committed; the steps noted as beside a write since the last one were beside it.

        Args:
            stall_s: Seconds for which the training stood still.
            durable_s: Seconds from its beginning until it was committed.
        """
        step_s = self.step_s
        slowed_s = 0.0 if step_s is None else self._beside_s - self._num_beside * step_s
        self._saves.append((stall_s + max(0.0, slowed_s), durable_s))
        self._beside_s, self._num_beside = 0.0, 0

    def choice(self, mtbf_s: float) -> Choice | None:
        """Return the interval for what is known; None before the first step and save."""
        step_s = self.step_s
        if step_s is None or not self._saves:
            return None
        costs, durables = zip(*self._saves, strict=True)
        return choose(
            cost_s=statistics.median_low(costs),
            durable_s=statistics.median_low(durables),
            step_s=step_s,
            mtbf_s=mtbf_s,
        )


def default_mtbf_s(world_size: int) -> float:
    """Return the mean time between failures of a job of which nothing is known: six hours, less for very many ranks.

    Source: one interruption in three hours on 16,384 GPUs ("The Llama 3 Herd of Models", 2024) makes 50,000 hours for
    a GPU. Small jobs end of other things, such as preemption and their own mistakes: six hours is a choice.
    """
    return min(DEFAULT_MTBF_S, RANK_MTBF_S / max(1, world_size))


def uptimes(sightings: Iterable[tuple[str, float]]) -> list[float]:
    """Return for how long each process was seen at work, in seconds.

    Args:
        sightings: Of each checkpoint the process that committed it, and when.
    """
    seen: dict[str, tuple[float, float]] = {}
    for process, created in sightings:
        first, last = seen.get(process, (created, created))
        seen[process] = min(first, created), max(last, created)
    return [last - first for first, last in seen.values()]


def estimated_mtbf_s(ended_s: Iterable[float], running_s: float, *, default_s: float) -> float:
    """Return the mean time between failures of a run, from its own history.

    The time at work over the number of ends; the default counts as one more end after so long, so that a history of
    minutes moves it little, and one of days replaces it.

    Args:
        ended_s: For how long each process that ended was at work.
        running_s: For how long the present one has been.
        default_s: What holds as long as nothing is known.
    """
    ends = list(ended_s)
    return (default_s + sum(ends) + running_s) / (1 + len(ends))


def _in_words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

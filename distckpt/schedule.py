"""The schedule: after which step a save or a stop is due, the same step on every rank.

Ranks meet when something may be due. A number of steps is known to all of them; what only one rank knows, the time or a
signal, it announces for the end of the next step, and every rank looks for that once a step. When they meet, the
furthest one's step is taken, as ranks that never wait for each other may have gone further.
Invariant: all ranks attend the same meetings, whatever brought each of them there; so a stop and a save that come
together are one meeting, never two that wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from distckpt.interval import Every
from distckpt.pace import Pace
from distckpt.preemption import Preemption
from distckpt.ranks import Ranks
from distckpt.values import Json

_MEETING = "agreement on the next save"


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """What all ranks do after a step.

    Attributes:
        save: Whether they save.
        stop: Whether they leave the loop once that is committed.
        busy: Whether a save was still in flight on any rank.
    """

    save: bool = False
    stop: bool = False
    busy: bool = False


class Schedule:
    """Says after each step what is due.

    Args:
        every: When saves are due.
        pace: When they are due by the clock.
        preemption: Whether this process was asked to stop.
    """

    def __init__(self, every: Every, *, pace: Pace, preemption: Preemption) -> None:
        self._every = every
        self._pace = pace
        self._preemption = preemption
        self._num_met = 0
        self._announced = False
        self._agreed: tuple[int, Due] | None = None
        self._is_stopping = False

    def is_stopping(self, ranks: Ranks) -> bool:
        """Say whether any rank was asked to stop, as far as this one knows now; once true, it stays so.

        Args:
            ranks: All ranks.

        Ranks: any; asks the store one short question.
        """
        if not self._is_stopping:
            if self._preemption.requested:
                ranks.announce("stop", 1)
            self._is_stopping = self._preemption.requested or ranks.announced("stop") is not None
        return self._is_stopping

    def after(self, step: int, ranks: Ranks, *, busy: bool, last: bool = False, stop: bool = False) -> Due:
        """Return what is due after `step`, the same on every rank.

        Args:
            step: The step that this rank has just completed.
            ranks: All ranks.
            busy: Whether a save is in flight on this rank.
            last: Whether no step follows: then a save is due.
            stop: Whether a stop is due for a reason that all ranks know, and at which all of them are at this step.

        Raises:
            RankTimeoutError: Something may be due, and a rank did not come.

        Ranks: all, once after every step; blocks only when something may be due.
        """
        if self._agreed is None:
            counted = last or stop or (self._every.steps is not None and step % self._every.steps == 0)
            if ranks.world_size == 1:
                stop = stop or self._preemption.requested
                return Due(save=counted or stop or self._pace.is_due(step, busy=busy), stop=stop, busy=busy)
            if not (counted or self._is_called(step, ranks, busy=busy)):
                return Due()
            fact = {"step": step, "stop": self._preemption.requested, "busy": busy}
            verdict = ranks.agree(_MEETING, lambda: fact, _verdict)
            self._agreed = verdict["step"], Due(save=True, stop=verdict["stop"], busy=verdict["busy"])
            self._num_met, self._announced = self._num_met + 1, False
        at, due = self._agreed
        if step < at and not stop:
            return Due()
        self._agreed = None
        return replace(due, save=True, stop=True) if stop else due

    def _is_called(self, step: int, ranks: Ranks, *, busy: bool) -> bool:
        """Say whether a meeting has been announced, by `step` at the latest; announce one if it is wanted."""
        key = f"meeting/{self._num_met}"
        if not self._announced and (
            self._preemption.requested or (ranks.rank == 0 and self._pace.is_due(step + 1, busy=busy))
        ):
            # While this rank is between two steps no other can be further than one step ahead of it.
            ranks.announce(key, step + 1)
            self._announced = True
        called = ranks.announced(key)
        return called is not None and step >= called


def _verdict(facts: list[Json]) -> Json:
    """Rank 0: decide for all."""
    return {
        "step": max(fact["step"] for fact in facts),
        "stop": any(fact["stop"] for fact in facts),
        "busy": any(fact["busy"] for fact in facts),
    }

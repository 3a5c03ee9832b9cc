"""The departure: how all ranks leave together once one of them was asked to stop, in the time that is left.

Invariant: the directory says that the job was preempted before the last save begins, as a kill may come at any moment
from then on; and a step that can be saved in time is saved, whatever came of the save before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from distckpt.deadline import Situation, Way, choose, intention
from distckpt.errors import DistckptError
from distckpt.events import Callback, Preempted
from distckpt.outcome import reason_of
from distckpt.pace import Pace
from distckpt.preemption import Preemption
from distckpt.ranks import Ranks
from distckpt.saver import Saver
from distckpt.tenure import Tenure
from distckpt.values import Json

logger = logging.getLogger("distckpt")

_MEETING = "agreement on how to stop"


class Departure:
    """Leaves a run: with a last save, with the one that is in flight, or without.

    Args:
        saver: Makes the saves.
        pace: Knows what they take.
        preemption: Knows why this rank is to stop, and by when.
        tenure: Is told how the job ends.
        tell: Is told that the job leaves, and how.
    """

    def __init__(
        self,
        *,
        saver: Saver,
        pace: Pace,
        preemption: Preemption,
        tenure: Tenure,
        tell: Callback = lambda event: None,
    ) -> None:
        self._saver = saver
        self._pace = pace
        self._preemption = preemption
        self._tenure = tenure
        self._tell = tell

    def leave(self, step: int, ranks: Ranks, save: Callable[[], None]) -> None:
        """Do what can be done in time, and record that the job was preempted.

        Args:
            step: The step that all ranks have completed; 0 if none.
            ranks: The channel of the training's thread.
            save: Begins the save of this step.

        Raises:
            RankTimeoutError: A rank did not come.
            DistckptError: The last save failed, as `CheckpointManager.save` and `wait` say.

        Ranks: all (collective); blocks until what was chosen is committed.
        """
        verdict = self._agreed(step, ranks)
        way: Way = verdict["way"]
        reason: str = verdict["words"]
        self._tenure.conclude("preempted", step=self._saver.saved_step, reason=reason)
        self._tell(Preempted(step=step, signal=verdict["signal"], left_s=verdict["left_s"], choice=reason))
        try:
            if way == "finish":
                self._finish(ranks)
                verdict = self._agreed(step, ranks)
                way, reason = verdict["way"], verdict["words"]
            if way == "save":
                self._finish(ranks)
                save()
                self._saver.await_commit()
        except BaseException as error:
            self._tenure.conclude("failed", step=self._saver.saved_step, reason=reason_of(error))
            raise
        self._tenure.conclude("preempted", step=self._saver.saved_step, reason=reason)

    def _finish(self, ranks: Ranks) -> None:
        """Wait for the save in flight; its failure is no reason not to make another one."""
        try:
            self._saver.await_commit()
        except DistckptError as error:
            if ranks.rank == 0:
                logger.warning("a save before the last one failed: %s", error)

    def _agreed(self, step: int, ranks: Ranks) -> dict[str, Any]:
        """Return what all ranks do now, and why, as `_verdict` says; rank 0 logs that."""

        def fact() -> dict[str, Json]:
            in_flight = self._saver.in_flight
            return {
                "saved_step": self._saver.saved_step,
                "in_flight": in_flight and in_flight[0],
                "in_flight_s": in_flight[1] if in_flight else 0.0,
                "durable_s": self._pace.usual_durable_s,
                "left_s": self._preemption.left_s(),
                "cause": self._preemption.cause,
                "signal": self._preemption.signal,
                "age_s": self._preemption.age_s,
            }

        verdict: dict[str, Any] = ranks.agree(_MEETING, fact, lambda facts: _verdict(step, facts))
        if ranks.rank == 0:
            logger.log(logging.WARNING if verdict["loses"] else logging.INFO, "asked to stop: %s", verdict["words"])
        return verdict


def _verdict(step: int, facts: list[dict[str, Any]]) -> dict[str, Json]:
    """Rank 0: decide for all, by the least time that any of them has, and the longest save.

    Returns the way, the reason in words, the signal that asked if one did, the time left, and whether a step is lost.
    """

    def known(name: str) -> list[Any]:
        return [fact[name] for fact in facts if fact[name] is not None]

    asked = [rank for rank, fact in enumerate(facts) if fact["cause"] is not None]
    situation = Situation(
        step=step,
        saved_step=facts[0]["saved_step"],
        in_flight=max(known("in_flight"), default=None),
        in_flight_s=max(fact["in_flight_s"] for fact in facts),
        left_s=min(known("left_s"), default=None),
        durable_s=max(known("durable_s"), default=None),
    )
    way = choose(situation)
    cause, signal = "by the training itself", None
    if asked:
        first = max(asked, key=lambda rank: facts[rank]["age_s"])
        signal = facts[first]["signal"]
        cause = f"{facts[first]['cause']}, {facts[first]['age_s']:.1f} s ago on rank {first}"
    words = f"{cause}; {situation}: {intention(situation, way)}"
    loses = way == "leave" and step > (situation.saved_step or 0)
    return {"way": way, "words": words, "signal": signal, "left_s": situation.left_s, "loses": loses}

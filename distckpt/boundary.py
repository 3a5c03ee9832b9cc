"""The boundary between two steps: where all ranks look whether a save or a stop is due, and carry it out.

Invariant: what is done at a boundary is done by all ranks, after the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from distckpt.deadline import margin_s
from distckpt.departure import Departure
from distckpt.events import Callback, Ended
from distckpt.interval import Every
from distckpt.outcome import Ending, reason_of
from distckpt.pace import Pace
from distckpt.preemption import Preemption
from distckpt.ranks import Ranks
from distckpt.saver import Saver
from distckpt.schedule import Schedule
from distckpt.tenure import Tenure


class Save(Protocol):
    """Saves the step that was just completed."""

    def __call__(self, *, busy: bool) -> None:
        """Save it.

        Args:
            busy: Whether all ranks know of a save in flight, to be treated as `when_busy` says; if not, this one waits.

        Ranks: all (collective).
        """


class Boundary:
    """Does what is due between two steps, and at the end.

    Args:
        every: When saves are due.
        pace: Keeps the time of steps and saves.
        preemption: Whether this process was asked to stop.
        saver: Makes the saves.
        tenure: Is told how the job ends.
        tell: Is told that the job leaves, and how.
        insist: Is called before each save; raises if the state may not be saved.
    """

    def __init__(
        self,
        every: Every,
        *,
        pace: Pace,
        preemption: Preemption,
        saver: Saver,
        tenure: Tenure,
        tell: Callback = lambda event: None,
        insist: Callable[[], None] = lambda: None,
    ) -> None:
        self._insist = insist
        self._tell = tell
        self._tenure = tenure
        self._pace = pace
        self._preemption = preemption
        self._saver = saver
        self._schedule = Schedule(every, pace=pace, preemption=preemption)
        self._departure = Departure(saver=saver, pace=pace, preemption=preemption, tenure=tenure, tell=tell)

    def is_stopping(self, ranks: Ranks) -> bool:
        """Say whether this job is to stop, as far as this rank knows now.

        Ranks: any; asks the store one short question.
        """
        self._look_at_end()
        return self._schedule.is_stopping(ranks)

    def cross(self, step: int, ranks: Ranks, save: Save, *, last: bool = False, stop: bool = False) -> bool:
        """Do what is due after a step, and return whether to leave the loop.

        A run whose last step is done is complete, whoever asked it to stop.

        Args:
            step: The step that this rank has just completed.
            ranks: The channel of the training's thread.
            save: Saves this step.
            last: Whether no step follows.
            stop: Whether all ranks have agreed to stop at this step.

        Raises:
            As `CheckpointManager.step` does.

        Ranks: all, once after every step; blocks when something is due.
        """
        self._pace.step_ended(world_size=ranks.world_size, tell=ranks.rank == 0)
        self._look_at_end()
        due = self._schedule.after(step, ranks, busy=self._saver.is_busy, last=last, stop=stop)
        leaves = due.stop and not last
        if due.save:
            self._insist()
        if leaves:
            self._departure.leave(step, ranks, lambda: save(busy=False))
        elif due.save:
            save(busy=due.busy and not last)
        self._pace.step_begins(writing=self._saver.is_busy)
        return leaves

    def end(self, because: BaseException | None, *, preempted: bool) -> bool:
        """Say how the job ends, to the directory and to who is told of events; return whether that is as it should be.

        Args:
            because: What it ends of, if not of itself.
            preempted: Whether it has left the loop before its last step.

        Ranks: any; writes on rank 0.
        """
        reason, step = reason_of(because), self._saver.saved_step
        ending: Ending = "complete" if reason is None else "failed"
        self._tenure.end(ending, step=step, reason=reason)
        self._tell(Ended(step=step, ending="preempted" if preempted else ending, reason=reason))
        return reason is None

    def _look_at_end(self) -> None:
        """See whether the end of the allocation is near."""
        pace = self._pace
        self._preemption.look_at_end(margin_s(durable_s=pace.slow_durable_s, step_s=pace.slow_step_s))

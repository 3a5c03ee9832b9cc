"""The pace: when, by the clock, the next save is due, learnt from what steps and saves have cost so far.

Invariant: with `every="auto"` nothing is due between the first save and the moment its cost is known.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from distckpt import catalog
from distckpt.errors import DistckptError
from distckpt.interval import (
    FIRST_STEPS,
    LONGEST_S,
    Choice,
    Estimator,
    Every,
    default_mtbf_s,
    estimated_mtbf_s,
    uptimes,
)
from distckpt.storage import Storage

logger = logging.getLogger("distckpt")

RECENT_STEPS = 64
RECENT_SAVES = 8
MOST_REMEMBERED = 8  # manifests that are read for a run's history: enough to tell hours from minutes


class Pace:
    """Keeps the time between saves; rank 0's decides.

    Args:
        every: When saves are due.
        mtbf_s: The mean time between failures, for "auto"; None is to estimate it.
        clock: Returns seconds that only grow.

    Attributes:
        ended_s: For how long each process of this run, before this one, was seen at work.
    """

    def __init__(
        self, every: Every, *, mtbf_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ended_s: Sequence[float] = ()
        self._every = every
        self._mtbf_s = mtbf_s
        self._clock = clock
        self._estimator = Estimator()
        self._steps_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._durables_s: deque[float] = deque(maxlen=RECENT_SAVES)
        self._past_durable_s: float | None = None
        self._first_s: float | None = None
        self._step_since_s: float | None = None
        self._beside = False
        self._since: tuple[float, int] | None = None
        self._news: tuple[float, float] | None = None
        self._choice: Choice | None = None
        self._told: Choice | None = None

    @property
    def is_auto(self) -> bool:
        """Whether the interval is chosen here."""
        return self._every.auto

    @property
    def usual_durable_s(self) -> float | None:
        """Seconds until a save is committed: the median of this process's recent ones, else what an older one took."""
        recent = list(self._durables_s)  # a save may end on its thread meanwhile
        return statistics.median_low(recent) if recent else self._past_durable_s

    @property
    def slow_durable_s(self) -> float | None:
        """Seconds until a save is committed, of the slowest recent one."""
        return max(list(self._durables_s), default=self._past_durable_s)

    @property
    def slow_step_s(self) -> float:
        """Seconds of the slowest recent step; 0 before the first."""
        return max(self._steps_s, default=0.0)

    def recall(self, timings: Mapping[str, float]) -> None:
        """Learn what the save took whose checkpoint was restored.

        Args:
            timings: Seconds that its parts took, as its manifest says.

        Ranks: any.
        """
        self._past_durable_s = sum(timings.values()) if timings else self._past_durable_s

    def step_ended(self, *, world_size: int, tell: bool) -> None:
        """Take note that a step ended just now, and of the save that has been committed meanwhile.

        Args:
            world_size: The number of ranks.
            tell: Whether to log the interval, where it becomes another one.

        Ranks: any.
        """
        now = self._clock()
        if self._step_since_s is not None:
            self._steps_s.append(now - self._step_since_s)
        if not self._every.auto:
            return
        if self._first_s is None:
            self._first_s = now
        if self._step_since_s is not None:
            self._estimator.note_step(now - self._step_since_s, writing=self._beside)
        news, self._news = self._news, None
        if news is None:
            return
        self._estimator.note_save(stall_s=news[0], durable_s=news[1])
        mtbf_s = self._mtbf_s or estimated_mtbf_s(
            self.ended_s, now - self._first_s, default_s=default_mtbf_s(world_size)
        )
        self._choice = self._estimator.choice(mtbf_s)
        if self._choice is not None and self._choice.differs(self._told):
            self._told = self._choice
            if tell:
                logger.info("from here on saving %s", self._choice)

    def step_begins(self, *, writing: bool) -> None:
        """Take note that the training goes on: what passes from here to `step_ended` is a step.

        Args:
            writing: Whether a save is in flight.

        Ranks: any.
        """
        self._step_since_s, self._beside = self._clock(), writing

    def restart(self, step: int) -> None:
        """Let the time to the next save run from here: `step` is being saved, passed over, or was just restored.

        Ranks: any.
        """
        self._since = self._clock(), step
        self._step_since_s = None  # what has passed since the last step began was more than a step

    def save_committed(self, *, stall_s: float, durable_s: float) -> None:
        """Take note of what a save took; any thread may tell.

        Args:
            stall_s: Seconds for which the training stood still.
            durable_s: Seconds from its beginning until it was committed.

        Ranks: any.
        """
        self._news = stall_s, durable_s
        self._durables_s.append(durable_s)

    def is_due(self, step: int, *, busy: bool) -> bool:
        """Say whether, by the clock, a save is due after `step`.

        Args:
            step: Optimizer steps completed.
            busy: Whether a save is in flight.

        Ranks: any.
        """
        if not self._every.is_timed:
            return False
        now = self._clock()
        if self._since is None:
            self._since = now, step - 1
        since_s, since_step = self._since
        if self._every.duration_s is not None:
            return now - since_s >= self._every.duration_s
        if self._choice is not None:  # half a step early, or a step that is a little short would cost one more
            return now - since_s >= self._choice.interval_s * (1 - 0.5 / self._choice.steps)
        return not busy and (step - since_step >= FIRST_STEPS or now - since_s >= LONGEST_S)


def past_uptimes(storage: Storage) -> list[float]:
    """Return for how long each process that left one of a directory's newest checkpoints was seen at work, in seconds.

    What cannot be read is left out, with a warning.

    Ranks: any; reads the storage.
    """
    sightings = []
    try:
        for folder in [folder for folder in catalog.scan(storage) if folder.committed][-MOST_REMEMBERED:]:
            manifest = catalog.read_manifest(storage, folder.name)
            sightings.append((f"{manifest.writer.get('host')}/{manifest.writer.get('pid')}", manifest.created))
    except DistckptError as error:
        logger.warning("could not read the history of %s: %s", storage.url, error)
    return uptimes(sightings)

"""The tenure: a run's directory is owned by this job from its first use that may write to the manager's close.

Rank 0 holds the lease; the others know of it only what all are told together.
Invariant: a job whose lease was taken over publishes no manifest and deletes nothing. Where a lease cannot be written
at all, the job goes on without one, says so, and takes nobody's leftovers for dead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from distckpt.errors import DistckptError, StorageError
from distckpt.lease import DURATION_S, Lease
from distckpt.outcome import Ending, Outcome
from distckpt.ranks import Ranks
from distckpt.storage import Storage

logger = logging.getLogger("distckpt")


class Tenure:
    """One job's ownership of a directory.

    Args:
        timeout_s: How long ranks wait for each other.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._new_lease: Callable[..., Lease] = Lease
        self._duration_s = min(DURATION_S, timeout_s / 3)
        self._lease: Lease | None = None
        self._is_exclusive = False
        self._has_begun = False
        self._host = ""
        self._run: str | None = None

    @property
    def is_owner(self) -> bool:
        """Whether this is rank 0, and holds the lease as far as it knows."""
        return self._lease is not None and self._lease.still_held()

    def begin(self, storage: Storage, ranks: Ranks) -> None:
        """Take the directory, unless this job has it; where no lease can be written, warn and go on.

        Args:
            storage: The run's directory.
            ranks: The channel of the training's thread.

        Raises:
            DirectoryBusyError: Another job owns it; raised on all ranks.
            RankTimeoutError: Rank 0 did not come, or waited for a dead owner for too long.

        Ranks: all (collective); blocks on rank 0, for as long as a dead owner's lease lasts.
        """
        if self._has_begun:
            return

        def take(_: list[None]) -> None:
            lease = self._new_lease(storage, duration_s=self._duration_s)
            lease.run = self._run
            try:
                lease.acquire()
            except StorageError as error:
                logger.warning("going on without a lease, so a second job here would go unnoticed: %s", error)
                return
            self._lease, self._host = lease, ranks.host
            self._is_exclusive = storage.capabilities.exclusive_publish

        ranks.agree("taking the directory", lambda: None, take)
        self._has_begun = True

    def insist(self) -> None:
        """Make sure that this job still owns the directory; called right before a publish, and before pruning.

        Asks the storage nothing while the lease was renewed in time, for then nobody can have taken it: where two can
        publish one name, it looks.

        Raises:
            DirectoryBusyError: Another job has taken it over.
            StorageError: The lease could not be read or renewed.

        Ranks: 0; nothing happens on the others.
        """
        if self._lease is not None and not (self._is_exclusive and self._lease.still_held(share=0.5)):
            self._lease.check()

    def conclude(self, ending: Ending, *, step: int | None, reason: str | None = None) -> None:
        """Say how the job ends, while it still runs; a failure is left to `end`.

        Ranks: any; writes on rank 0.
        """
        if self._lease is not None:
            try:
                self._lease.conclude(self._outcome(ending, step, reason))
            except DistckptError:
                return

    def end(self, ending: Ending, *, step: int | None, reason: str | None = None) -> None:
        """Give the directory back, and say how the job ended, if that was not said before; raises nothing.

        Ranks: any; writes on rank 0.
        """
        if self._lease is not None:
            self._lease.release(self._outcome(ending, step, reason))
            self._lease = None

    def name_run(self, run: str) -> None:
        """Let the lease tell the run's name from its next renewal on.

        Ranks: any.
        """
        self._run = run
        if self._lease is not None:
            self._lease.run = run

    def _outcome(self, ending: Ending, step: int | None, reason: str | None) -> Outcome:
        return Outcome(ending=ending, step=step, time=time.time(), host=self._host, reason=reason)

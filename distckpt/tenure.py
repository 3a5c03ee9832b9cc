"""The tenure: a run's directory is owned by this job from its first use that may write to the manager's close.

Rank 0 holds the lease; the others know of it only what all are told together.
Of an owner on another host rank 0 knows nothing; but a rank of this job may run on that host, and know it for dead.
Invariant: a job whose lease was taken over publishes no manifest and deletes nothing. Where a lease cannot be written
at all, the job goes on without one, says so, and takes nobody's leftovers for dead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from distckpt import onedirectory
from distckpt.errors import DistckptError, StorageError
from distckpt.lease import DURATION_S, Lease
from distckpt.leasefiles import look
from distckpt.outcome import Ending, Outcome
from distckpt.owner import Fate, Machine, Owner, fate_of
from distckpt.ranks import Ranks
from distckpt.storage import Storage
from distckpt.values import Json

logger = logging.getLogger("distckpt")

ACTION = "taking the directory"


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
    def has_begun(self) -> bool:
        """Whether this job has taken the directory, or goes on without a lease."""
        return self._has_begun

    @property
    def is_owner(self) -> bool:
        """Whether this is rank 0, and holds the lease as far as it knows."""
        return self._lease is not None and self._lease.still_held()

    @property
    def is_after_silence(self) -> bool:
        """Whether the owner before may have stood still, as `Lease` says; whoever has no lease does not know."""
        return self._lease is None or self._lease.is_after_silence

    def begin(self, storage: Storage, ranks: Ranks) -> bool:
        """Take the directory, unless this job has it; where no lease can be written, warn and go on.

        Args:
            storage: The run's directory.
            ranks: The channel of the training's thread.

        Returns:
            Whether it was taken just now.

        Raises:
            DirectoryBusyError: Another job owns it; raised on all ranks.
            ConfigError: The ranks of different hosts see different directories; likewise.
            RankTimeoutError: Rank 0 did not come, or waited for a dead owner for too long.

        Ranks: all (collective); blocks on rank 0: of a dead owner on a host that no rank is on, for as long as its
            lease lasts.
        """
        if self._has_begun:
            return False

        def take(views: list[Json]) -> Json:
            mark = self._marked(storage, views)
            owner = self._doubtful_owner(storage)
            if owner is None:
                self._take(storage, ranks, {})
            return {"mark": mark, "owner": owner}

        told = ranks.agree(ACTION, partial(onedirectory.viewpoint, storage), take)
        onedirectory.insist(storage, ranks, told["mark"])
        if told["owner"] is not None:
            owner = Owner(**told["owner"])
            ranks.agree(ACTION, lambda: fate_of(owner), lambda fates: self._take(storage, ranks, {owner: set(fates)}))
        self._has_begun = True
        return True

    def _marked(self, storage: Storage, views: list[Json]) -> str | None:
        """Rank 0: mark the directory for all to see; where nothing can be written, saves will say so."""
        try:
            return onedirectory.marked(storage, views)
        except StorageError as error:
            logger.warning("could not see whether all ranks have one directory: %s", error)
            return None

    def _doubtful_owner(self, storage: Storage) -> dict[str, Json] | None:
        """Rank 0: return who owns the directory, if that is a process of which this one cannot say whether it runs."""
        try:
            record = look(storage).record
        except StorageError:
            return None  # taking it meets the same, and says so
        if record is None or record.released or fate_of(record.owner) != "unknown":
            return None
        return asdict(record.owner)

    def _take(self, storage: Storage, ranks: Ranks, seen: Mapping[Owner, set[Fate]]) -> None:
        """Rank 0: take the directory, with what all ranks have seen of its owner."""
        options: dict[str, Any] = {"duration_s": self._duration_s}
        known = {owner: fates - {"unknown"} for owner, fates in seen.items() if fates - {"unknown"}}
        if known:  # ranks of one host cannot differ, unless it ends just now
            options["machine"] = Machine(fate=lambda owner: min(known[owner]) if owner in known else fate_of(owner))
        lease = self._new_lease(storage, **options)
        lease.run = self._run
        try:
            lease.acquire()
        except StorageError as error:
            logger.warning("going on without a lease, so a second job here would go unnoticed: %s", error)
            return
        self._lease, self._host = lease, ranks.host
        self._is_exclusive = storage.capabilities.exclusive_publish

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

    def confirm(self) -> None:
        """Make sure that no other job has taken the directory so far; called when something has been published.

        Asks the storage nothing while the lease lasts; where two can publish one name, it looks.

        Raises:
            DirectoryBusyError: Another job has taken it over, before or after; what was published may not be whole.
            StorageError: The lease is over, and could not be read or renewed.

        Ranks: 0; nothing happens on the others.
        """
        if self._lease is not None and not (self._is_exclusive and self._lease.still_held()):
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

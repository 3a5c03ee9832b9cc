"""The lease: exactly one job owns a run's directory.

It lies in the folder `lease`, as files that are numbered and never changed: the highest number decides who owns the
directory. The owner renews its lease by publishing the next number and deleting the one before; who takes it over
publishes the next number, too, and storages let one of two have it.
Invariant: the file with the highest number is never deleted, so that a number once passed never counts again.

What it guarantees, where the storage's publish is exclusive and clocks run at about the same speed: no two jobs hold
the lease at one time (`still_held`). A job may still stand still between `check` and what it does next; while that
takes less than half the lease's duration nobody else holds it yet, and after that the manifest of a step, which can be
published only once, is the last fence: two jobs never replace each other's checkpoints.
Where publish is not exclusive, two jobs that start within the same seconds may both begin; the one whose lease was
overwritten learns so at its next check or renewal.
Readers need no lease.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from distckpt.errors import ConfigError, DirectoryBusyError, DistckptError, StorageError, UsageError
from distckpt.leasefiles import MOST_DURATION_S, Record, Seen, file_name, look, named
from distckpt.names import new_attempt
from distckpt.outcome import Outcome
from distckpt.owner import Machine
from distckpt.storage import Storage

logger = logging.getLogger("distckpt")

DURATION_S = 60.0
RENEW_TRIES = 3
SETTLE_S = 2.0  # where two can publish one name: how long the slower one may need


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watch:
    """A lease that is watched for a sign of life: which number, since when, and when watching began at all."""

    number: int
    since: float
    begun: float


class Lease:
    """One job's claim to a run's directory, acquired once; rank 0 has it. Methods may be called from any thread.

    Args:
        storage: The run's directory.
        duration_s: How long others wait for a sign of life before they take the directory over. A thread renews the
            lease three times in it.
        background: Whether to renew on a thread; without, `renew` has to be called.
        machine: The machine that it runs on.

    Attributes:
        run: The run's name, told with the next renewal.
        is_after_silence: Whether the owner before was taken for dead only because it gave no sign of life: it may have
            stood still, and what it was about to publish may still come.

    Raises:
        ConfigError: The duration is out of range.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        duration_s: float = DURATION_S,
        background: bool = True,
        machine: Machine | None = None,
    ) -> None:
        if not 0 < duration_s <= MOST_DURATION_S:
            problem = f"duration_s must be above 0 and at most {MOST_DURATION_S:g}, is {duration_s!r}"
            raise ConfigError(source="Lease", problem=problem)
        self.run: str | None = None
        self.is_after_silence = False
        self._storage = storage
        self._duration_s = duration_s
        self._background = background
        self._machine = machine or Machine()
        self._job = new_attempt()
        self._outcome: Outcome | None = None
        self._acquired_at = 0.0
        self._number = 0  # of this job's newest file
        self._valid_until = float("-inf")
        self._is_owner = False
        self._taker: Seen | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the directory; a dead owner's lease is taken over.

        An owner on this host that has ended is known to be dead at once; any other one when it has not renewed its
        lease for its duration, watched from here: then this blocks so long, and says so in the log. What the same
        process held before is its own to take.

        Raises:
            DirectoryBusyError: Another job owns it.
            StorageError: The lease could not be read or written.
        """
        if self._is_owner or self._stop.is_set():
            raise UsageError(problem="a lease is acquired once", fix="make a new Lease")
        watch: _Watch | None = None
        while True:
            seen = look(self._storage)
            now = self._machine.now()
            reason = self._reason_to_take(seen, watch, now)
            if reason is not None:
                if self._claim(seen):
                    break
                continue
            if seen.record is not None and self._machine.fate(seen.record.owner) == "runs":
                raise self._busy(seen)
            watch = self._watched(seen, watch, now)
            left_s = watch.since + self._patience_s(seen) - now
            self._machine.pause(min(self._patience_s(seen) / 20, max(left_s, 0.001)))
        if reason:
            logger.warning("took over %s: %s", self._storage.url, reason)
        if self._background:
            threading.Thread(target=self._keep, name="distckpt-lease", daemon=True).start()

    def _reason_to_take(self, seen: Seen, watch: _Watch | None, now: float) -> str | None:
        """Return why the lease that was seen may be taken, "" if that goes without saying, None if it may not."""
        record = seen.record
        if seen.number == 0 or (record is not None and (record.released or record.owner == self._machine.me)):
            return ""
        if record is not None and self._machine.fate(record.owner) == "gone":
            return f"its owner, {named(record)}, has ended without a word"
        if watch is not None and watch.number == seen.number and now - watch.since >= self._patience_s(seen):
            self.is_after_silence = True
            return f"its owner, {named(record)}, gave no sign of life for {now - watch.since:.1f} s"
        return None

    def _watched(self, seen: Seen, watch: _Watch | None, now: float) -> _Watch:
        """Go on watching an owner of whom nothing is known; a renewal proves that it lives.

        Except at once: the last words of a process that was killed a moment ago may still be on their way.
        """
        if watch is None:
            logger.info(
                "%s is owned by %s; waiting up to %g s for a sign of life",
                *(self._storage.url, named(seen.record), self._patience_s(seen)),
            )
            return _Watch(number=seen.number, since=now, begun=now)
        if seen.number == watch.number:
            return watch
        if now - watch.begun > self._patience_s(seen) / 10:
            raise self._busy(seen)
        return _Watch(number=seen.number, since=now, begun=watch.begun)

    def _patience_s(self, seen: Seen) -> float:
        return self._duration_s if seen.record is None else seen.record.duration_s

    def _claim(self, seen: Seen) -> bool:
        """Publish the next number, and say whether that has made this job the owner."""
        begun, number = self._machine.now(), seen.number + 1
        self._acquired_at = time.time()
        failure: StorageError | None = None
        try:
            self._storage.publish(file_name(number), self._record(released=False).to_bytes())
        except FileExistsError:
            return False
        except StorageError as error:  # it may have got through nevertheless
            failure = error
        promises = self._storage.capabilities
        if not promises.exclusive_publish and promises.shared is not False:
            self._machine.pause(SETTLE_S)
        after = look(self._storage)
        if not self._is_mine(after):
            if failure is not None and after.number == seen.number:
                raise failure
            return False
        self._number, self._valid_until, self._is_owner = number, begun + self._duration_s, True
        self._tidy(name for name, old in after.files.items() if name != file_name(number) and old <= number)
        return True

    def still_held(self, *, share: float = 0.0) -> bool:
        """Say whether this job surely owns the directory now, as far as it knows; asks the storage nothing.

        Args:
            share: For how much of the lease's duration it has to be its own from now on.
        """
        is_owner = self._is_owner and self._taker is None and not self._stop.is_set()
        return is_owner and self._machine.now() + share * self._duration_s < self._valid_until

    def check(self) -> None:
        """Make sure that this job owns the directory, and for half the lease's duration; call it before a publish.

        Raises:
            DirectoryBusyError: Another job has taken it over.
            StorageError: The lease could not be read or renewed.
        """
        with self._lock:
            self._insist()
            seen = look(self._storage)
            if seen.number != 0 and not self._is_mine(seen):
                self._lose(seen)
            self._number = max(self._number, seen.number)
            if seen.number == 0 or self._valid_until - self._machine.now() < self._duration_s / 2:
                self._renew(released=False)

    def renew(self) -> None:
        """Renew the lease now.

        Raises:
            DirectoryBusyError: Another job has taken it over.
            StorageError: It could not be renewed; it stands until its duration is over, and can be renewed after that
                if nobody has taken it over.
        """
        with self._lock:
            self._renew(released=False)

    def conclude(self, outcome: Outcome) -> None:
        """Say how this job ends, while it still owns the directory.

        Raises:
            DirectoryBusyError: Another job has taken it over.
            StorageError: It could not be written; the next renewal, or `release`, tries again.
        """
        with self._lock:
            self._outcome = outcome
            self._renew(released=False)

    def release(self, outcome: Outcome | None = None) -> None:
        """Give the directory back, and say how this job ends, if that was not said before.

        A failure is a warning, for then others take it over as that of a dead owner.
        """
        self._stop.set()
        with self._lock:
            if not self._is_owner:
                return
            self._outcome = self._outcome or outcome
            try:
                if self._taker is None:
                    self._renew(released=True)
            except (DistckptError, OSError) as error:
                logger.warning("could not give %s back: %s", self._storage.url, error)
            finally:
                self._is_owner = False

    def _keep(self) -> None:
        """Renew from time to time, sooner after a failure, until the lease is given back or lost."""
        pause_s, is_failing = self._duration_s / 3, False
        while not self._stop.wait(pause_s):
            try:
                with self._lock:
                    if self._stop.is_set():
                        return
                    self._renew(released=False)
            except DirectoryBusyError as error:
                logger.error("%s", error)
                return
            except Exception as error:  # noqa: BLE001  whatever it is, the next try may do better
                if not is_failing:
                    logger.warning("could not renew the lease of %s, trying on: %s", self._storage.url, error)
                pause_s, is_failing = self._duration_s / 12, True
            else:
                if is_failing:
                    logger.info("renewed the lease of %s again", self._storage.url)
                pause_s, is_failing = self._duration_s / 3, False

    def _renew(self, *, released: bool) -> None:
        """Publish the next number. In time, that nobody has it yet shows that nobody has a higher one."""
        self._insist()
        failure: Exception | None = None
        for _ in range(RENEW_TRIES):
            begun, number = self._machine.now(), self._number + 1
            try:
                self._storage.publish(file_name(number), self._record(released=released).to_bytes())
            except (FileExistsError, StorageError) as error:
                failure = error
                if not self._got_through():
                    raise
                continue
            is_sure = self._machine.now() < self._valid_until and self._storage.capabilities.exclusive_publish
            if not is_sure and not released and not self._is_mine(seen := look(self._storage)):
                self._lose(seen)
            old, self._number, self._valid_until = self._number, number, begun + self._duration_s
            self._tidy([file_name(old)])
            return
        assert failure is not None
        raise failure

    def _got_through(self) -> bool:
        """After a failed try: say whether it, or an earlier one, was done all the same; raise if the lease is lost."""
        seen = look(self._storage)
        if seen.number != 0 and not self._is_mine(seen):
            self._lose(seen)
        got_through = seen.number > self._number
        self._number = max(self._number, seen.number)
        return got_through

    def _is_mine(self, seen: Seen) -> bool:
        return seen.record is not None and seen.record.job == self._job

    def _insist(self) -> None:
        if not self._is_owner:
            raise UsageError(problem="this lease is not held", fix="acquire it first")
        if self._taker is not None:
            self._lose(self._taker)

    def _lose(self, seen: Seen) -> None:
        self._taker = seen
        raise self._busy(seen, taken_over=True)

    def _busy(self, seen: Seen, *, taken_over: bool = False) -> DirectoryBusyError:
        record = seen.record
        return DirectoryBusyError(
            path=self._storage.url,
            host=None if record is None else record.owner.host,
            pid=None if record is None else record.owner.pid,
            since=None if record is None else record.acquired,
            taken_over=taken_over,
        )

    def _record(self, *, released: bool) -> Record:
        return Record(
            job=self._job,
            owner=self._machine.me,
            acquired=self._acquired_at,
            renewed=time.time(),
            duration_s=self._duration_s,
            run=self.run,
            released=released,
            outcome=self._outcome,
        )

    def _tidy(self, names: Iterable[str]) -> None:
        """Delete files of numbers that are passed; what stays is deleted when the lease is next acquired."""
        passed = list(names)
        try:
            if passed:
                self._storage.delete(passed)
        except DistckptError as error:
            logger.debug("could not tidy up the lease of %s: %s", self._storage.url, error)

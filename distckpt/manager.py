"""The manager: the checkpoints of one run, from its first step to its last, over all its restarts."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import Any, Self, get_args

from distckpt import catalog
from distckpt.catalog import Checkpoint
from distckpt.errors import ConfigError, DistckptError, UsageError
from distckpt.inspection import Inspection, Mode
from distckpt.interval import Every
from distckpt.manifest import Layout
from distckpt.pace import Pace, past_uptimes
from distckpt.preemption import Preemption
from distckpt.ranks import Ranks
from distckpt.restore import RestoreRequest, is_torn, restore
from distckpt.retention import Retention
from distckpt.saver import Saver, WhenBusy
from distckpt.schedule import Schedule
from distckpt.storage import open_storage
from distckpt.tenure import Tenure
from distckpt.values import Json

logger = logging.getLogger("distckpt")

TIMEOUT_S = 1800.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class CheckpointManager:
    """The checkpoints of one run: saved when due, restored after a restart, kept as the retention says.

        state = {"model": model, "optimizer": optimizer}
        with CheckpointManager("s3://bucket/run-7", every=500, keep=3) as ckpt:
            for step in ckpt.steps(state, until=10_000):
                train_one(model, optimizer, next(batches))

    A save copies this rank's share to host memory and returns; a thread writes it, and commits it once every rank has.
    One save is in flight at most: `when_busy` says what the next one does. If it failed, that is logged at once, and
    raised by the next `save`, `wait`, `close`, or `step` at which a save is due. Old checkpoints are deleted beside the
    training, too, after the commit; only `wait` and `close` wait for that.

    `every="auto"` saves first after 10 steps, to see what a save costs, and then so often that the time lost to saves
    and to failures is least: Young's and Daly's interval, from the stall, what steps take longer while a save is
    written, and `mtbf_s`. It is at most an hour, and never so short that saves cost more than 5 % of the training, that
    one waits for the other, or 10 s. The choice and its predicted cost are logged whenever it changes.

    A job that saves owns its directory, from its first restore or save until it is closed: a second one fails with the
    owner's host, process and time, and a dead owner's place is taken, at once on the same host, after a minute from
    another one. Readers (`restore` without `every`, `load`, the command line) need no ownership. What killed saves have
    left is deleted at the start.

    Args:
        directory: The run's directory: a path, or a URL that fsspec knows, such as "s3://bucket/run-7".
        every: Save each so many steps, or after a time ("90s", "10min", "2h"), or "auto"; None saves only when told.
        keep: Which checkpoints to keep; a number means the newest so many.
        layout: Who writes: all ranks their share ("sharded"), or rank 0 alone ("full").
        background: Whether to write on a thread while training goes on.
        timeout_s: How long to wait for another rank at most, in seconds.
        storage_options: For the URL's file system, as fsspec takes them.
        rng: Whether to save and restore each rank's random-number generators.
        config: The run's configuration, to be kept in each checkpoint; plain JSON values.
        signals: The signals that ask for one last save and the end of the loop.
        mtbf_s: The mean time between failures of the job, in seconds, for `every="auto"`; None estimates it: six
            hours (less above 8,000 ranks), corrected by how long this process has run and by the restarts that the
            newest checkpoints show.
        when_busy: What a save does that finds one in flight: "wait" for it, "skip" with a warning, or "raise". The last
            save of `steps`, and that of a preemption, wait.
        overlap: Whether a GPU goes on training while it copies what changes only in an optimizer's step; that step then
            waits for the copy. False, if parameters are changed by other means between a save and the next step.
        check_replicas: What happens if ranks differ in parameters or optimizer states of which each holds its own copy
            of the same: "warn", not to save it ("error"), or nothing is compared ("off"). Each save compares another
            part, about 1 MB, on the thread that writes.
        check_finite: What happens if parameters or optimizer states hold NaN or infinities: "warn", not to save it
            ("error"), or nothing is looked at ("off"). The thread that writes looks at all that it writes.

    Attributes:
        preempted: Whether the loop ended because of such a signal, after its last save was committed.

    Raises:
        ConfigError: A setting is out of range, or the URL is malformed.
        DependencyError: A package that the URL needs is not installed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int | str | None = None,
        keep: int | Retention = 3,
        layout: Layout = "sharded",
        background: bool = True,
        timeout_s: float = TIMEOUT_S,
        storage_options: Mapping[str, Any] | None = None,
        rng: bool = True,
        config: Mapping[str, Json] | None = None,
        signals: Sequence[signal.Signals] = SIGNALS,
        mtbf_s: float | None = None,
        when_busy: WhenBusy = "wait",
        overlap: bool = True,
        check_replicas: Mode = "warn",
        check_finite: Mode = "warn",
    ) -> None:
        if layout not in ("sharded", "full"):
            raise ConfigError(source="CheckpointManager", problem=f'layout must be "sharded" or "full", is {layout!r}')
        if not timeout_s > 0:
            raise ConfigError(source="CheckpointManager", problem=f"timeout_s must be above 0, is {timeout_s!r}")
        if mtbf_s is not None and not 0 < mtbf_s < math.inf:
            raise ConfigError(source="CheckpointManager", problem=f"mtbf_s must be above 0, is {mtbf_s!r}")
        if when_busy not in get_args(WhenBusy):
            problem = f'when_busy must be "wait", "skip" or "raise", is {when_busy!r}'
            raise ConfigError(source="CheckpointManager", problem=problem)
        for name, mode in {"check_replicas": check_replicas, "check_finite": check_finite}.items():
            if mode not in get_args(Mode):
                problem = f'{name} must be "off", "warn" or "error", is {mode!r}'
                raise ConfigError(source="CheckpointManager", problem=problem)
        self.preempted = False
        self._storage = open_storage(directory, storage_options=storage_options)
        self._every = Every.of(every)
        self._owns = self._every != Every()  # who saves by itself is no reader
        self._timeout_s = timeout_s
        self._rng = rng
        self._preemption = Preemption(signals)
        self._pace = Pace(self._every, mtbf_s=mtbf_s)
        self._schedule = Schedule(self._every, pace=self._pace, preemption=self._preemption)
        self._tenure = Tenure(timeout_s=timeout_s)
        self._saver = Saver(
            self._storage,
            retention=Retention.of(keep),
            pace=self._pace,
            layout=layout,
            background=background,
            when_busy=when_busy,
            rng=rng,
            config=config,
            tenure=self._tenure,
            inspection=Inspection(replicas=check_replicas, finite=check_finite),
            overlap=overlap,
        )
        self._is_unused = True  # nothing has been restored, and no step done: the state is worth nothing yet
        self._is_torn = False
        self._channels: tuple[Ranks, Ranks] | None = None
        self._closed = False

    def __enter__(self) -> Self:
        self._preemption.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # Another rank may be gone for the same reason: what is in flight gets its chance, but hides no error.
        try:
            self._close(because=error)
        except DistckptError as failed:
            logger.error("while leaving because of %s: %s", type(error).__name__, failed)

    @property
    def directory(self) -> str:
        """The run's directory, as a path or URL."""
        return self._storage.url

    @property
    def num_skipped(self) -> int:
        """How many saves were skipped because one was in flight."""
        return self._saver.num_skipped

    @property
    def _ranks(self) -> Ranks:
        """The channel of the training's thread."""
        return self._open_channels()[0]

    def _open_channels(self) -> tuple[Ranks, Ranks]:
        """Return the channels of the training's thread and of the writing one, made at first use."""
        if self._closed:
            raise UsageError(problem="this manager is closed", fix="make a new CheckpointManager")
        if self._channels is None:
            self._channels = Ranks(timeout_s=self._timeout_s), Ranks(timeout_s=self._timeout_s)
            self._preemption.listen()
        return self._channels

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The committed checkpoints, oldest first; those whose manifest is damaged are left out.

        Raises:
            StorageError: The directory could not be read.

        Ranks: any; reads the storage.
        """
        return catalog.committed(self._storage, catalog.scan(self._storage))

    @property
    def latest(self) -> Checkpoint | None:
        """The newest committed checkpoint; None if there is none.

        Raises:
            StorageError: The directory could not be read.

        Ranks: any; reads the storage.
        """
        for folder in reversed(catalog.scan(self._storage)):
            found = catalog.committed(self._storage, [folder])
            if found:
                return found[0]
        return None

    def steps(self, state: MutableMapping[str, Any], *, until: int) -> Iterator[int]:
        """Restore the newest good checkpoint, then yield each step that is still to be done.

        The body of the loop does one step; when it comes back here the step counts as completed on this rank.
        A save is made when due and after the last step. After a signal the loop ends, with the step saved.

        Args:
            state: What to save and restore; see `save`.
            until: The last step.

        Raises:
            As `restore`, `step` and `wait` do.

        Ranks: all (collective); blocks as `restore` and `step` do, and at the end until the last save is committed.
        """
        self._owns = True
        done = self.restore(state)
        for step in range(done + 1, until + 1):
            yield step
            if self._complete(step, state, None, last=step == until):
                return
        self.wait()

    def restore(
        self,
        state: MutableMapping[str, Any],
        *,
        step: int | None = None,
        skip: Sequence[str] = (),
        only: Sequence[str] = (),
    ) -> int:
        """Load the newest good checkpoint into `state`, in place, and return its step; 0 on a fresh directory.

        A damaged checkpoint is put aside with a warning, and the next older one is taken.
        The first restore of a manager, that of a restarted job, reads into the state at once; if no checkpoint proves
        good, the state then holds parts of what was read, the error says so, and `save` refuses to save that.
        Later ones, and those of a named step, change nothing before all is known to be good.

        Args:
            state: What to load into; objects in place, plain values are replaced in the dict.
            step: Load the checkpoint of this step instead.
            skip: Shell patterns of entries to leave as they are: ["model.head.*", "optimizer"].
            only: Shell patterns of the only entries to load.

        Raises:
            StateMismatchError: The checkpoint does not fit; the state is as it was.
            CheckpointDamagedError: There are checkpoints, but no good one.
            CheckpointNotFoundError: The step that was asked for is not there.
            DirectoryBusyError: This manager saves by itself, and another job owns the directory.
            ConfigError: Likewise, and the ranks of different hosts see different directories.
            RankFailedError: A rank failed.
            RankTimeoutError: A rank did not come.
            StorageError: The directory could not be read.

        Ranks: all (collective); blocks until every rank has loaded.
        """
        request = RestoreRequest(
            step=step, skip=skip, only=only, rng=self._rng, heal=step is None, fresh=step is None and self._is_unused
        )
        ranks = self._ranks
        self._saver.settle()
        if self._owns:
            self._saver.own(ranks)
        self._is_unused = False
        begun = time.monotonic()
        try:
            loaded = restore(state, request, storage=self._storage, ranks=ranks)
        except BaseException as error:
            self._is_torn = self._is_torn or is_torn(error)
            raise
        self._is_torn = self._is_torn and loaded is None
        if self._owns:
            self._saver.sweep()
        self._pace.restart(0 if loaded is None else loaded[1].step)
        if loaded is None:
            return 0
        _, manifest = loaded
        self._saver.resume(manifest)
        if ranks.rank == 0:
            if self._every.auto:
                self._pace.ended_s = past_uptimes(self._storage)
            logger.info(
                "restored step %d from %s: %.1f MB in %.2f s",
                *(manifest.step, self.directory, manifest.num_bytes / 1e6, time.monotonic() - begun),
            )
        return manifest.step

    def step(self, step: int, state: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None) -> bool:
        """Say that `step` is completed: save if it is due, and return whether to leave the loop.

        Args:
            step: Optimizer steps completed.
            state: What to save; see `save`.
            metrics: What was measured at this step; "best" retention looks at it.

        Returns:
            True once a signal has asked for a stop, all ranks have agreed on this step, and its save is committed.

        Raises:
            As `save` and `wait` do, when a save or a stop is due.

        Ranks: all (collective), once after every step; blocks when a save or a stop is due.
        """
        return self._complete(step, state, metrics, last=False)

    def _complete(
        self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float] | None, *, last: bool
    ) -> bool:
        """Do what is due after a step; a save that is the last one waits for the one in flight."""
        ranks = self._ranks
        self._pace.step_ended(world_size=ranks.world_size, tell=ranks.rank == 0)
        self._is_unused = False
        due = self._schedule.after(step, ranks, busy=self._saver.is_busy, last=last)
        if due.save:
            busy = due.busy and not (due.stop or last)
            self._saver.save(step, state, metrics, channels=self._open_channels(), busy=busy)
        if due.stop:
            self.wait()
            self.preempted = True
            self._tenure.conclude("preempted", step=step)  # the time to say so at the end may be too short
        self._pace.step_begins(writing=self._saver.is_busy)
        return due.stop

    def prewarm(self, state: Mapping[str, Any]) -> int:
        """Plan and allocate now what the first save needs, so that it costs no more than the later ones.

        Nothing is written. Call it when the state has its final shape: optimizers make theirs in their first step.

        Args:
            state: What will be saved; see `save`.

        Returns:
            How many bytes of host memory this rank's share takes.

        Raises:
            UnsupportedStateError: The state holds something that cannot be saved; names the key.
            UsageError: The ranks' states do not fit together, or the manager is closed.
            RankFailedError: A rank failed, or the save before did.
            RankTimeoutError: A rank did not come.

        Ranks: all (collective); blocks until the save before is committed and all ranks have come.
        """
        return self._saver.prewarm(state, ranks=self._ranks)

    def save(self, step: int, state: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None) -> None:
        """Save `state` as the checkpoint of `step`; does nothing if this manager has saved or restored that step.

        Args:
            step: Optimizer steps completed.
            state: A dict of objects with `state_dict` and `load_state_dict`, tensors, and plain values.
                What differs from rank to rank is kept for each rank if it is marked by `PerRank`, or is no module and
                no optimizer and is found to differ.
            metrics: What was measured at this step.

        Raises:
            UnsupportedStateError: The state holds something that cannot be saved; names the key.
            UsageError: The ranks' states do not fit together, or the manager is closed.
            DirectoryBusyError: Another job owns the directory, or has taken it over.
            ConfigError: The ranks of different hosts see different directories.
            NonFiniteStateError: The state holds NaN or infinities, and `check_finite` is "error".
            StateDivergedError: The ranks' states differ, and `check_replicas` is "error".
            CheckpointExistsError: The step has been committed by somebody else.
            SaveInFlightError: The save before is still being written, and `when_busy` is "raise".
            RankFailedError: A rank failed in this save, or in the one before that ran in the background.
            RankTimeoutError: A rank did not come.
            StorageError: As the only rank, it could not be written.

        Ranks: all (collective); blocks until the save before is committed (see `when_busy`), all ranks have come, and
            this rank's share lies in host memory; without `background`, until the checkpoint is committed.
        """
        ranks = self._ranks
        if type(step) is not int or step < 0:
            raise UsageError(problem=f"step must be an int from 0 on, is {step!r}")
        if self._is_torn:
            raise UsageError(
                problem="the state holds parts of a checkpoint that failed to load, and is not saved",
                fix="restore a whole one, or build the state anew and make a new CheckpointManager",
            )
        self._is_unused = False
        busy = self._saver.agreed_busy(step, ranks=ranks)
        self._saver.save(step, state, metrics, channels=self._open_channels(), busy=busy)

    def wait(self) -> None:
        """Return once no save is in flight, and what retention does not keep is deleted.

        Raises:
            RankFailedError: The save that was in flight failed, on whatever rank; raised once.
            RankTimeoutError: A rank did not come to it.
            CheckpointExistsError: Its step has been committed by somebody else.
            StorageError: As the only rank, it could not be written.

        Ranks: any; blocks until the save in flight is committed and, on rank 0, pruning has ended.
        """
        try:
            self._saver.await_commit()
        finally:
            self._saver.await_pruning()

    def close(self) -> None:
        """Wait for the save in flight and give back the signals' handlers; a closed manager saves no more.

        Raises:
            As `wait` does.

        Ranks: any; blocks as `wait` does.
        """
        self._close(because=None)

    def _close(self, *, because: BaseException | None) -> None:
        if self._closed:
            return
        try:
            self.wait()
        except DistckptError as error:
            because = because or error
            raise
        finally:
            self._closed = True
            self._preemption.ignore()
            if isinstance(because, SystemExit) and not because.code:
                because = None
            reason = None if because is None else f"{type(because).__name__}: {because}".partition("\nFix:")[0]
            self._tenure.end("complete" if reason is None else "failed", step=self._saver.saved_step, reason=reason)
            if because is None and self._channels is not None:
                self._channels[0].part()

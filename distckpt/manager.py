"""The manager: the checkpoints of one run, from its first step to its last, over all its restarts."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from distckpt import catalog
from distckpt.arguments import check_above_zero, check_choice
from distckpt.boundary import Boundary
from distckpt.branches import Home
from distckpt.bulletin import Bulletin
from distckpt.catalog import Checkpoint
from distckpt.errors import DistckptError, UsageError
from distckpt.events import Callback
from distckpt.inspection import Inspection, Mode
from distckpt.interval import Every
from distckpt.manifest import Layout
from distckpt.pace import Pace
from distckpt.preemption import Preemption, known_deadline
from distckpt.progress import Progress
from distckpt.ranks import Ranks
from distckpt.restore import RestoreRequest
from distckpt.restorer import Restorer
from distckpt.retention import Retention
from distckpt.saver import Saver, WhenBusy
from distckpt.tenure import Tenure
from distckpt.values import Json

logger = logging.getLogger("distckpt")

TIMEOUT_S = 1800.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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
    and to failures is least (see `distckpt.interval`). The choice and its predicted cost are logged when it changes.

    A job that saves owns its directory, from its first restore or save until it is closed: a second one fails with the
    owner's host, process and time, and a dead owner's place is taken, at once on the same host, after a minute from
    another one. Who only reads needs no ownership. What killed saves have left is deleted at the start.

    A signal on any rank asks for one last save and the end of the loop. If the time that is left is too short for it,
    the save in flight is finished, or none is made; the log says which. In time before its allocation ends, a run stops
    by itself. Either way the directory records that it was preempted.

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
        signals: Those that ask for a stop; SIGUSR1 is left alone where other than Python code, as faulthandler, has it.
        grace_s: Seconds from a signal until the launcher kills; None is what torchrun says, if it forwards the signal.
        ends_at: When the allocation ends, in seconds since 1970; None is what Slurm says (`SLURM_JOB_END_TIME`).
        mtbf_s: The mean time between failures of the job, in seconds, for `every="auto"`; None estimates it: six
            hours (less above 8,000 ranks), corrected by the restarts that the newest checkpoints show.
        when_busy: What a save does that finds one in flight: "wait" for it, "skip" with a warning, or "raise". The last
            save of `steps`, and that of a preemption, wait.
        overlap: Whether a GPU goes on training while it copies what changes only in an optimizer's step; that step then
            waits for the copy. False, if parameters change by other means before it: that save is refused, if found.
        check_replicas: What happens if ranks differ in their copies of the same parameters or optimizer states:
            "warn", not to save it ("error"), or nothing is compared ("off"). Each save compares another 1 MB.
        check_finite: What happens if parameters or optimizer states hold NaN or infinities: "warn", not to save it
            ("error"), or nothing is looked at ("off"). The thread that writes looks at all that it writes.
        memory_tier: Whether each node also keeps what its ranks write of the newest checkpoint in its shared memory, to
            be read there after a crash; see docs/memory-tier.md.
        at: The step of the checkpoint that a new branch goes on from; restarts may leave it out.
        branch: Go on in the branch of this name, which has a directory of its own below `directory`, `branches/<name>`,
            and leaves all else there as it is. Its first restore makes it, and loads the checkpoint of step `at`.
        callbacks: What is told of each event, on rank 0, by this thread: functions of one `distckpt.events.Event`,
            called at the end of each method here; one that raises is logged and dropped. See docs/events.md.

    Attributes:
        preempted: Whether the loop ended by such a request, with the last save committed if there was time for one.

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
        grace_s: float | None = None,
        ends_at: float | None = None,
        mtbf_s: float | None = None,
        when_busy: WhenBusy = "wait",
        overlap: bool = True,
        check_replicas: Mode = "warn",
        check_finite: Mode = "warn",
        memory_tier: bool = False,
        at: int | None = None,
        branch: str | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        owner = type(self).__name__
        check_above_zero(owner, timeout_s=timeout_s, mtbf_s=mtbf_s, grace_s=grace_s, ends_at=ends_at)
        check_choice(owner, Layout, layout=layout)
        check_choice(owner, WhenBusy, when_busy=when_busy)
        check_choice(owner, Mode, check_replicas=check_replicas, check_finite=check_finite)
        self.preempted = False
        self._home = Home(directory, at=at, branch=branch, storage_options=storage_options)
        interval = Every.of(every)
        self._owns = interval != Every() or self._home.is_named  # who saves by itself is no reader
        self._timeout_s = timeout_s
        self._rng = rng
        self._preemption = Preemption(signals, deadline=known_deadline(grace_s=grace_s, ends_at=ends_at))
        self._pace = Pace(interval, mtbf_s=mtbf_s)
        self._tenure = Tenure(timeout_s=timeout_s)
        self._bulletin = Bulletin(callbacks)
        self._saver = Saver(
            self._home.storage,
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
            memory_tier=memory_tier,
            tell=self._bulletin.post,
        )
        self._restorer = Restorer(self._home, saver=self._saver, pace=self._pace, bulletin=self._bulletin)
        self._boundary = Boundary(
            interval,
            pace=self._pace,
            preemption=self._preemption,
            saver=self._saver,
            tenure=self._tenure,
            tell=self._bulletin.post,
            insist=self._restorer.insist_whole,
        )
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
        return self._home.storage.url

    @property
    def num_skipped(self) -> int:
        """How many saves were skipped because one was in flight."""
        return self._saver.num_skipped

    @property
    def progress(self) -> Progress:
        """How the saving stands, on any thread; for a progress line: `bar.set_postfix_str(str(ckpt.progress))`."""
        return self._saver.progress

    @property
    def job(self) -> str:
        """The short name that this job has in its events."""
        return self._bulletin.job

    @property
    def stopping(self) -> bool:
        """Whether this job is to stop, as far as this rank knows now; once true, it stays so.

        For long work between two steps, such as an evaluation, to end early. Ranks see it at different moments.

        Ranks: any; asks the store one short question.
        """
        return self._boundary.is_stopping(self._ranks)

    @property
    def _ranks(self) -> Ranks:
        return self._open_channels()[0]

    def _open_channels(self) -> tuple[Ranks, Ranks]:
        """Return the training thread's channel and the writing one's, made at first use."""
        if self._closed:
            raise UsageError(problem="this manager is closed", fix="make a new CheckpointManager")
        if self._channels is None:
            self._channels = Ranks(timeout_s=self._timeout_s), Ranks(timeout_s=self._timeout_s)
            self._preemption.listen()
            self._bulletin.begin(self._channels[0], directory=self.directory)
        return self._channels

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The committed checkpoints, oldest first; those whose manifest is damaged are left out.

        Raises:
            StorageError: The directory could not be read.
        """
        return catalog.committed(self._home.storage, catalog.scan(self._home.storage))

    @property
    def latest(self) -> Checkpoint | None:
        """The newest committed checkpoint, of a branch without one what it went off from; None if there is none.

        Raises:
            StorageError: The directory could not be read.
        """
        return self._home.newest()

    def steps(self, state: MutableMapping[str, Any], *, until: int) -> Iterator[int]:
        """Restore the newest good checkpoint, then yield each step that is still to be done.

        The body of the loop does one step; when it comes back here the step counts as completed on this rank.
        A save is made when due and after the last step. After a signal the loop ends, with the step saved; before the
        first step, at once.

        Args:
            state: What to save and restore; see `save`.
            until: The last step.

        Raises:
            As `restore`, `step` and `wait` do.

        Ranks: all (collective); blocks as `restore` and `step` do, and at the end until the last save is committed.
        """
        self._owns = True
        done = self.restore(state)
        if done < until and self._ranks.agree("start of the loop", lambda: self.stopping, any):
            self._complete(done, state, stop=True)
            return
        for step in range(done + 1, until + 1):
            yield step
            if self._complete(step, state, last=step == until):
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
            ConfigError: There is no such branch, or it went off from another step.
            DirectoryBusyError: This manager saves by itself, and another job owns the directory.
            ConfigError: Likewise, and the ranks of different hosts see different directories.
            RankFailedError: A rank failed.
            RankTimeoutError: A rank did not come.
            StorageError: The directory could not be read.

        Ranks: all (collective); blocks until every rank has loaded.
        """
        request = RestoreRequest(step=step, skip=skip, only=only, rng=self._rng, heal=step is None)
        done = self._restorer.restore(state, request, ranks=self._ranks, owns=self._owns)
        self._bulletin.deliver()
        return done

    def step(
        self, step: int, state: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None, stop: bool = False
    ) -> bool:
        """Say that `step` is completed: save if it is due, and return whether to leave the loop.

        Args:
            step: Optimizer steps completed.
            state: What to save; see `save`.
            metrics: What was measured at this step; "best" retention looks at it.
            stop: Whether the ranks have agreed among themselves to stop at this step, as after a signal; the same on
                all of them. With step 0 nothing is saved.

        Returns:
            True once a stop was asked for, all ranks agreed on this step, and it is saved, if there was time for that.

        Raises:
            As `save` and `wait` do, when a save or a stop is due.

        Ranks: all (collective), once after every step; blocks when a save or a stop is due.
        """
        return self._complete(step, state, metrics, stop=stop)

    def _complete(
        self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float] | None = None, **due: bool
    ) -> bool:
        self._restorer.state_is_used()
        channels = self._open_channels()
        save = partial(self._saver.save, step, state, metrics, channels=channels)
        leaves = self._boundary.cross(step, channels[0], save, **due)
        if leaves:
            self.preempted = True
            self._saver.await_pruning()
        self._bulletin.deliver()
        return leaves

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
            StorageError: As the only rank, it could not be written; on all, a `StorageFullError`: it does not fit.

        Ranks: all (collective); blocks until the save before is committed (see `when_busy`), all ranks have come, and
            this rank's share lies in host memory; without `background`, until the checkpoint is committed.
        """
        ranks = self._ranks
        if type(step) is not int or step < 0:
            raise UsageError(problem=f"step must be an int from 0 on, is {step!r}")
        self._restorer.insist_whole()
        self._restorer.state_is_used()
        busy = self._saver.agreed_busy(step, ranks=ranks)
        self._saver.save(step, state, metrics, channels=self._open_channels(), busy=busy)
        self._bulletin.deliver()

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
            self._bulletin.deliver()

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
            self._saver.close()
            self._preemption.ignore()
            in_good_order = self._boundary.end(because, preempted=self.preempted)
            self._saver.leave_tier(in_good_order=in_good_order)
            if in_good_order and self._channels is not None:
                self._channels[0].part()
            self._bulletin.deliver()

"""The manager: the checkpoints of one run, from its first step to its last, over all its restarts."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import Any, Self

from distckpt import catalog, names
from distckpt.catalog import Checkpoint
from distckpt.commit import PreparedSave, SaveRequest, commit, prepare
from distckpt.errors import ConfigError, DistckptError, UsageError
from distckpt.manifest import Layout
from distckpt.preemption import Preemption
from distckpt.ranks import Ranks
from distckpt.restore import RestoreRequest, restore
from distckpt.retention import Retention, decide
from distckpt.staging import Staging
from distckpt.storage import open_storage
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
    One save is in flight at most: the next one waits for it. If it failed, that is logged at once, and raised by the
    next `save`, `wait`, `close`, or `step` at which a save is due.

    Args:
        directory: The run's directory: a path, or a URL that fsspec knows, such as "s3://bucket/run-7".
        every: Save each so many steps; None saves only when told.
        keep: Which checkpoints to keep; a number means the newest so many.
        layout: Who writes: all ranks their share ("sharded"), or rank 0 alone ("full").
        background: Whether to write on a thread while training goes on.
        timeout_s: How long to wait for another rank at most, in seconds.
        storage_options: For the URL's file system, as fsspec takes them.
        rng: Whether to save and restore each rank's random-number generators.
        config: The run's configuration, to be kept in each checkpoint; plain JSON values.
        signals: The signals that ask for one last save and the end of the loop.

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
        every: int | None = None,
        keep: int | Retention = 3,
        layout: Layout = "sharded",
        background: bool = True,
        timeout_s: float = TIMEOUT_S,
        storage_options: Mapping[str, Any] | None = None,
        rng: bool = True,
        config: Mapping[str, Json] | None = None,
        signals: Sequence[signal.Signals] = SIGNALS,
    ) -> None:
        if every is not None and (type(every) is not int or every < 1):
            raise ConfigError(source="CheckpointManager", problem=f"every must be at least 1 step, is {every!r}")
        if layout not in ("sharded", "full"):
            raise ConfigError(source="CheckpointManager", problem=f'layout must be "sharded" or "full", is {layout!r}')
        if not timeout_s > 0:
            raise ConfigError(source="CheckpointManager", problem=f"timeout_s must be above 0, is {timeout_s!r}")
        self.preempted = False
        self._storage = open_storage(directory, storage_options=storage_options)
        self._every = every
        self._retention = Retention.of(keep)
        self._layout: Layout = layout
        self._background = background
        self._timeout_s = timeout_s
        self._rng = rng
        self._config = None if config is None else dict(config)
        self._preemption = Preemption(signals)
        self._staging = Staging()
        self._channels: tuple[Ranks, Ranks] | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._run: str | None = None
        self._parent: dict[str, Json] | None = None
        self._resumed_from: int | None = None
        self._saved_step: int | None = None
        self._known: dict[tuple[int, int], Checkpoint] = {}
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
            self.close()
        except DistckptError as failed:
            logger.error("while leaving because of %s: %s", type(error).__name__, failed)

    @property
    def directory(self) -> str:
        """The run's directory, as a path or URL."""
        return self._storage.url

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
        done = self.restore(state)
        for step in range(done + 1, until + 1):
            yield step
            if self.step(step, state):
                return
        if until > done:
            self.save(until, state)
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

        Args:
            state: What to load into; objects in place, plain values are replaced in the dict.
            step: Load the checkpoint of this step instead.
            skip: Shell patterns of entries to leave as they are: ["model.head.*", "optimizer"].
            only: Shell patterns of the only entries to load.

        Raises:
            StateMismatchError: The checkpoint does not fit; the state is as it was.
            CheckpointDamagedError: There are checkpoints, but no good one; the state is as it was.
            CheckpointNotFoundError: The step that was asked for is not there.
            RankFailedError: A rank failed.
            RankTimeoutError: A rank did not come.
            StorageError: The directory could not be read.

        Ranks: all (collective); blocks until every rank has loaded.
        """
        request = RestoreRequest(step=step, skip=skip, only=only, rng=self._rng, heal=step is None)
        begun = time.monotonic()
        ranks = self._ranks
        loaded = restore(state, request, storage=self._storage, ranks=ranks)
        if loaded is None:
            return 0
        _, manifest = loaded
        self._run = manifest.run
        self._parent = {"step": manifest.step, "attempt": manifest.attempt}
        self._resumed_from = self._saved_step = manifest.step
        if ranks.rank == 0:
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
        stop = self._preemption.stops(step, self._ranks)
        if stop or (self._every is not None and step % self._every == 0):
            self.save(step, state, metrics=metrics)
        if stop:
            self.wait()
            self.preempted = True
        return stop

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
            CheckpointExistsError: The step has been committed by somebody else.
            RankFailedError: A rank failed in this save, or in the one before that ran in the background.
            RankTimeoutError: A rank did not come.
            StorageError: As the only rank, it could not be written.

        Ranks: all (collective); blocks until the save before is committed, all ranks have come, and this rank's
            share lies in host memory; without `background`, until the checkpoint is committed.
        """
        ranks, writing_ranks = self._open_channels()
        if type(step) is not int or step < 0:
            raise UsageError(problem=f"step must be an int from 0 on, is {step!r}")
        self.wait()
        if step == self._saved_step:
            return
        begun = time.monotonic()
        request = SaveRequest(
            step=step,
            folder=names.step_name(step),
            run=self._agree_run(ranks),
            layout=self._layout,
            rng=self._rng,
            metrics=_checked(metrics),
            parent=self._parent,
            config=self._config,
        )
        prepared = prepare(state, request, ranks=ranks, staging=self._staging)
        stall_s = time.monotonic() - begun
        if not self._background:
            self._write(prepared, writing_ranks, stall_s)
            return
        self._thread = threading.Thread(
            target=self._write_quietly, args=(prepared, writing_ranks, stall_s), name="distckpt-write", daemon=False
        )
        self._thread.start()

    def _agree_run(self, ranks: Ranks) -> str:
        """Return the run's name, the same on every rank; a new one on a fresh directory."""
        if self._run is None:
            self._run = ranks.agree("naming the run", lambda: None, lambda _: names.new_attempt())
        return self._run

    def _write_quietly(self, prepared: PreparedSave, ranks: Ranks, stall_s: float) -> None:
        """Write on the thread; a failure waits for the next call, but is in the log at once."""
        try:
            self._write(prepared, ranks, stall_s)
        except BaseException as error:  # noqa: BLE001  raised again by wait()
            self._failure = error
            if ranks.rank == 0:
                logger.error("background save failed: %s", error)

    def _write(self, prepared: PreparedSave, ranks: Ranks, stall_s: float) -> None:
        """Write and commit a prepared save, then prune."""
        begun = time.monotonic()
        step = prepared.request.step
        done = commit(prepared, ranks=ranks, storage=self._storage)
        self._saved_step = step
        self._parent = {"step": step, "attempt": prepared.attempt}
        if done is not None:
            facts = catalog.describe(self._storage, done.manifest, folder=prepared.request.folder)
            self._known[step, done.num_bytes] = facts
            logger.info(
                "saved step %d to %s: stall %.3f s, written in %.2f s",
                *(step, self.directory, stall_s, time.monotonic() - begun),
            )
            self._prune(step)

    def _prune(self, newest: int) -> None:
        """Rank 0: delete what retention does not keep, and what dead saves have left; a failure is a warning."""
        try:
            folders = catalog.scan(self._storage)
            plan = decide(
                catalog.committed(self._storage, folders, known=self._known),
                self._retention,
                now=time.time(),
                resumed_from=self._resumed_from,
                pinned=[folder.step for folder in folders if folder.pinned],
            )
            gone = {decision.step for decision in plan if not decision.kept}
            for folder in folders:
                partial = not folder.committed and not folder.damaged and folder.step <= newest
                if folder.step in gone or partial:
                    catalog.remove(self._storage, folder)
        except DistckptError as error:
            logger.warning("could not prune %s: %s", self.directory, error)

    def wait(self) -> None:
        """Return once no save is in flight.

        Raises:
            RankFailedError: The save that was in flight failed, on whatever rank; raised once.
            RankTimeoutError: A rank did not come to it.
            CheckpointExistsError: Its step has been committed by somebody else.
            StorageError: As the only rank, it could not be written.

        Ranks: any; blocks until the save in flight is committed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Wait for the save in flight and give back the signals' handlers; a closed manager saves no more.

        Raises:
            As `wait` does.

        Ranks: any; blocks as `wait` does.
        """
        if self._closed:
            return
        try:
            self.wait()
        finally:
            self._closed = True
            self._preemption.ignore()


def _checked(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """Return metrics as floats.

    Raises:
        UsageError: One is no number; names it.
    """
    checked = {}
    for name, value in (metrics or {}).items():
        try:
            checked[str(name)] = float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                problem=f"metric {name!r} is {value!r:.60}, not a number", fix=f'metrics={{"{name}": float(...)}}'
            ) from error
    return checked

"""The saver: makes the checkpoints of one run, one at a time: stage, write, commit, and then prune.

Invariant: a save begins only when the one before is committed or has failed, and pruning keeps away from it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from distckpt import catalog, names
from distckpt.background import Pruner, PruneRequest, Writing
from distckpt.commit import Look, commit
from distckpt.errors import CheckpointExistsError, SaveInFlightError, StorageFullError, UsageError
from distckpt.events import Callback, Saved, SaveFailed, SaveSkipped
from distckpt.inspection import Inspection
from distckpt.manifest import Layout, Manifest
from distckpt.memorytier import MemoryTier
from distckpt.pace import Pace
from distckpt.preparation import PreparedSave, SaveRequest, prepare, prewarm
from distckpt.progress import Progress
from distckpt.ranks import Ranks
from distckpt.retention import Retention
from distckpt.shards import committed_by
from distckpt.storage import Storage
from distckpt.tenure import ACTION, Tenure
from distckpt.values import Json
from distckpt.workspace import Workspace

logger = logging.getLogger("distckpt")

WhenBusy = Literal["wait", "skip", "raise"]


class Saver:
    """Saves a run's state.

    Args:
        storage: The run's directory.
        retention: Which checkpoints to keep.
        pace: Is told what saves take.
        layout: Who writes.
        background: Whether to write on a thread.
        when_busy: What a save does that finds one in flight.
        rng: Whether to save the random-number generators.
        config: The run's configuration.
        tenure: The job's ownership of the directory.
        inspection: Looks at what is saved.
        overlap: Whether a GPU's training goes on while what changes only in an optimizer's step is copied.
        memory_tier: Whether the node's memory keeps a copy of the newest checkpoint.
        tell: Is told of what is saved, and what not, on the thread where that happens.

    Attributes:
        storage: The run's directory.
        num_skipped: How many saves were skipped because one was in flight.
        uses_tier: Whether the node's memory keeps a copy of the newest checkpoint.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        retention: Retention,
        pace: Pace,
        layout: Layout,
        background: bool,
        when_busy: WhenBusy,
        rng: bool,
        config: Mapping[str, Json] | None,
        tenure: Tenure,
        inspection: Inspection | None = None,
        overlap: bool = True,
        memory_tier: bool = False,
        tell: Callback = lambda event: None,
    ) -> None:
        self.storage = storage
        self.num_skipped = 0
        self._pace = pace
        self._layout: Layout = layout
        self._background = background
        self._when_busy: WhenBusy = when_busy
        self._rng = rng
        self._config = None if config is None else dict(config)
        self._inspection = inspection
        self._overlap = overlap
        self._tier = MemoryTier(storage.url)
        self.uses_tier = memory_tier
        self._workspace = Workspace()
        self._writing = Writing()
        self._tenure = tenure
        self._tell = tell
        self._pruner = Pruner(retention, insist=tenure.insist, tell=tell)
        self._has_swept = False
        self._run: str | None = None
        self._parent: dict[str, Json] | None = None
        self._resumed_from: int | None = None
        self._followed: int | None = None
        self._begun_step: int | None = None
        self._begun_s = 0.0
        self._saved_step: int | None = None
        self._saved_at: float | None = None
        self._under_way: PreparedSave | None = None

    @property
    def saved_step(self) -> int | None:
        """The newest step that is committed or was restored; None if there is none."""
        return self._saved_step

    @property
    def is_busy(self) -> bool:
        """Whether a save is in flight on this rank."""
        return self._writing.busy

    @property
    def progress(self) -> Progress:
        """How the saving stands on this rank; may be asked on any thread."""
        save, saved_at = self._under_way, self._saved_at
        return Progress(
            saved_step=self._saved_step,
            saved_ago_s=None if saved_at is None else time.monotonic() - saved_at,
            saving_step=None if save is None else save.request.step,
            saving_bytes=0 if save is None or save.staged is None else save.staged.plan.num_bytes,
            written_bytes=0 if save is None or save.staged is None else save.staged.num_taken,
        )

    @property
    def in_flight(self) -> tuple[int, float] | None:
        """The step of the save in flight on this rank, and for how many seconds it has been; None if there is none."""
        if self._begun_step is None or not self._writing.busy:
            return None
        return self._begun_step, time.monotonic() - self._begun_s

    def resume(self, manifest: Manifest) -> None:
        """Go on from a checkpoint: it is the parent of the next one, and is kept.

        Ranks: any.
        """
        self._run = manifest.run
        self._tenure.name_run(manifest.run)
        self._parent = {"step": manifest.step, "attempt": manifest.attempt}
        self._resumed_from = self._saved_step = manifest.step
        self._saved_at = None

    def follow(self, step: int) -> None:
        """Take note that `step` was the newest one, or 0, when this job read it without owning the directory.

        Ranks: any.
        """
        self._followed = step

    def own(self, ranks: Ranks) -> None:
        """Take the directory, unless this job has it.

        Raises:
            CheckpointExistsError: Another job has gone on there since this one restored; then nothing is saved.
            As `Tenure.begin` does.

        Ranks: all (collective); blocks as `Tenure.begin` does.
        """
        if self._tenure.begin(self.storage, ranks) and self._followed is not None:
            ranks.agree(ACTION, lambda: None, lambda _: self._refuse_newer())

    def _refuse_newer(self) -> None:
        """Rank 0: raise if there is a newer checkpoint than the one that this job goes on from."""
        newest = catalog.find_newest(self.storage)
        if newest is not None and self._followed is not None and newest.step > self._followed:
            name = names.join(newest.name, names.MANIFEST)
            fix = f"restore again: it was committed after this job had looked, and gone on from step {self._followed}"
            raise CheckpointExistsError(
                path=names.join(self.storage.url, name), found=committed_by(self.storage, name), fix=fix
            )

    def sweep(self) -> bool:
        """Have deleted what dead saves before this job left, once, and if the directory is surely its own.

        Returns:
            Whether that was begun now.

        Ranks: any; returns at once.
        """
        begins = not self._has_swept and self._tenure.is_owner
        if begins:
            self._has_swept = True
            self._pruner.sweep(self.storage, spares_youngest=self._tenure.is_after_silence)
        return begins

    def sweep_tier(self, resumed: Manifest | None) -> None:
        """Remove what this run's earlier jobs left in this node's memory, but for the checkpoint that was restored.

        Ranks: any, before a save begins; of a directory that this job owns.
        """
        self._tier.sweep(resumed.attempt if resumed is not None and self.uses_tier else None)

    def leave_tier(self, *, in_good_order: bool) -> None:
        """Let go of the memory tier; a job that has saved and ends in good order takes it along.

        Ranks: any, once no save is in flight.
        """
        self._tier.leave(in_good_order=in_good_order and self.uses_tier and self._tenure.has_begun)

    def prewarm(self, state: Mapping[str, Any], *, ranks: Ranks) -> int:
        """Plan and allocate what a save of `state` needs, its thread too; return this rank's bytes.

        Raises:
            As `commit.prewarm` and `await_commit` do.

        Ranks: all (collective); blocks until the save before is committed and all ranks have come.
        """
        self.await_commit()
        if self._background:
            self._writing.prewarm()
        return prewarm(state, self._request(0, None, ranks), ranks=ranks, workspace=self._workspace)

    def agreed_busy(self, step: int, *, ranks: Ranks) -> bool:
        """Say whether a save is in flight on any rank, where that decides anything.

        Ranks: all (collective) unless saves wait for each other.
        """
        if self._when_busy == "wait" or not self._background:
            return False
        return ranks.agree(f"save of step {step}", lambda: self.is_busy, any)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
        *,
        channels: tuple[Ranks, Ranks],
        busy: bool,
    ) -> None:
        """Save `state` as the checkpoint of `step`, unless that step is saved, or `when_busy` says otherwise.

        Args:
            step: Optimizer steps completed.
            state: What to save.
            metrics: What was measured at this step.
            channels: Between the training's threads, and between the writing ones.
            busy: Whether all ranks have agreed that a save is in flight; if not, this one waits.

        Raises:
            As `CheckpointManager.save` does.

        Ranks: all (collective); blocks as `CheckpointManager.save` does.
        """
        ranks, writing_ranks = channels
        self._pace.restart(step)
        if busy and self._when_busy != "wait" and step != self._begun_step:
            self._pass_over(step, ranks)
            return
        begun = time.monotonic()
        self.await_commit()
        self._begun_s = time.monotonic()
        if step == self._saved_step:
            return
        self.own(ranks)
        if self.sweep() or self._begun_step is None:
            # What dead saves have left goes before the first save adds to it; it may lie in just this folder.
            self._pruner.wait()
        request = self._request(step, metrics, ranks)
        self._pruner.spare(step)
        try:
            prepared = self._prepare(state, request, ranks)
        except BaseException as error:
            self._pruner.release()
            self._tell(SaveFailed.of(error, step=step))
            raise
        self._begun_step = step
        if self._background:
            stall_s = time.monotonic() - begun
            self._writing.start(lambda: self._write(prepared, writing_ranks, begun, stall_s), tell=ranks.rank == 0)
        else:
            self._write(prepared, writing_ranks, begun, None)
        self._pace.restart(step)

    def _prepare(self, state: Mapping[str, Any], request: SaveRequest, ranks: Ranks) -> PreparedSave:
        """Prepare a save; if there is no room for it, once more when all that is to be deleted is gone."""

        def attempt() -> PreparedSave:
            return prepare(
                state,
                request,
                ranks=ranks,
                storage=self.storage,
                workspace=self._workspace,
                copy="now" if self._background else "while writing",
                overlap=self._overlap,
            )

        try:
            return attempt()
        except StorageFullError:  # on all ranks
            self._pruner.wait()
            return attempt()

    def await_commit(self) -> None:
        """Return once no save is in flight.

        Raises:
            DistckptError: It failed, on whatever rank; raised once.

        Ranks: any; blocks until the save in flight is committed.
        """
        self._writing.wait()

    def await_pruning(self) -> None:
        """Return once what retention does not keep is deleted.

        Ranks: any; blocks on rank 0.
        """
        self._pruner.wait()

    def settle(self) -> None:
        """Return once nothing goes on in the background; a failure of the save in flight is kept for later.

        Ranks: any; blocks until the save in flight is committed and, on rank 0, pruning has ended.
        """
        self._writing.join()
        self._pruner.wait()

    def close(self) -> None:
        """Let go of what is held, once no save is in flight.

        Ranks: any.
        """
        self._writing.close()
        self._workspace.close()

    def _pass_over(self, step: int, ranks: Ranks) -> None:
        """Refuse or skip a save, as the one before is still in flight."""
        assert self._begun_step is not None
        self._tell(SaveSkipped(step=step, in_flight=self._begun_step))
        if self._when_busy == "raise":
            raise SaveInFlightError(step=step, in_flight=self._begun_step)
        self.num_skipped += 1
        if ranks.rank == 0:
            logger.warning(
                "save of step %d skipped: the save of step %d is still being written; %d skipped so far",
                *(step, self._begun_step, self.num_skipped),
            )

    def _request(self, step: int, metrics: Mapping[str, float] | None, ranks: Ranks) -> SaveRequest:
        """Return what the save of `step` is told; a fresh run is named first, the same on every rank."""
        if self._run is None:
            self._run = ranks.agree("naming the run", lambda: None, lambda _: names.new_attempt())
            self._tenure.name_run(self._run)
        return SaveRequest(
            step=step,
            folder=names.step_name(step),
            run=self._run,
            layout=self._layout,
            rng=self._rng,
            metrics=_checked(metrics),
            parent=self._parent,
            config=self._config,
            inspection=self._inspection,
        )

    def _write(self, prepared: PreparedSave, ranks: Ranks, begun: float, stall_s: float | None) -> None:
        """Write and commit a prepared save that began at `begun`, then have old ones deleted.

        Without `stall_s` the training stands still until it is committed.
        """
        step, writing_since = prepared.request.step, time.monotonic()
        self._under_way = prepared
        try:
            with self._copying(prepared, ranks.rank) as copy:
                done = commit(
                    prepared,
                    ranks=ranks,
                    storage=self.storage,
                    insist=self._tenure.insist,
                    confirm=self._tenure.confirm,
                    also=copy,
                )
        except BaseException as error:
            self._tell(SaveFailed.of(error, step=step))
            raise
        finally:
            self._under_way = None
            self._pruner.release()
        now = time.monotonic()
        stall_s = now - begun if stall_s is None else stall_s
        self._saved_step, self._saved_at = step, now
        self._parent = {"step": step, "attempt": prepared.attempt}
        self._pace.save_committed(stall_s=stall_s, durable_s=now - self._begun_s)
        if done is None:
            return
        facts = catalog.describe(self.storage, done.manifest, folder=prepared.request.folder)
        self._pruner.known[step, done.num_bytes] = facts
        write_s, num_mb = max(now - writing_since, 1e-6), facts.num_bytes / 1e6
        logger.info(
            "saved step %d to %s: stall %.3f s, %.1f MB written in %.2f s (%.0f MB/s)",
            *(step, self.storage.url, stall_s, num_mb, write_s, num_mb / write_s),
        )
        self._tell(
            Saved(
                step=step,
                stall_s=round(stall_s, 6),
                write_s=round(write_s, 6),
                durable_s=round(now - begun, 6),
                num_bytes=facts.num_bytes,
                world_size=done.manifest.world_size,
                layout=self._layout,
            )
        )
        self._pruner.start(self.storage, PruneRequest(newest=step, resumed_from=self._resumed_from))

    def _copying(self, prepared: PreparedSave, rank: int) -> AbstractContextManager[Look | None]:
        """Copy what is written to the memory tier, if there is to be one, and this rank writes something."""
        if not self.uses_tier or prepared.staged is None:
            return nullcontext()
        return self._tier.copying(prepared.attempt, rank=rank, num_bytes=prepared.staged.plan.num_bytes)


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

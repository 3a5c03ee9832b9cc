"""The second half of a save, on whatever thread: each rank writes its share, and rank 0 commits.

Both halves drive DCP's protocol (plan, write, finish) over `Ranks` rather than over a process group: a failure of any
rank is then known to all, with its name, as an ordinary exception, within a bounded time.
Invariant: the manifest is published by rank 0, after every rank's share is durable, or not at all.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distckpt import catalog, fileplan, names, written
from distckpt.allotment import Allotment
from distckpt.errors import DistckptError, RankFailedError, StorageError
from distckpt.garbage import kept_off
from distckpt.inspection import FiniteCheck
from distckpt.manifest import Manifest, ObjectEntry, check_references, objects_text, to_text
from distckpt.preparation import PreparedSave
from distckpt.ranks import Ranks
from distckpt.shards import Header, RankShare, assemble, publish, write_share
from distckpt.storage import Storage
from distckpt.storage.failures import is_full
from distckpt.values import Json
from distckpt.written import Said, Written

_TIMINGS = ("stage_s", "write_s")

Look = Callable[[int, memoryview], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What rank 0 published: the manifest, and its file's size in bytes."""

    manifest: Manifest
    num_bytes: int


def commit(
    save: PreparedSave,
    *,
    ranks: Ranks,
    storage: Storage,
    insist: Callable[[], None] = lambda: None,
    confirm: Callable[[], None] = lambda: None,
    also: Look | None = None,
) -> Committed | None:
    """Write this rank's share, and once every rank has, publish the manifest.

    Args:
        save: What to commit.
        ranks: The channel of the thread that writes.
        storage: The run's directory.
        insist: Called on rank 0 right before the manifest is published; raises if nothing may be published any more.
        confirm: Called on rank 0 once the manifest is published, or anything has failed; raises if another job has the
            directory by now. Who stood still is taken for dead, and its share for what a dead save has left.
        also: Is called with each piece of this rank's file and where it begins, in order, while it is written.

    Returns:
        On rank 0 what was published, on the others None.

    Raises:
        RankFailedError: A rank failed; the save is abandoned, and what it wrote is removed as far as possible.
        RankTimeoutError: A rank did not come; likewise.
        NonFiniteStateError: The state holds NaN or infinities, and is not to be saved then; likewise.
        StateDivergedError: The ranks' states differ, and are not to be saved then; likewise.
        CheckpointExistsError: The step was committed by somebody else.
        DirectoryBusyError: Another job has taken the directory over.
        StorageError: As the only rank, it could not be written.

    Ranks: all (collective); blocks until the checkpoint is committed.
    """
    committing = _Committing(save, ranks=ranks, storage=storage, insist=insist, confirm=confirm, also=also)
    action, explain = save.request.action, committing.explain
    try:
        verdict = ranks.agree(action, committing.write, committing.finish, explain=explain)
        if verdict.get("is_apart"):
            verdict = ranks.agree(action, committing.tell, committing.finish_told, explain=explain)
        if verdict.get("has_parted"):
            _tell_divergence(save, ranks)
    except BaseException as error:
        save.workspace.told.unsettle()
        if ranks.rank == 0:
            _abandon(save, storage, error, tried=committing.has_tried)
        raise
    save.workspace.told.settle()
    return committing.published


class _Committing:
    """What a rank does in a commit, and on rank 0, what it does for all.

    Attributes:
        published: On rank 0, what was published.
        has_tried: Whether a manifest may be there, whatever was raised.
    """

    def __init__(
        self,
        save: PreparedSave,
        *,
        ranks: Ranks,
        storage: Storage,
        insist: Callable[[], None],
        confirm: Callable[[], None],
        also: Look | None,
    ) -> None:
        self.published: Committed | None = None
        self.has_tried = False
        self._save = save
        self._ranks = ranks
        self._storage = storage
        self._insist = insist
        self._confirm = confirm
        self._also = also
        self._share = RankShare(file=None, blocks=(), offsets=())
        self._reports: list[Written] = []
        self._timings: dict[str, float] = {}
        self._verdict: dict[str, Json] = {}  # what is not as usual

    def write(self) -> Json:
        """Write this rank's share, and return what rank 0 has to know of it."""
        save, rank = self._save, self._ranks.rank
        if save.failure is not None:
            raise save.failure
        begun = time.monotonic()
        check = _finite_check(save)
        look = _looking(self._also, None if check is None else check.look)
        self._share = write_share(
            *(self._storage, save.request.folder, save.attempt),
            rank=rank,
            staged=save.staged,
            look=look,
            hasher=save.workspace.hasher,
        )
        timings = [round(save.stage_s, 4), round(time.monotonic() - begun, 4)]
        # Rank 0 has no need to send its own to itself.
        digests, share = written.told(save, self._share) if rank else ("", None)
        sample = "" if save.sampled is None else save.sampled.digest()[:16]
        return Said(timings, digests, share, sample, () if check is None else check.found()).packed()

    @kept_off()
    def finish(self, facts: list[Json]) -> Json:
        """Rank 0: publish, unless something is wrong, or the ranks do not know what all of them write."""
        inspection, known, allotment = self._save.request.inspection, self._save.workspace.told, self._save.allotment
        said = [Said(*fact) for fact in facts]
        if len({each.sample for each in said}) > 1:
            self._verdict["has_parted"] = True
        if inspection is not None:
            inspection.judge_finite(self._save.request.step, [each.bad for each in said])
            if self._verdict and inspection.replicas == "error":
                return self._verdict
        self._reports = [Written.of(each, known, rank) for rank, each in enumerate(said) if rank]
        slowest = map(max, zip(*(each.timings for each in said), strict=True))
        self._timings = dict(zip(_TIMINGS, slowest, strict=True))
        if any(report.allotted != written.fingerprint(allotment) for report in self._reports):
            return {**self._verdict, "is_apart": True}
        own = written.beyond_allotment(self._share, self._save)
        return self._publish(own, [report.blocks for report in self._reports], allotment)

    def tell(self) -> Json:
        """Return all that this rank has written."""
        share, told = self._share, self._save.workspace.told
        fingerprint = self._save.staged.plan.fingerprint if self._save.staged is not None else ""
        return told.packed("pieces", fingerprint, lambda: fileplan.to_json(share.blocks, share.offsets))

    @kept_off()
    def finish_told(self, facts: list[Json]) -> Json:
        """Rank 0: publish what the ranks have told one by one."""
        told = self._save.workspace.told
        pieces = [told.unpacked(rank, "pieces", fact, fileplan.from_json) for rank, fact in enumerate(facts) if rank]
        return self._publish(self._share, pieces, None)

    def _publish(self, own: RankShare, pieces: Sequence[Json], allotment: Allotment | None) -> Json:
        save = self._save
        others = (report.share(blocks, save.attempt) for report, blocks in zip(self._reports, pieces, strict=True))
        header = _header(save, [report.trees for report in self._reports], self._timings)
        manifest = assemble(header, [own, *others], save.workspace.draft, allotment)
        texts = {"tensors": save.workspace.draft.text, "objects": _objects_text(save, manifest)}
        self._insist()
        self.has_tried = True
        num_bytes = publish(self._storage, save.request.folder, manifest, texts=texts)
        self._confirm()
        self.published = Committed(manifest=manifest, num_bytes=num_bytes)
        return self._verdict

    def explain(self) -> None:
        """Rank 0: say that another job has the directory, if that is why something has failed."""
        with contextlib.suppress(StorageError):
            self._confirm()


def _looking(one: Look | None, other: Look | None) -> Look | None:
    """Return both in one."""
    if one is None or other is None:
        return one or other

    def look(begin: int, piece: memoryview) -> None:
        one(begin, piece)
        other(begin, piece)

    return look


def _abandon(save: PreparedSave, storage: Storage, error: BaseException, *, tried: bool) -> None:
    """Rank 0: remove what a failed save has written, unless its manifest may be there, or may still come."""
    folder = save.request.folder
    with contextlib.suppress(Exception):
        if tried and not (is_full(error) and not _is_committed(storage, folder)):
            return  # a full disk has refused it for good
        catalog.remove_attempt(storage, folder, save.attempt)


def _is_committed(storage: Storage, folder: str) -> bool:
    """Say whether a folder holds a manifest, whoever wrote it."""
    return any(file.name == names.join(folder, names.MANIFEST) for file in storage.list(folder))


def _finite_check(save: PreparedSave) -> FiniteCheck | None:
    """Return a check of this rank's share, for while it is written, if that is wanted."""
    inspection = save.request.inspection
    if save.staged is None or inspection is None or inspection.finite == "off":
        return None
    return inspection.finite_check(save.staged.plan, save.objects)


def _tell_divergence(save: PreparedSave, ranks: Ranks) -> None:
    """Compare the samples tensor by tensor: raise, or, if that is all that is wanted, warn."""
    inspection, sampled = save.request.inspection, save.sampled
    assert inspection is not None
    assert sampled is not None

    def judge(facts: list[Json]) -> None:
        inspection.judge_replicas(save.request.step, facts)

    with contextlib.suppress(DistckptError) if inspection.replicas == "warn" else contextlib.nullcontext():
        ranks.agree(f"comparison of the ranks at step {save.request.step}", sampled.digests, judge)


def _objects_text(save: PreparedSave, manifest: Manifest) -> str:
    """Return the state's keys as JSON; what they refer to is there.

    Raises:
        RankFailedError: It is not; nothing may be committed.
    """
    texts = {}
    try:
        for flat in save.objects:
            entry = manifest.objects[flat.key]
            if flat.per_rank:
                check_references(flat.key, entry.trees, manifest.tensors)
                texts[flat.key] = (entry, [to_text(tree) for tree in entry.trees])
            else:
                absent = set(flat.structure.names) - manifest.tensors.keys()
                if absent:
                    raise ValueError(f"state key {flat.key!r} refers to {min(absent)!r}, which nobody has written")
                texts[flat.key] = (entry, [flat.text])
    except ValueError as error:
        raise RankFailedError(
            action=save.request.action, rank=0, host=socket.gethostname(), cause=str(error)
        ) from error
    return objects_text(texts)


def _header(save: PreparedSave, others: list[dict[str, Json]], timings: dict[str, float]) -> Header:
    """Rank 0: return what the manifest says beyond files and tensors; `others` are the other ranks' own values."""
    request = save.request
    trees = [{o.key: o.tree for o in save.objects if o.per_rank}, *others]
    objects = {
        o.key: ObjectEntry(
            kind=o.kind,
            per_rank=o.per_rank,
            trees=tuple(of_rank[o.key] for of_rank in trees) if o.per_rank else (o.tree,),
        )
        for o in save.objects
    }
    return Header(
        step=request.step,
        run=request.run,
        attempt=save.attempt,
        layout=request.layout,
        world_size=len(trees),
        objects=objects,
        metrics=request.metrics or {},
        timings=timings,
        parent=request.parent,
        config=request.config,
    )

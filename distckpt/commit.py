"""The second half of a save, on whatever thread: each rank writes its share, and rank 0 commits.

Both halves drive DCP's protocol (plan, write, finish) over `Ranks` rather than over a process group: a failure of any
rank is then known to all, with its name, as an ordinary exception, within a bounded time.
Invariant: the manifest is published by rank 0, after every rank's share is durable, or not at all.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from distckpt import catalog, fileplan, names
from distckpt.checksum import digest
from distckpt.errors import DistckptError, RankFailedError, StorageError
from distckpt.garbage import kept_off
from distckpt.inspection import FiniteCheck
from distckpt.manifest import Manifest, ObjectEntry, check_references, objects_text, to_text
from distckpt.preparation import PreparedSave
from distckpt.ranks import Ranks
from distckpt.shards import Header, RankShare, assemble, publish, write_share
from distckpt.state import FlatObject
from distckpt.storage import Storage
from distckpt.storage.failures import is_full
from distckpt.values import Json
from distckpt.workspace import Told

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
    request = save.request
    told = save.workspace.told
    published: list[Committed] = []
    own: list[RankShare] = []
    tried = False

    def write() -> Json:
        if save.failure is not None:
            raise save.failure
        begun = time.monotonic()
        check = _finite_check(save)
        look = _looking(also, None if check is None else check.look)
        share = write_share(storage, request.folder, save.attempt, rank=ranks.rank, staged=save.staged, look=look)
        timings = [round(save.stage_s, 4), round(time.monotonic() - begun, 4)]
        own.append(share)  # rank 0 has no need to send its own to itself
        seen: dict[str, Json] = {"bad": bad} if check is not None and (bad := check.found()) else {}
        if save.sampled is not None:
            seen["sample"] = save.sampled.digest()[:16]
        return {**(_report(save, share, told) if ranks.rank else {}), **seen, "timings": timings}

    @kept_off()
    def finish(facts: list[Json]) -> Json:
        nonlocal tried
        has_parted = len({fact.get("sample") for fact in facts}) > 1
        if request.inspection is not None:
            request.inspection.judge_finite(request.step, [fact.get("bad", []) for fact in facts])
            if has_parted and request.inspection.replicas == "error":
                return {"has_parted": True}
        manifest = _assembled(save, own, facts)
        texts = {"tensors": save.workspace.draft.text, "objects": _objects_text(save, manifest)}
        insist()
        tried = True  # from here on it may be there, whatever is raised
        num_bytes = publish(storage, request.folder, manifest, texts=texts)
        confirm()
        published.append(Committed(manifest=manifest, num_bytes=num_bytes))
        return {"has_parted": has_parted}

    def explain() -> None:
        with contextlib.suppress(StorageError):
            confirm()

    try:
        if ranks.agree(request.action, write, finish, explain=explain)["has_parted"]:
            _tell_divergence(save, ranks)
    except BaseException as error:
        if ranks.rank == 0:
            _abandon(save, storage, error, tried=tried)
        raise
    told.settle()
    return published[0] if published else None


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


def _assembled(save: PreparedSave, own: list[RankShare], facts: list[Json]) -> Manifest:
    """Rank 0: return the manifest of its own share and of those that the others have reported.

    Raises:
        RankFailedError: The shares together do not cover a tensor exactly once; nothing may be committed.
    """
    told = save.workspace.told
    shares, trees = [*own], [{o.key: o.tree for o in save.objects if o.per_rank}]
    for rank, fact in enumerate(facts[1:], start=1):
        blocks = told.unpacked(rank, "blocks", fact["blocks"], fileplan.from_json)
        shares.append(RankShare.from_json(fact["share"], blocks, rank=rank, attempt=save.attempt))
        trees.append({key: told.unpacked(rank, key, tree) for key, tree in fact["trees"].items()})
    return assemble(_header(save, facts, trees), shares, save.workspace.draft)


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


def _report(save: PreparedSave, share: RankShare, told: Told) -> Json:
    """Return what rank 0 has to know of this rank's share; what it knows from the save before only by its digest."""
    fingerprint = save.staged.plan.fingerprint if save.staged is not None else ""
    return {
        "share": share.to_json(),
        "blocks": told.packed("blocks", fingerprint, lambda: fileplan.to_json(share.blocks, share.offsets)),
        "trees": {
            o.key: told.packed(o.key, digest(o.text.encode()), partial(_tree_of, o)) for o in save.objects if o.per_rank
        },
    }


def _tree_of(flat: FlatObject) -> Json:
    return flat.tree


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


def _header(save: PreparedSave, facts: list[Json], trees: list[dict[str, Json]]) -> Header:
    """Rank 0: return what the manifest says beyond files and tensors."""
    request = save.request
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
        world_size=len(facts),
        objects=objects,
        metrics=request.metrics or {},
        timings=dict(zip(_TIMINGS, map(max, zip(*(fact["timings"] for fact in facts), strict=True)), strict=True)),
        parent=request.parent,
        config=request.config,
    )

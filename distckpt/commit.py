"""One save: from the user's objects to a committed checkpoint.

`prepare` runs on the training's thread and ends when this rank's share lies in host memory; `commit` may run on another
thread. Both drive DCP's protocol (plan, write, finish) over `Ranks` rather than over a process group: a failure of any
rank is then known to all, with its name, as an ordinary exception, within a bounded time.
Invariant: the manifest is published by rank 0, after every rank's share is durable, or not at all.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from distckpt import catalog, fileplan, names
from distckpt.checksum import digest
from distckpt.errors import DistckptError, RankFailedError, UsageError
from distckpt.garbage import kept_off
from distckpt.inspection import FiniteCheck, Inspection, Sampled
from distckpt.manifest import Layout, Manifest, ObjectEntry, check_references, objects_text, to_text
from distckpt.ranks import Ranks
from distckpt.shards import Header, RankShare, assemble, publish, write_share
from distckpt.staging import Staged
from distckpt.state import FlatObject, flatten, gathered, slots
from distckpt.storage import Storage
from distckpt.tensors import local, tensor_from_json, tensor_to_json
from distckpt.values import Json
from distckpt.workspace import Share, Told, Workspace

Copy = Literal["now", "while writing"]
_TIMINGS = ("stage_s", "write_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """What a save is told.

    Attributes:
        step: Optimizer steps completed.
        folder: The checkpoint's folder in the storage; "" is the storage's root.
        run: The run's name.
        layout: Who writes: rank 0 ("full") or all ranks ("sharded").
        rng: Whether to save the random-number generators.
        metrics: What was measured at this step.
        parent: The checkpoint before, as the manifest states it.
        config: The run's configuration.
        inspection: Looks at what is saved; None if nobody does.
    """

    step: int
    folder: str
    run: str
    layout: Layout
    rng: bool = True
    metrics: Mapping[str, float] | None = None
    parent: dict[str, Json] | None = None
    config: dict[str, Json] | None = None
    inspection: Inspection | None = None

    @property
    def action(self) -> str:
        """What the ranks are doing, for errors."""
        return f"save of step {self.step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSave:
    """A save whose share of this rank lies in host memory.

    Attributes:
        request: What the save was told.
        attempt: The save's name.
        objects: The state's keys, flattened.
        staged: This rank's share; None if it writes nothing.
        workspace: What is kept for the next save.
        stage_s: Seconds that planning and staging took.
        sampled: A sample of what should be the same on all ranks; None if there is nothing to compare.
        failure: What went wrong on this rank since the ranks agreed to save; the commit tells all.
    """

    request: SaveRequest
    attempt: str
    objects: tuple[FlatObject, ...]
    staged: Staged | None
    workspace: Workspace
    stage_s: float
    sampled: Sampled | None = None
    failure: Exception | None = None


@kept_off()
def prepare(
    state: Mapping[str, Any],
    request: SaveRequest,
    *,
    ranks: Ranks,
    workspace: Workspace,
    copy: Copy = "now",
    overlap: bool = True,
) -> PreparedSave:
    """Agree on a save, and copy this rank's share of the state to host memory.

    Args:
        state: The user's state.
        request: What to save it as.
        ranks: All ranks.
        workspace: What is kept from save to save; of one directory, and used by no other save that is in flight.
        copy: Whether to copy "now", so that training may go on, or "while writing", which is over sooner in all.
        overlap: Whether a GPU goes on while it copies what changes only in an optimizer's step.

    Raises:
        UnsupportedStateError: The state holds something that cannot be saved; names the key.
        UsageError: The ranks' states do not fit together; names the key.
        RankFailedError: A rank failed, also inside a `state_dict()`; nothing was written.
        RankTimeoutError: A rank did not come.

    Ranks: all (collective); blocks on the slowest rank, then on the copy.
    """
    begun = time.monotonic()
    flat, verdict = _agree(state, request, ranks=ranks, workspace=workspace)
    objects, staged, sampled, failure = flat, None, None, None
    try:
        if request.inspection is not None and request.inspection.replicas != "off" and ranks.world_size > 1:
            sampled = request.inspection.sample(flat, attempt=verdict["attempt"])
        objects, share, tensors = _share(flat, verdict["per_rank"], request, ranks=ranks, workspace=workspace)
        if share.plan.blocks:
            patient = share.picked(_patience(state, objects, len(tensors))) if overlap else None
            staged = workspace.staging.stage(share.plan, share.sources(tensors), patient=patient)
            if copy == "now":
                staged.begin()
    except (DistckptError, RuntimeError, ValueError, MemoryError) as error:
        failure = error
    return PreparedSave(
        request=request,
        attempt=verdict["attempt"],
        objects=objects,
        staged=staged,
        workspace=workspace,
        stage_s=time.monotonic() - begun,
        sampled=sampled,
        failure=failure,
    )


@kept_off()
def prewarm(state: Mapping[str, Any], request: SaveRequest, *, ranks: Ranks, workspace: Workspace) -> int:
    """Plan a save, and provide the memory that this rank needs for it; return its size in bytes.

    Raises:
        As `prepare` does.

    Ranks: all (collective); blocks on the slowest rank, then on the system's clearing of the memory.
    """
    flat, verdict = _agree(state, request, ranks=ranks, workspace=workspace)
    _, share, tensors = _share(flat, verdict["per_rank"], request, ranks=ranks, workspace=workspace)
    if not share.plan.blocks:
        return 0
    return workspace.staging.reserve(share.plan, pinned=any(tensor.is_cuda for tensor in tensors))


def _agree(
    state: Mapping[str, Any], request: SaveRequest, *, ranks: Ranks, workspace: Workspace
) -> tuple[tuple[FlatObject, ...], Json]:
    """Return the state flattened, and what rank 0 makes of it: the save's name, and the keys that differ by rank."""
    flat: list[FlatObject] = []
    told = workspace.told

    def describe() -> Json:
        flat.extend(flatten(state, rng=request.rng, blueprints=workspace.blueprints))
        fact = _described(flat, request, compared=ranks.world_size > 1)
        return fact if ranks.rank == 0 else told.packed("state", digest(to_text(fact).encode()), lambda: fact)

    def compare(facts: list[Json]) -> Json:
        return _compare([facts[0], *(told.unpacked(rank, "state", fact) for rank, fact in enumerate(facts) if rank)])

    verdict = ranks.agree(request.action, describe, compare)
    return tuple(flat), verdict


def _described(flat: Sequence[FlatObject], request: SaveRequest, *, compared: bool) -> Json:
    """Return what rank 0 has to know of this rank's state to compare it with its own."""
    objects = {o.key: [o.kind, o.per_rank, o.fingerprint() if compared and not o.per_rank else ""] for o in flat}
    return {"layout": request.layout, "objects": objects}


def _share(
    flat: tuple[FlatObject, ...], per_rank: Sequence[str], request: SaveRequest, *, ranks: Ranks, workspace: Workspace
) -> tuple[tuple[FlatObject, ...], Share, list[torch.Tensor]]:
    """Return the objects as they are stored, this rank's share of them, and the tensors that it is cut from."""
    own = set(per_rank)
    objects = tuple(o.for_rank(ranks.rank) if o.key in own else o for o in flat)
    received: dict[str, torch.Tensor] = {}
    if request.layout == "full":
        objects = tuple(gathered(o, keep=ranks.rank == 0) for o in objects)
        received = _received(objects, request, ranks)
    num_writers = 1 if request.layout == "full" else ranks.world_size
    share = workspace.share(objects, rank=ranks.rank, num_writers=num_writers, received=received)
    return objects, share, [*(t for o in objects for t in o.tensors), *received.values()]


def _patience(state: Mapping[str, Any], objects: Sequence[FlatObject], num_tensors: int) -> list[bool]:
    """Say of each tensor whether it changes only in an optimizer's step; only of those on a GPU it matters."""
    patience = [False] * num_tensors
    if not any(tensor.is_cuda for o in objects for tensor in o.tensors):
        return patience
    optimizers = [slot.value for slot in slots(state) if isinstance(slot.value, torch.optim.Optimizer)]
    trained = {local(p).data_ptr() for each in optimizers for group in each.param_groups for p in group["params"]}
    place = 0
    for o in objects:
        for tensor in o.tensors:
            is_parameter = o.kind == "module" and local(tensor).data_ptr() in trained
            patience[place] = tensor.is_cuda and (o.kind == "optimizer" or is_parameter)
            place += 1
    return patience


def _compare(facts: list[Json]) -> Json:
    """Rank 0: check that all ranks mean the same save; return its name, and the keys that differ by rank."""
    first, per_rank = facts[0], set()
    for rank, fact in enumerate(facts):
        if fact["layout"] != first["layout"]:
            raise UsageError(
                problem=f"rank 0 saves with layout {first['layout']!r}, rank {rank} with {fact['layout']!r}",
                fix="give every rank the same layout",
            )
        odd = fact["objects"].keys() ^ first["objects"].keys()
        if odd:
            raise UsageError(
                problem=f"state key {min(odd)!r} is not on all ranks: rank 0 and rank {rank} differ",
                fix="save the same keys on every rank; None is a value",
            )
        for key, (kind, own, fingerprint) in fact["objects"].items():
            differs = fingerprint != first["objects"][key][2]
            if differs and kind in ("module", "optimizer") and not own:
                raise UsageError(
                    problem=f"state key {key!r}: the {kind}s of rank 0 and rank {rank} differ in names, shapes, dtypes "
                    "or values",
                    fix=f'build the same {kind} on every rank, or mark it as different: "{key}": PerRank({key})',
                )
            if own or differs:
                per_rank.add(key)
    return {"attempt": names.new_attempt(), "per_rank": sorted(per_rank)}


def _received(objects: tuple[FlatObject, ...], request: SaveRequest, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Return on rank 0, which writes all, the tensors that only other ranks have; on these, nothing."""
    received: dict[str, torch.Tensor] = {}
    if ranks.world_size == 1 or not any(o.per_rank for o in objects):
        return received

    def send() -> Json:
        own = [entry for o in objects if o.per_rank for entry in o.entries] if ranks.rank else []
        return {entry.name: tensor_to_json(entry.tensor) for entry in own}

    def receive(facts: list[Json]) -> None:
        for fact in facts[1:]:
            received.update({name: tensor_from_json(body) for name, body in fact.items()})

    ranks.agree(request.action, send, receive)
    return received


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What rank 0 published: the manifest, and its file's size in bytes."""

    manifest: Manifest
    num_bytes: int


def commit(
    save: PreparedSave, *, ranks: Ranks, storage: Storage, insist: Callable[[], None] = lambda: None
) -> Committed | None:
    """Write this rank's share, and once every rank has, publish the manifest.

    Args:
        save: What to commit.
        ranks: The channel of the thread that writes.
        storage: The run's directory.
        insist: Called on rank 0 right before the manifest is published; raises if nothing may be published any more.

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
        look = None if check is None else check.look
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
        published.append(Committed(manifest=manifest, num_bytes=num_bytes))
        return {"has_parted": has_parted}

    try:
        if ranks.agree(request.action, write, finish)["has_parted"]:
            _tell_divergence(save, ranks)
    except BaseException:
        if ranks.rank == 0 and not tried:
            with contextlib.suppress(Exception):
                catalog.remove_attempt(storage, request.folder, save.attempt)
        raise
    told.settle()
    return published[0] if published else None


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

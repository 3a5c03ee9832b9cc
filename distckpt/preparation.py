"""The first half of a save, on the training's thread: all ranks agree on it, and each has its share in host memory.

Invariant: nothing is written here, so a save that fails here has left nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from distckpt import names, room
from distckpt.allotment import Allotment
from distckpt.checksum import digest
from distckpt.errors import DistckptError, RankFailedError, RankTimeoutError, UsageError
from distckpt.garbage import kept_off
from distckpt.inspection import Inspection, Sampled
from distckpt.manifest import Layout, to_text
from distckpt.ranks import Ranks
from distckpt.slots import slots
from distckpt.staging import Staged
from distckpt.state import FlatObject, flatten, gathered
from distckpt.storage import Storage
from distckpt.tensors import local, tensor_from_json, tensor_to_json
from distckpt.values import Json
from distckpt.workspace import Share, Workspace

Copy = Literal["now", "while writing"]


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
        allotment: What all ranks write of tensors that are spread over meshes; None if nothing, or not known.
        failure: What went wrong on this rank since the ranks agreed to save; the commit tells all.
    """

    request: SaveRequest
    attempt: str
    objects: tuple[FlatObject, ...]
    staged: Staged | None
    workspace: Workspace
    stage_s: float
    sampled: Sampled | None = None
    allotment: Allotment | None = None
    failure: Exception | None = None


@kept_off()
def prepare(
    state: Mapping[str, Any],
    request: SaveRequest,
    *,
    ranks: Ranks,
    storage: Storage,
    workspace: Workspace,
    copy: Copy = "now",
    overlap: bool = True,
) -> PreparedSave:
    """Agree on a save, make sure that there is room for it, and copy this rank's share of the state to host memory.

    Args:
        state: The user's state.
        request: What to save it as.
        ranks: All ranks.
        storage: The run's directory, which is only asked how much room it has left.
        workspace: What is kept from save to save; of one directory, and used by no other save that is in flight.
        copy: Whether to copy "now", so that training may go on, or "while writing", which is over sooner in all.
        overlap: Whether a GPU goes on while it copies what changes only in an optimizer's step.

    Raises:
        UnsupportedStateError: The state holds something that cannot be saved; names the key.
        UsageError: The ranks' states do not fit together; names the key.
        StorageFullError: The checkpoint does not fit into what a file system has left; nothing was written.
        RankFailedError: A rank failed, also inside a `state_dict()`; nothing was written.
        RankTimeoutError: A rank did not come.

    Ranks: all (collective); blocks on the slowest rank, then on the copy.
    """
    begun = time.monotonic()
    flat, verdict = _agree(state, request, ranks=ranks, workspace=workspace, storage=storage)
    objects, staged, sampled, failure, allotment = flat, None, None, None, None
    try:
        if request.inspection is not None and request.inspection.replicas != "off" and ranks.world_size > 1:
            sampled = request.inspection.sample(flat, attempt=verdict["attempt"])
        objects, share, tensors = _share(flat, verdict["per_rank"], request, ranks=ranks, workspace=workspace)
        allotment = share.allotment
        if share.plan.blocks:
            patient = share.picked(_patience(state, objects, len(tensors))) if overlap else None
            staged = workspace.staging.stage(share.plan, share.sources(tensors), patient=patient)
            if copy == "now":
                staged.begin()
    except (RankFailedError, RankTimeoutError):
        raise  # all ranks know it: none waits once more
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
        allotment=allotment,
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
    state: Mapping[str, Any],
    request: SaveRequest,
    *,
    ranks: Ranks,
    workspace: Workspace,
    storage: Storage | None = None,
) -> tuple[tuple[FlatObject, ...], Json]:
    """Return the state flattened, and what rank 0 makes of it: the save's name, and the keys that differ by rank.

    With a storage, there has to be room for it.
    """
    flat: list[FlatObject] = []
    told = workspace.told

    def describe() -> Json:
        flat.extend(flatten(state, rng=request.rng, blueprints=workspace.blueprints))
        standing = None
        if storage is not None:
            standing = room.told(storage, flat, layout=request.layout, rank=ranks.rank, world_size=ranks.world_size)
        fact = _described(flat, request, standing, compared=ranks.world_size > 1)
        packed = fact if ranks.rank == 0 else told.packed("state", digest(to_text(fact).encode()), lambda: fact)
        return [packed, None if standing is None else standing.free_bytes]

    def compare(facts: list[Json]) -> Json:
        packed = [fact for fact, _ in facts]
        states = [packed[0], *(told.unpacked(rank, "state", fact) for rank, fact in enumerate(packed) if rank)]
        verdict = _compare(states)
        if storage is not None:
            standings = [
                None if free is None else room.Standing(place=place, needed_bytes=needed, free_bytes=free)
                for (place, needed), free in zip([fact["room"] for fact in states], [f for _, f in facts], strict=True)
            ]
            room.judge(standings, layout=request.layout, step=request.step, storage=storage)
        return verdict

    verdict = ranks.agree(request.action, describe, compare)
    return tuple(flat), verdict


def _described(
    flat: Sequence[FlatObject], request: SaveRequest, standing: room.Standing | None, *, compared: bool
) -> Json:
    """Return what rank 0 has to know of this rank's state, to compare it with its own and to find room for it."""
    objects = {o.key: [o.kind, o.per_rank, o.fingerprint() if compared and not o.per_rank else ""] for o in flat}
    fact: Json = {"layout": request.layout, "objects": objects}
    fact["room"] = [None, 0] if standing is None else [standing.place, standing.needed_bytes]
    return fact


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
    """Say of each tensor whether it changes only in an optimizer's step; only of those on a GPU it matters.

    What an optimizer's groups hold, such as a learning rate, is for others to change, too.
    """
    patience = [False] * num_tensors
    if not any(tensor.is_cuda for o in objects for tensor in o.tensors):
        return patience
    optimizers = [slot.value for slot in slots(state) if isinstance(slot.value, torch.optim.Optimizer)]
    trained = {local(p).data_ptr() for each in optimizers for group in each.param_groups for p in group["params"]}
    place = 0
    for o in objects:
        kept = f"{o.key}.state."
        for name, tensor in zip(o.structure.names, o.tensors, strict=True):
            if tensor.is_cuda and o.kind == "module":
                patience[place] = local(tensor).data_ptr() in trained
            elif tensor.is_cuda and o.kind == "optimizer":
                bare = name.partition(":")[2] if o.per_rank else name
                patience[place] = bare.startswith(kept)
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

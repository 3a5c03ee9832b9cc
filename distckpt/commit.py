"""One save: from the user's objects to a committed checkpoint.

`prepare` runs on the training's thread and ends when this rank's share lies in host memory; `commit` may run on another
thread. Both drive DCP's protocol (plan, write, finish) over `Ranks` rather than over a process group: a failure of any
rank is then known to all, with its name, as an ordinary exception, within a bounded time.
Invariant: the manifest is published by rank 0, after every rank's share is durable, or not at all.
"""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distckpt import catalog, names
from distckpt.errors import DistckptError, UsageError
from distckpt.garbage import kept_off
from distckpt.manifest import Layout, Manifest, ObjectEntry
from distckpt.plan import Block
from distckpt.ranks import Ranks
from distckpt.shards import Header, RankShare, assemble, own_share, publish, write_share
from distckpt.staging import Staging
from distckpt.state import FlatObject, flatten, gathered
from distckpt.storage import Storage
from distckpt.tensors import DTYPE_NAMES, DTYPES, host_bytes
from distckpt.values import Json


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
    """

    step: int
    folder: str
    run: str
    layout: Layout
    rng: bool = True
    metrics: Mapping[str, float] | None = None
    parent: dict[str, Json] | None = None
    config: dict[str, Json] | None = None

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
        blocks: What this rank writes, in the order of its file.
        payload: Their staged bytes, one after another.
        stage_s: Seconds that planning and staging took.
        failure: What went wrong on this rank since the ranks agreed to save; the commit tells all.
    """

    request: SaveRequest
    attempt: str
    objects: tuple[FlatObject, ...]
    blocks: tuple[Block, ...]
    payload: memoryview
    stage_s: float
    failure: Exception | None = None


@kept_off()
def prepare(state: Mapping[str, Any], request: SaveRequest, *, ranks: Ranks, staging: Staging) -> PreparedSave:
    """Agree on a save, and copy this rank's share of the state to host memory.

    Raises:
        UnsupportedStateError: The state holds something that cannot be saved; names the key.
        UsageError: The ranks' states do not fit together; names the key.
        RankFailedError: A rank failed, also inside a `state_dict()`; nothing was written.
        RankTimeoutError: A rank did not come.

    Ranks: all (collective); blocks on the slowest rank, then on the copy. Training may go on after it.
    """
    flat: list[FlatObject] = []

    def describe() -> Json:
        flat.extend(flatten(state, rng=request.rng))
        compared = ranks.world_size > 1
        objects = {o.key: [o.kind, o.per_rank, o.fingerprint() if compared and not o.per_rank else ""] for o in flat}
        return {"layout": request.layout, "objects": objects}

    begun = time.monotonic()
    verdict = ranks.agree(request.action, describe, _compare)
    own = set(verdict["per_rank"])
    objects = tuple(o.for_rank(ranks.rank) if o.key in own else o for o in flat)
    share: list[tuple[Block, torch.Tensor]] = []
    payload, failure = memoryview(b""), None
    try:
        if request.layout == "full":
            objects = tuple(gathered(o, keep=ranks.rank == 0) for o in objects)
            share = _share_full(objects, request, ranks)
        else:
            share = _share_sharded(objects, ranks)
        payload = staging.stage([data for _, data in share])
    except (DistckptError, RuntimeError, ValueError, MemoryError) as error:
        failure = error
    return PreparedSave(
        request=request,
        attempt=verdict["attempt"],
        objects=objects,
        blocks=tuple(block for block, _ in share),
        payload=payload,
        stage_s=time.monotonic() - begun,
        failure=failure,
    )


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


def _share_sharded(objects: tuple[FlatObject, ...], ranks: Ranks) -> list[tuple[Block, torch.Tensor]]:
    """Return this rank's share where all ranks write."""
    entries = [(o, entry) for o in objects for entry in o.entries]
    return own_share(
        {e.name: e.tensor for _, e in entries},
        rank=ranks.rank,
        num_writers=ranks.world_size,
        owners={e.name: e.owner for o, e in entries if e.owner is not None and not o.per_rank},
        private={e.name for o, e in entries if o.per_rank},
    )


def _share_full(
    objects: tuple[FlatObject, ...], request: SaveRequest, ranks: Ranks
) -> list[tuple[Block, torch.Tensor]]:
    """Return everything on rank 0, to which the others send what only they have, and nothing on them."""
    own = {e.name: e.tensor for o in objects if o.per_rank for e in o.entries}
    received: dict[str, torch.Tensor] = {}
    if any(o.per_rank for o in objects) and ranks.world_size > 1:

        def receive(facts: list[Json]) -> None:
            for fact in facts[1:]:
                received.update({name: _from_text(body) for name, body in fact.items()})

        ranks.agree(
            request.action,
            lambda: {name: _to_text(tensor) for name, tensor in own.items()} if ranks.rank else {},
            receive,
        )
    if ranks.rank != 0:
        return []
    tensors = {e.name: e.tensor for o in objects for e in o.entries}
    return own_share({**tensors, **received}, rank=0, num_writers=1)


def _to_text(tensor: torch.Tensor) -> Json:
    return [DTYPE_NAMES[tensor.dtype], list(tensor.shape), base64.b64encode(host_bytes(tensor)).decode()]


def _from_text(body: Json) -> torch.Tensor:
    dtype, shape, text = body
    data = bytearray(base64.b64decode(text))
    flat = torch.frombuffer(data, dtype=DTYPES[dtype]) if data else torch.empty(0, dtype=DTYPES[dtype])
    return flat.reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What rank 0 published: the manifest, and its file's size in bytes."""

    manifest: Manifest
    num_bytes: int


def commit(save: PreparedSave, *, ranks: Ranks, storage: Storage) -> Committed | None:
    """Write this rank's share, and once every rank has, publish the manifest.

    Returns:
        On rank 0 what was published, on the others None.

    Raises:
        RankFailedError: A rank failed; the save is abandoned, and what it wrote is removed as far as possible.
        RankTimeoutError: A rank did not come; likewise.
        CheckpointExistsError: The step was committed by somebody else.
        StorageError: As the only rank, it could not be written.

    Ranks: all (collective); blocks until the checkpoint is committed.
    """
    request = save.request
    published: list[Committed] = []
    own: list[RankShare] = []
    tried = False

    def write() -> Json:
        if save.failure is not None:
            raise save.failure
        begun = time.monotonic()
        share = write_share(
            storage, request.folder, save.attempt, rank=ranks.rank, blocks=save.blocks, payload=save.payload
        )
        timings = {"stage_s": save.stage_s, "write_s": time.monotonic() - begun}
        trees = {o.key: o.tree for o in save.objects if o.per_rank}
        own.append(share)  # rank 0 has no need to send its own to itself
        return {"share": share.to_json() if ranks.rank else None, "trees": trees, "timings": timings}

    @kept_off()
    def finish(facts: list[Json]) -> None:
        nonlocal tried
        shares = [*own, *(RankShare.from_json(fact["share"]) for fact in facts[1:])]
        manifest = assemble(_header(save, facts, ranks.world_size), shares)
        tried = True  # from here on it may be there, whatever is raised
        num_bytes = publish(storage, request.folder, manifest)
        published.append(Committed(manifest=manifest, num_bytes=num_bytes))

    try:
        ranks.agree(request.action, write, finish)
    except BaseException:
        if ranks.rank == 0 and not tried:
            with contextlib.suppress(Exception):
                catalog.remove_attempt(storage, request.folder, save.attempt)
        raise
    return published[0] if published else None


def _header(save: PreparedSave, facts: list[Json], world_size: int) -> Header:
    """Rank 0: return what the manifest says beyond files and tensors."""
    request = save.request
    objects = {
        o.key: ObjectEntry(
            kind=o.kind,
            per_rank=o.per_rank,
            trees=tuple(fact["trees"][o.key] for fact in facts) if o.per_rank else (o.tree,),
        )
        for o in save.objects
    }
    return Header(
        step=request.step,
        run=request.run,
        attempt=save.attempt,
        layout=request.layout,
        world_size=world_size,
        objects=objects,
        metrics=request.metrics or {},
        timings={name: max(fact["timings"][name] for fact in facts) for name in facts[0]["timings"]},
        parent=request.parent,
        config=request.config,
    )

"""Ranks of a job far larger than the machine, one after another in one process.

The code of a save is the real one; only the meeting is not: what the other ranks would send is made up from what one of
them did send, and from the plan, which is a function of the rank.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from distckpt import fileplan, names, written
from distckpt.allotment import Allotment, SpreadItem, allot, own_blocks_of
from distckpt.catalog import read_manifest
from distckpt.checksum import digest
from distckpt.commit import Committed, commit
from distckpt.datafiles import segment_sizes
from distckpt.fileplan import FilePlan
from distckpt.garbage import kept_off
from distckpt.loading import boxes
from distckpt.manifest import MAX_BYTES, DataFile, Layout, Segment
from distckpt.matching import Selection, match
from distckpt.plan import Block, Item, in_file_order, split
from distckpt.preparation import SaveRequest, prepare
from distckpt.ranks import Ranks
from distckpt.shards import RankShare, spans
from distckpt.state import FlatObject, flatten
from distckpt.storage import open_storage
from distckpt.storage.wrappers import CountingStorage
from distckpt.tensors import DTYPE_NAMES, spread_of
from distckpt.values import Json
from distckpt.workspace import Workspace
from distckpt.written import Said

# Rank 0 writes; all write; each tensor is cut over all ranks, over one row of a mesh, over both its dimensions.
Kind = Literal["full", "replicated", "sharded", "hsdp", "fsdp x tp"]
ON_MESHES: tuple[Kind, ...] = ("sharded", "hsdp", "fsdp x tp")
_ITEMS = 1024  # of a tensor; of one that is cut, each rank has one
_VERBS = ("put", "sync", "publish", "read", "read_all", "list", "delete")


class SimulatedRanks(Ranks):
    """One rank of many; it notes what it says, and meets nobody.

    Attributes:
        said: What this rank has said.
        waiting: For rank 0: what the others say, of each meeting to come.
        received: For rank 0: the bytes of what they said.
        decide_s: For rank 0: processor time of reading that and deciding.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(timeout_s=60.0)
        self.rank, self.world_size = rank, world_size
        self.said: list[Json] = []
        self.waiting: list[Iterator[str]] = []
        self.received = 0
        self.decide_s = 0.0
        self._described: Json = None

    def agree(
        self,
        action: str,
        work: Callable[[], Any],
        decide: Callable[[list[Any]], Any],
        *,
        explain: Callable[[], None] = lambda: None,
    ) -> Any:
        """Do this rank's work, and return what rank 0 says, or would say."""
        said = work()
        self.said.append(said)
        if self.rank:
            if isinstance(said, dict) or _is_report(said):  # its tensors, or what it has written
                return {}
            (_, *described), room = said
            self._described = described[0] if described else self._described
            return decide([[self._described, room]])
        texts = list(self.waiting.pop(0))
        self.received += sum(map(len, texts))
        begun = time.process_time()
        verdict = decide([said, *map(json.loads, texts)])
        self.decide_s += time.process_time() - begun
        return verdict


@dataclass(kw_only=True)
class Facts:
    """What was seen of one save.

    Attributes:
        plan_s: Processor time of one rank other than 0 until its share lies staged.
        sent: The bytes that this rank sent, in all meetings together.
        received: The bytes that rank 0 received.
        decide_s: Rank 0's processor time in all meetings.
        manifest_bytes: The manifest's size.
        file_table_bytes: How much of it is the table of files, with their digests.
        tensor_table_bytes: How much of it says where tensors lie.
        requests: What one rank asked of the storage, by verb, and rank 0.
    """

    plan_s: float
    sent: int
    received: int = 0
    decide_s: float = 0.0
    manifest_bytes: int = 0
    file_table_bytes: int = 0
    tensor_table_bytes: int = 0
    requests: dict[str, dict[str, int]] = field(default_factory=dict)


def _is_report(message: Json) -> bool:
    """Say whether a message tells what a rank has written."""
    return isinstance(message, list) and isinstance(message[-1], str)  # its last words are those on a sample


def mesh_sizes(kind: Kind, world_size: int) -> tuple[int, ...]:
    """Return the mesh of a kind of state: a row of all ranks, or one of two dimensions, the second the longer one."""
    if kind == "sharded":
        return (world_size,)
    outer = 1 << (world_size.bit_length() - 1) // 2
    return (outer, world_size // outer)


@contextlib.contextmanager
def simulated_state(kind: Kind, num_tensors: int, rank: int, world_size: int) -> Iterator[Mapping[str, Any]]:
    """Give a rank's state; of what is cut over a mesh, a rank holds one item of each tensor."""
    keys = [f"layer{i // 10}.tensor{i}" for i in range(num_tensors)]
    if kind not in ON_MESHES:
        yield {"model": {name: torch.zeros(_ITEMS) for name in keys}}
        return
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  makes "fake" known

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=dist.HashStore())
    try:
        sizes = mesh_sizes(kind, world_size)
        # Torch caches what it finds out of a mesh, this rank's place in it, too, for every mesh that equals it.
        mesh = init_device_mesh(
            "cpu", sizes, mesh_dim_names=tuple(f"{dim}_of_rank_{rank}" for dim in range(len(sizes)))
        )
        placements: list[Placement] = [Shard(dim) for dim in range(len(sizes))]
        whole = torch.Size(sizes)
        if kind == "hsdp":
            placements, whole = [Replicate(), Shard(0)], torch.Size(sizes[1:])
        items = torch.zeros(num_tensors, *[1] * len(whole))  # none is another's, or it would be stored once
        stride = torch.empty(whole, device="meta").stride()
        yield {
            "model": {
                name: DTensor.from_local(item, mesh, placements, run_check=False, shape=whole, stride=stride)
                for name, item in zip(keys, items, strict=True)
            }
        }
    finally:
        dist.destroy_process_group()


def simulate(kind: Kind, num_tensors: int, world_size: int, directory: Path) -> list[Facts]:
    """Save twice, as one rank in the middle and as rank 0, and return what was seen of the first and the second save.

    Args:
        kind: Who holds and writes what.
        num_tensors: Tensors of the state, without the random-number generators.
        world_size: The simulated ranks.
        directory: An empty folder.
    """
    layout: Layout = "full" if kind == "full" else "sharded"
    requests = [SaveRequest(step=step, folder=f"step-{step:012d}", run="simulated", layout=layout) for step in (1, 2)]
    rank = world_size // 2
    facts: list[Facts] = []
    said: list[list[Json]] = []
    with simulated_state(kind, num_tensors, rank, world_size) as state:
        ranks, workspace = SimulatedRanks(rank, world_size), Workspace()
        for request in requests:
            storage = CountingStorage(open_storage(directory / f"rank-{rank}"))
            random.random()  # as in a training, the generators have moved on
            ranks.said = []
            begun = time.process_time()
            save = prepare(state, request, ranks=ranks, workspace=workspace, storage=storage)
            plan_s = time.process_time() - begun
            commit(save, ranks=ranks, storage=storage)
            said.append(ranks.said)
            sent = sum(len(_text(message)) for message in ranks.said)
            facts.append(Facts(plan_s=plan_s, sent=sent, requests={"one rank": _counted(storage)}))
    with simulated_state(kind, num_tensors, 0, world_size) as state:
        crowd = Crowd(kind, state, world_size, example=rank)
        ranks, workspace = SimulatedRanks(0, world_size), Workspace()
        for request, messages, seen in zip(requests, said, facts, strict=True):
            ranks.waiting = [crowd.saying(message, is_first=seen is facts[0]) for message in messages]
            storage = CountingStorage(open_storage(directory / "rank-0"))
            _play_first(state, request, ranks, workspace, storage=storage, seen=seen)
    return facts


def _play_first(
    state: Mapping[str, Any],
    request: SaveRequest,
    ranks: SimulatedRanks,
    workspace: Workspace,
    *,
    storage: CountingStorage,
    seen: Facts,
) -> None:
    """Save as rank 0, and add to the facts what was seen."""
    ranks.received, ranks.decide_s = 0, 0.0
    save = prepare(state, request, ranks=ranks, workspace=workspace, storage=storage)
    published = commit(save, ranks=ranks, storage=storage)
    assert isinstance(published, Committed)
    seen.received, seen.decide_s, seen.manifest_bytes = ranks.received, ranks.decide_s, published.num_bytes
    seen.requests["rank 0"] = _counted(storage)
    text = storage.read_all(names.join(request.folder, names.MANIFEST), limit_bytes=MAX_BYTES)
    seen.file_table_bytes = text.index(b'],"format":') - text.index(b'"files":[')
    seen.tensor_table_bytes = len(workspace.draft.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one rank needs of storage for a restore, and what it costs to find out.

    Attributes:
        parse_s: Processor time of reading and checking the manifest.
        plan_s: Of finding which bytes of which files hold the rank's tensors.
        files: How many data files these are.
        num_bytes: How many bytes.
    """

    parse_s: float
    plan_s: float
    files: int
    num_bytes: int


@kept_off()  # as a restore does
def restored(kind: Kind, num_tensors: int, world_size: int, directory: Path) -> Reading:
    """Return what a rank in the middle needs of the checkpoint that `simulate` has left as rank 0."""
    storage = open_storage(directory / "rank-0")
    rank = world_size // 2
    begun = time.process_time()
    manifest = read_manifest(storage, f"step-{2:012d}")
    parse_s = time.process_time() - begun
    with simulated_state(kind, num_tensors, rank, world_size) as state:
        begun = time.process_time()
        matched = match(state, manifest, rank=rank, selection=Selection(), rng=True)
        found = spans(manifest, boxes(matched))
        plan_s = time.process_time() - begun
    if matched.problems:
        raise AssertionError(f"the checkpoint does not fit: {matched.problems[0]}")
    num_bytes = sum(end - begin for each in found.values() for begin, end in each)
    return Reading(parse_s=parse_s, plan_s=plan_s, files=len(found), num_bytes=num_bytes)


class Crowd:
    """All ranks but the first: what they would send, from what one of them has sent.

    Args:
        kind: Who holds and writes what.
        state: Rank 0's state.
        world_size: The number of ranks.
        example: The rank that has sent something.
    """

    def __init__(self, kind: Kind, state: Mapping[str, Any], world_size: int, *, example: int) -> None:
        self.world_size = world_size
        self._example = example
        self._kind = kind
        self._objects = flatten(state, rng=True)
        shared = [o for o in self._objects if not o.per_rank]
        self._entries = sorted((entry for o in shared for entry in o.entries), key=lambda entry: entry.name)
        self._shares: list[list[Block]] = [[] for _ in range(world_size)]
        self._plans: dict[Any, tuple[int, FilePlan]] = {}
        self._said: dict[tuple[bool, Any], str] = {}
        self._items: list[SpreadItem] = []
        self._allotment: Allotment | None = None
        if kind == "replicated":
            items = [Item(name=e.name, dtype=e.dtype, shape=e.shape) for e in self._entries]
            self._shares = split(items, world_size)
        if kind in ON_MESHES:
            spreads = [(e, spread_of(e.tensor)) for e in self._entries]
            self._items = [SpreadItem(e.name, e.dtype, spread) for e, spread in spreads if spread is not None]
            self._allotment = allot(self._items, world_size)

    def saying(self, message: Json, *, is_first: bool) -> Iterator[str]:
        """Yield what each rank but the first says where the example says `message`."""
        if _is_report(message):
            for rank in range(1, self.world_size):
                yield self._report(rank, message, is_first=is_first)
            return
        text = _text(message)
        for rank in range(1, self.world_size):
            yield text.replace(names.of_rank(self._example, ""), names.of_rank(rank, ""))

    def _report(self, rank: int, message: Json, *, is_first: bool) -> str:
        """Return what a rank says when it has written; ranks with files that are alike say the same of other names."""
        alike = self._alike(rank)
        if alike not in self._plans:
            self._plans[alike] = rank, self._plan(rank)
        example, plan = self._plans[alike]
        if (is_first, alike) not in self._said:
            self._said[is_first, alike] = _text(self._report_of(example, plan, message, is_first=is_first))
        text = self._said[is_first, alike]
        return text if example == rank else text.replace(names.of_rank(example, ""), names.of_rank(rank, ""))

    def _report_of(self, rank: int, plan: FilePlan, message: Json, *, is_first: bool) -> Json:
        allotted = written.fingerprint(self._allotment)
        said = Said(*message)
        digests, sizes = "", None
        if plan.blocks:
            lengths = segment_sizes(len(plan.header), plan.num_bytes)
            segments = tuple(Segment(num_bytes=size, digest="0" * 32) for size in lengths)
            file = DataFile(name="-", rank=rank, num_bytes=plan.num_bytes, segments=segments)
            share = RankShare(file=file, blocks=plan.blocks, offsets=plan.offsets)
            digests, sizes = share.digests(), share.sizes()
        packed = said.share[:1]
        if is_first:
            rest = [allotted, fileplan.to_json(plan.rest, plan.offsets[plan.num_spread :])]
            blocks = [digest((plan.fingerprint + allotted).encode())[:16], rest]
            own = {o.key: o.for_rank(rank) for o in self._objects if o.per_rank}
            trees = {key: [names.of_rank(rank, key)[:16], own[key].tree] for key in own}
            packed = [*packed, [sizes, blocks, trees]]
        return said._replace(digests=digests, share=packed).packed()

    def _alike(self, rank: int) -> Any:
        """Return what two ranks have in common whose files have blocks of the same sizes, and headers as long."""
        if self._kind == "replicated" and self._shares[rank]:
            return rank
        digits: list[int] = []
        if self._kind in ON_MESHES:
            places = self._items[0].spread.mesh.coordinate_of(rank)
            assert places is not None
            digits = [len(str(place + more)) for place in places for more in (0, 1)]
            if self._kind == "hsdp":
                digits = [places[0], *digits[2:]]  # which tensors are written here, too
        return tuple(digits)

    def _plan(self, rank: int) -> FilePlan:
        """Return the plan of a rank's file."""
        if self._kind == "full":
            return FilePlan.of([])
        own = [block for o in self._objects if o.per_rank for block in _own(o.for_rank(rank))]
        if self._kind in ON_MESHES:
            return FilePlan.of(in_file_order(own), spread=own_blocks_of(self._items, rank))
        return FilePlan.of(in_file_order([*self._shares[rank], *own]))


def _own(flat: FlatObject) -> Iterator[Block]:
    for name, tensor in zip(flat.structure.names, flat.tensors, strict=True):
        shape = tuple(tensor.shape)
        yield Block(name=name, dtype=DTYPE_NAMES[tensor.dtype], whole=shape, start=(0,) * len(shape), shape=shape)


def _text(message: Json) -> str:
    return json.dumps(message, separators=(",", ":"))


def _counted(storage: CountingStorage) -> dict[str, int]:
    counts = {verb: storage.counted(verb).num_calls for verb in _VERBS}
    return {verb: count for verb, count in counts.items() if count}

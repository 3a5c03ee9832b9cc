"""What one save leaves for the next: blueprints, the share's plan, staging memory, and what rank 0 has been told.

Invariant: a save with a fresh workspace stores the same; only slower.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor

from distckpt.allotment import Allotment, SpreadItem, allot, own_blocks_of
from distckpt.datafiles import new_hasher
from distckpt.errors import UsageError
from distckpt.fileplan import FilePlan
from distckpt.plan import Block
from distckpt.shards import Draft, cut, own_blocks
from distckpt.staging import Staging
from distckpt.state import Blueprints, FlatObject
from distckpt.tensors import DTYPE_NAMES, is_everywhere, spread_of
from distckpt.values import Json

Fact = TypeVar("Fact")


class Share:
    """What one rank writes of a state, and from which of its tensors.

    Attributes:
        plan: The plan of the rank's file.
        allotment: What all ranks write of the tensors that are spread over meshes; None if there are none, or if this
            rank would write others.
    """

    def __init__(
        self,
        plan: FilePlan,
        names: Sequence[str],
        tensors: Sequence[torch.Tensor],
        allotment: Allotment | None = None,
    ) -> None:
        self.plan = plan
        self.allotment = allotment
        places = {name: index for index, name in enumerate(names)}
        self._picks = [places[block.name] for block in plan.blocks]
        self._cuts: dict[int, Block] = {}
        for number, (block, index) in enumerate(zip(plan.blocks, self._picks, strict=True)):
            if isinstance(tensors[index], DTensor) or block.shape != tuple(tensors[index].shape):
                self._cuts[number] = block

    def sources(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the data of each block, as a view.

        Args:
            tensors: All tensors of the state, in the order of the names that the share was made for.

        Ranks: any.
        """
        picked = self.picked(tensors)
        with torch.no_grad():  # else torch makes a view for autograd of each DTensor
            for number, block in self._cuts.items():
                picked[number] = cut(picked[number], block)
        return picked

    def picked(self, facts: Sequence[Fact]) -> list[Fact]:
        """Return what belongs to each block, of what is known of each tensor.

        Ranks: any.
        """
        return [facts[index] for index in self._picks]


class Told:
    """What this rank has told rank 0 at earlier saves, and on rank 0, what it was told: it is not sent again."""

    def __init__(self) -> None:
        self._settled: dict[str, str] = {}
        self._sent: dict[str, str] = {}
        self._known: dict[tuple[int, str], tuple[str, Any]] = {}

    def packed(self, name: str, fingerprint: str, value: Callable[[], Json]) -> Json:
        """Return a value for rank 0; if rank 0 has it, only its fingerprint.

        Ranks: any.
        """
        fingerprint = fingerprint[:16]
        self._sent[name] = fingerprint
        if self._settled.get(name) == fingerprint:
            return [fingerprint]
        self._settled.pop(name, None)  # until all has gone well, nobody knows which of the two rank 0 has
        return [fingerprint, value()]

    def unpacked(self, rank: int, name: str, body: Json, read: Callable[[Json], Any] | None = None) -> Any:
        """Return the value that a rank packed; the same object as long as the fingerprint is the same.

        Raises:
            UsageError: The rank takes for known what is not.

        Ranks: rank 0.
        """
        fingerprint, *values = body
        if values:
            self._known[rank, name] = fingerprint, read(values[0]) if read is not None else values[0]
        known = self._known.get((rank, name))
        if known is None or known[0] != fingerprint:
            raise UsageError(problem=f"rank {rank} has told rank 0 nothing of its {name!r}")
        return known[1]

    def settle(self) -> None:
        """Count what was packed since the last call as known to rank 0: it has said that all went well.

        Ranks: any.
        """
        self._settled.update(self._sent)
        self._sent = {}

    def unsettle(self) -> None:
        """Count what was packed since `settle` as not known to rank 0: something has failed, it may not have read it.

        Ranks: any.
        """
        self._sent = {}


class Workspace:
    """What is kept from save to save on one rank.

    Attributes:
        blueprints: How the state's objects were made up.
        staging: The host memory.
        told: What rank 0 knows of the other ranks' shares.
        draft: On rank 0, what is kept of the manifest.
        hasher: The thread that digests what is written.
    """

    def __init__(self) -> None:
        self.blueprints = Blueprints()
        self.staging = Staging()
        self.told = Told()
        self.draft = Draft()
        self.hasher = new_hasher()
        self._made_for: list[Any] = []
        self._share: Share | None = None

    def close(self) -> None:
        """Let go of what goes on by itself, once no save is in flight.

        Ranks: any; blocks on a GPU whose copy for a save that failed is still under way.
        """
        self.hasher.close()
        self.staging.settle()

    def share(
        self, objects: Sequence[FlatObject], *, rank: int, num_writers: int, received: Mapping[str, torch.Tensor]
    ) -> Share:
        """Return what this rank writes of a state; planned anew only if the state's structure is another.

        Args:
            objects: The state, as it is stored.
            rank: This rank.
            num_writers: How many ranks share the writing, from rank 0 on.
            received: On rank 0 if it is the only writer, other ranks' own tensors.

        Ranks: any.
        """
        structures = [o.structure for o in objects]
        facts = [(rank, num_writers), *((n, t.dtype, t.shape) for n, t in received.items())]
        known = self._made_for
        same = known[len(structures) :] == facts and all(map(operator.is_, structures, known))
        if self._share is None or not same:
            self._share = _planned(objects, rank=rank, num_writers=num_writers, received=received)
            self._made_for = [*structures, *facts]
        return self._share


def _planned(
    objects: Sequence[FlatObject], *, rank: int, num_writers: int, received: Mapping[str, torch.Tensor]
) -> Share:
    entries = [(o, entry) for o in objects for entry in o.entries]
    tensors = {**{entry.name: entry.tensor for _, entry in entries}, **received}
    alone = num_writers == 1  # one writer writes all that it has
    if alone:
        blocks = own_blocks(tensors, rank=rank, num_writers=1) if rank == 0 else []
        return Share(FilePlan.of(blocks), list(tensors), list(tensors.values()))
    owners = {e.name: e.owner for o, e in entries if e.owner is not None and not o.per_rank}
    private = {e.name for o, e in entries if o.per_rank}
    spread = _spread_items({n: t for n, t in tensors.items() if n not in private and n not in owners})
    allotment = allot(spread, num_writers) if spread else None
    told = set() if allotment is None else {item.name for item in spread}
    rest = {name: tensor for name, tensor in tensors.items() if name not in told}
    blocks = own_blocks(rest, rank=rank, num_writers=num_writers, owners=owners, private=private)
    if allotment is None:
        return Share(FilePlan.of(blocks), list(tensors), list(tensors.values()))
    plan = FilePlan.of(blocks, spread=own_blocks_of(spread, rank))
    offsets = [offset - len(plan.header) for offset in plan.offsets[: plan.num_spread]]
    if not allotment.is_what(rank, plan.blocks[: plan.num_spread], offsets):
        allotment = None
    return Share(plan, list(tensors), list(tensors.values()), allotment)


def _spread_items(tensors: Mapping[str, torch.Tensor]) -> list[SpreadItem]:
    """Return those tensors of which each rank knows what every other one writes."""
    found = []
    for name, tensor in tensors.items():
        spread = spread_of(tensor) if isinstance(tensor, DTensor) and not is_everywhere(tensor) else None
        if spread is not None:
            found.append(SpreadItem(name, DTYPE_NAMES[tensor.dtype], spread))
    return found

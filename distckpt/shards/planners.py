"""DCP planners: each rank writes its own share of the bytes, and reads what it needs of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor

from distckpt.errors import StateMismatchError
from distckpt.plan import Block, Item, in_file_order, split
from distckpt.tensors import (
    DTYPE_NAMES,
    DTYPES,
    check_storable,
    is_everywhere,
    local,
    local_box,
    writes_replica,
)


class ShardSavePlanner(DefaultSavePlanner):
    """Plans this rank's share of a save: of tensors that all ranks hold, an equal part by bytes, cut between rows.

    The plan is a pure function of the state's names, shapes and dtypes and the number of writers; DCP's exchange of
    plans changes nothing in it.

    Args:
        rank: This rank; by default, that of torch.distributed.
        num_writers: How many ranks share the writing, from rank 0 on; by default, all.
    """

    def __init__(self, *, rank: int | None = None, num_writers: int | None = None) -> None:
        super().__init__()
        distributed = dist.is_available() and dist.is_initialized()
        self._rank = rank if rank is not None else (dist.get_rank() if distributed else 0)
        self._num_writers = num_writers or (dist.get_world_size() if distributed else 1)
        self._data: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        """Return what this rank writes, in the order in which it stands in its file.

        Raises:
            UnsupportedStateError: A tensor cannot be stored; names it.

        Ranks: any.
        """
        tensors = {name: value for name, value in self.state_dict.items() if isinstance(value, torch.Tensor)}
        for name, tensor in tensors.items():
            check_storable(tensor, name)
        share = own_share(tensors, rank=self._rank, num_writers=self._num_writers)
        self._data = {(block.name, block.start): data for block, data in share}
        writes = [_write_item(block) for block, _ in share]
        if self._rank == 0:
            values = sorted(self.state_dict.keys() - tensors.keys())
            writes += [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in values]
        self.plan = SavePlan(writes, planner_data=getattr(self, "mappings", None))
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return the data of one item of the plan: a tensor, or for a value, the value itself.

        Ranks: any.
        """
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            return self.state_dict[index.fqn]
        return self._data[index.fqn, tuple(index.offset or ())]


def own_share(
    tensors: Mapping[str, torch.Tensor],
    *,
    rank: int,
    num_writers: int,
    owners: Mapping[str, int] | None = None,
    private: Collection[str] = (),
) -> list[tuple[Block, torch.Tensor]]:
    """Return the blocks that `own_blocks` does, and the data of each as a view.

    Ranks: any.
    """
    blocks = own_blocks(tensors, rank=rank, num_writers=num_writers, owners=owners, private=private)
    return [(block, cut(tensors[block.name], block)) for block in blocks]


def own_blocks(
    tensors: Mapping[str, torch.Tensor],
    *,
    rank: int,
    num_writers: int,
    owners: Mapping[str, int] | None = None,
    private: Collection[str] = (),
) -> list[Block]:
    """Return the blocks that this rank writes, in the order of its file.

    Args:
        tensors: All tensors of the state, by name.
        rank: This rank.
        num_writers: How many ranks share the writing, from rank 0 on.
        owners: Tensors that one rank has to write, because its values count.
        private: Names of tensors that only this rank has.

    Ranks: any.
    """
    owners = owners or {}
    common = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in private and (name in owners or is_everywhere(tensor))
    }
    items = [
        Item(name=name, dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), owner=owners.get(name))
        for name, tensor in sorted(common.items())
    ]
    blocks = split(items, num_writers, only=rank)[rank] if rank < num_writers else []
    for name in sorted(tensors.keys() - common.keys()):
        blocks.extend(_own_block(name, tensors[name]))
    return in_file_order(blocks)


def _own_block(name: str, tensor: torch.Tensor) -> list[Block]:
    """Return the block of a tensor of which each rank holds another part, or which only this rank has."""
    box = local_box(tensor)
    if box is None or (isinstance(tensor, DTensor) and not writes_replica(tensor, name)):
        return []
    dtype = DTYPE_NAMES[tensor.dtype]
    return [Block(name=name, dtype=dtype, whole=tuple(tensor.shape), start=box.start, shape=box.shape)]


def _write_item(block: Block) -> WriteItem:
    start, shape = torch.Size(block.start), torch.Size(block.shape)
    return WriteItem(
        index=MetadataIndex(block.name, start),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=start, sizes=shape),
            properties=TensorProperties(dtype=DTYPES[block.dtype]),
            size=torch.Size(block.whole),
        ),
    )


def cut(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the part of this rank's data that `block` names, as a view.

    Ranks: any.
    """
    part = local(tensor)
    if block.shape == tuple(part.shape):
        return part
    box = local_box(tensor)
    if box is None:
        raise AssertionError(f"{block.name}: this rank holds no part of it")
    for dim, (first, size) in enumerate(zip(block.start, block.shape, strict=True)):
        part = part.narrow(dim, first - box.start[dim], size)
    return part


class ShardLoadPlanner(DefaultLoadPlanner):
    """Plans what this rank reads: whatever of each tensor its part of the state needs.

    Refuses to cast: a tensor of another dtype or shape than the checkpoint's is an error.
    """

    def create_local_plan(self) -> LoadPlan:
        """Return what this rank has to read.

        Raises:
            StateMismatchError: A tensor is missing in the checkpoint, or has another dtype or shape.

        Ranks: any.
        """
        problems = _problems(self.state_dict, cast(Metadata, self.metadata))
        if problems:
            raise StateMismatchError(path="the checkpoint", step=-1, problems=problems)
        return super().create_local_plan()


def _problems(state: Mapping[str, Any], metadata: Metadata) -> list[str]:
    problems = []
    for name, target in state.items():
        if not isinstance(target, torch.Tensor):
            continue
        stored = metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            problems.append(f"missing in the checkpoint: {name}")
        elif stored.properties.dtype != target.dtype or stored.size != target.shape:
            problems.append(
                f"{name}: the checkpoint holds {tuple(stored.size)} {stored.properties.dtype}, "
                f"the state {tuple(target.shape)} {target.dtype}"
            )
    return problems

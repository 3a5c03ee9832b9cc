"""DCP planners: each rank writes its own share of the bytes, and reads what it needs of them."""

from __future__ import annotations

from collections.abc import Mapping
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

from distckpt.errors import StateMismatchError
from distckpt.plan import Block
from distckpt.shards.division import own_share
from distckpt.tensors import DTYPES, check_storable


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

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
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from distckpt.errors import StateMismatchError
from distckpt.plan import Block, Item, in_file_order, split
from distckpt.staging import Staging
from distckpt.tensors import (
    DTYPE_NAMES,
    DTYPES,
    Box,
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
        owners: Tensors that one rank has to write, because its values count, by name.
        private: Names of tensors that only this rank has.
    """

    def __init__(
        self,
        *,
        rank: int | None = None,
        num_writers: int | None = None,
        owners: Mapping[str, int] | None = None,
        private: Collection[str] = (),
    ) -> None:
        super().__init__()
        distributed = dist.is_available() and dist.is_initialized()
        self._rank = rank if rank is not None else (dist.get_rank() if distributed else 0)
        self._num_writers = num_writers or (dist.get_world_size() if distributed else 1)
        self._owners = owners or {}
        self._private = frozenset(private)
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
        common = {name: tensor for name, tensor in tensors.items() if self._is_common(name, tensor)}
        items = [
            Item(
                name=name,
                dtype=DTYPE_NAMES[tensor.dtype],
                shape=tuple(tensor.shape),
                owner=self._owners.get(name),
            )
            for name, tensor in sorted(common.items())
        ]
        blocks = split(items, self._num_writers)[self._rank] if self._rank < self._num_writers else []
        for name in sorted(tensors.keys() - common.keys()):
            blocks.extend(self._own_block(name, tensors[name]))
        blocks = in_file_order(blocks)
        self._data = {(block.name, block.start): _cut(tensors[block.name], block) for block in blocks}
        writes = [_write_item(block) for block in blocks]
        if self._rank == 0:
            values = sorted(self.state_dict.keys() - tensors.keys())
            writes += [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in values]
        self.plan = SavePlan(writes, planner_data=getattr(self, "mappings", None))
        return self.plan

    def _is_common(self, name: str, tensor: torch.Tensor) -> bool:
        return name not in self._private and (name in self._owners or is_everywhere(tensor))

    def _own_block(self, name: str, tensor: torch.Tensor) -> list[Block]:
        """Return the block of a tensor of which each rank holds another part, or which only this rank has."""
        box = local_box(tensor)
        if box is None or (isinstance(tensor, DTensor) and not writes_replica(tensor, name)):
            return []
        dtype = DTYPE_NAMES[tensor.dtype]
        return [Block(name=name, dtype=dtype, whole=tuple(tensor.shape), start=box.start, shape=box.shape)]

    def stage(self, staging: Staging) -> None:
        """Copy this rank's share to host memory; `resolve_data` gives the copies from then on.

        Ranks: any; blocks until the copies from the device are done.
        """
        views = list(self._data.values())
        copies = staging.stage(views)
        self._data = {
            key: torch.frombuffer(copy, dtype=view.dtype).view(view.shape) if view.numel() else view
            for (key, view), copy in zip(self._data.items(), copies, strict=True)
        }

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


def _cut(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the part of this rank's data that `block` names, as a view."""
    box = local_box(tensor)
    if box is None:
        raise AssertionError(f"{block.name}: this rank holds no part of it")
    part = local(tensor)
    for dim, (first, size) in enumerate(zip(block.start, block.shape, strict=True)):
        part = part.narrow(dim, first - box.start[dim], size)
    return part


class ShardLoadPlanner(DefaultLoadPlanner):
    """Plans what this rank reads: whatever of each tensor its part of the state needs.

    Refuses to cast: a tensor of another dtype or shape than the checkpoint's is an error.

    Args:
        boxes: For plain tensors in the state that stand for a part of a whole one: which part, by name.
        path: The checkpoint's path, for errors.
    """

    def __init__(self, *, boxes: Mapping[str, Box] | None = None, path: str = "the checkpoint") -> None:
        super().__init__()
        self._boxes = boxes
        self._path = path

    def create_local_plan(self) -> LoadPlan:
        """Return what this rank has to read.

        Raises:
            StateMismatchError: A tensor is missing in the checkpoint, or has another dtype or shape.

        Ranks: any.
        """
        metadata = cast(Metadata, self.metadata)
        problems = _problems(self.state_dict, metadata) if self._boxes is None else []
        if problems:
            raise StateMismatchError(path=self._path, step=-1, problems=problems)
        if self._boxes is None:
            return super().create_local_plan()
        reads: list[ReadItem] = []
        for name, box in self._boxes.items():
            chunk = ChunkStorageMetadata(offsets=torch.Size(box.start), sizes=torch.Size(box.shape))
            stored = cast(TensorStorageMetadata, metadata.state_dict_metadata[name])
            reads += create_read_items_for_chunk_list(name, stored, [chunk])
        return LoadPlan(reads)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return the tensor that a read item fills.

        Ranks: any.
        """
        if self._boxes is None:
            tensor: torch.Tensor = super().lookup_tensor(index)
            return tensor
        staged: torch.Tensor = self.state_dict[index.fqn]
        return staged


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

"""The division of a state among the ranks: which blocks of which tensors each of them writes, and their data."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch.distributed.tensor import DTensor

from distckpt.plan import Block, Item, in_file_order, split
from distckpt.tensors import DTYPE_NAMES, is_everywhere, local, local_box, writes_replica


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


def cut(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the part of this rank's data that `block` names, as a view.

    Ranks: any.
    """
    part = local(tensor)
    if part.shape == block.shape:
        return part
    box = local_box(tensor)
    if box is None:
        raise AssertionError(f"{block.name}: this rank holds no part of it")
    for dim, (first, size) in enumerate(zip(block.start, block.shape, strict=True)):
        part = part.narrow(dim, first - box.start[dim], size)
    return part

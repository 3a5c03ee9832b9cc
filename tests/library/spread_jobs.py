"""What ranks run in the tests of tensors that are cut over meshes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distckpt
from distckpt import catalog
from distckpt.storage import open_storage

# On four ranks: the mesh's ranks, in its shape, and which dimension of the tensor each of its dimensions cuts.
Cut = tuple[tuple[int, ...], list[Any], list[int | None]]
CUTS: dict[str, Cut] = {
    "even": ((8, 3), [0, 1, 2, 3], [0]),
    "uneven": ((7, 3), [0, 1, 2, 3], [0]),
    "fewer rows than ranks": ((3, 5), [0, 1, 2, 3], [0]),
    "one row": ((1, 5), [0, 1, 2, 3], [0]),
    "columns": ((3, 9), [0, 1, 2, 3], [1]),
    "many": ((40, 64), [0, 1, 2, 3], [0]),
    "replicas of rows": ((7, 6), [[0, 1], [2, 3]], [None, 0]),
    "rows of replicas": ((7, 6), [[0, 1], [2, 3]], [0, None]),
    "a grid": ((7, 5), [[0, 1], [2, 3]], [0, 1]),
    "a turned grid": ((8, 6), [[0, 1], [2, 3]], [1, 0]),
    "rows of rows": ((9, 2), [[0, 1], [2, 3]], [0, 0]),
    "even rows of rows": ((8, 2), [[0, 1], [2, 3]], [0, 0]),
    "another order": ((8, 2), [2, 0, 3, 1], [0]),
    "backwards": ((8, 2), [3, 2, 1, 0], [0]),
    "by columns of ranks": ((8, 4), [[0, 2], [1, 3]], [0, 1]),
}
DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.float64, torch.complex64]


def whole(name: str) -> torch.Tensor:
    """Return the content of a case, whose dtype is its own."""
    number = list(CUTS).index(name)
    shape, _, _ = CUTS[name]
    return (torch.arange(math.prod(shape)).view(shape) + number).to(DTYPES[number % len(DTYPES)])


def cut(name: str, *, is_odd: bool = False) -> DTensor:
    """Return this rank's piece of a case; torch itself hands pieces out in the ranks' order, whatever the mesh's is.

    Where it is odd, the mesh has this rank at the same place, and the others at places that follow from nothing.
    """
    shape, ranks, along = CUTS[name]
    if is_odd:
        ranks = [0, 1, 3, 2] if dist.get_rank() < 2 else [1, 0, 2, 3]
    mesh = DeviceMesh("cpu", torch.tensor(ranks))
    placements: list[Placement] = [Replicate() if dim is None else Shard(dim) for dim in along]
    size, start = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
    piece = whole(name)
    for dim, (first, length) in enumerate(zip(start, size, strict=True)):
        piece = piece.narrow(dim, min(first, piece.shape[dim]), length)
    stride = whole(name).stride()
    return DTensor.from_local(piece.clone(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def cuts(names: list[str]) -> dict[str, Any]:
    return {"cut": {name: cut(name) for name in names}, "same": torch.arange(11.0), "epoch": 3}


def save_cuts(directory: str, names: list[str], rng: bool) -> None:
    distckpt.save(directory, cuts(names), rng=rng, step=5)


def save_partly_odd(directory: str, name: str, odd_ranks: list[int]) -> None:
    """Save what some ranks cannot say of the others."""
    made = cut(name, is_odd=dist.get_rank() in odd_ranks)
    distckpt.save(directory, {"cut": {name: made, "even": cut("even")}}, step=5)


def save_thrice(directory: str, names: list[str], odd_ranks: list[int]) -> list[str]:
    """Save three times, with other values and then with one tensor more; return the third manifest's tensors."""
    is_odd = dist.get_rank() in odd_ranks
    with distckpt.CheckpointManager(directory, every=1, keep=5) as manager:
        state = {"cut": {name: cut(name, is_odd=is_odd and name == "uneven") for name in names}}
        manager.save(1, state)
        for tensor in state["cut"].values():
            tensor.to_local().add_(1)
        manager.save(2, state)
        state["cut"]["even"] = cut("even")
        manager.save(3, state)
    return sorted(state["cut"])


def load_cuts(directory: str, names: list[str]) -> list[str]:
    """Load onto these ranks, cut by rows and by columns, and into plain tensors; return what came back otherwise."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wrong = []
    for dim in (0, 1, None):
        placement = Replicate() if dim is None else Shard(dim)
        blank = {name: torch.zeros_like(whole(name)) for name in names}
        targets = {name: distribute_tensor(each, mesh, [placement]) for name, each in blank.items()}
        state: dict[str, Any] = {"cut": blank if dim is None else targets, "same": torch.zeros(11), "epoch": 0}
        distckpt.load(directory, state)
        for name, tensor in state["cut"].items():
            found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if not torch.equal(found, whole(name)):
                wrong.append(f"{name} by {dim}")
        if not torch.equal(state["same"], torch.arange(11.0)) or state["epoch"] != 3:
            wrong.append(f"the rest by {dim}")
    return wrong


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))


def sharded_net(kind: str, seed: int) -> dict[str, Any]:
    """Return a model and its optimizer: sharded ("fsdp"), replicated, too ("hsdp"), or cut by tensors, too ("tp").

    With "tp in part" the layer norm is left alone by that: its tensors lie on one dimension of the mesh.
    """
    torch.manual_seed(seed)
    net, world_size = Net(), dist.get_world_size()
    if kind == "fsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (world_size,)))
    else:
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("outer", "inner"))
        if kind in ("tp", "tp in part"):
            parallelize_module(net, mesh["inner"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            if kind == "tp":
                distribute_module(net.norm, mesh["inner"])
            fully_shard(net, mesh=mesh["outer"])
        else:
            fully_shard(net, mesh=mesh)
    return {"model": net, "optimizer": torch.optim.AdamW(net.parameters(), lr=0.01)}


def content(state: dict[str, Any]) -> dict[str, Any]:
    """Return all tensors of a model and its optimizer, whole."""

    def plain(value: Any) -> Any:
        if isinstance(value, DTensor):
            return value.full_tensor().tolist()
        return value.tolist() if isinstance(value, torch.Tensor) else value

    model = {name: plain(value) for name, value in state["model"].state_dict().items()}
    moments = state["optimizer"].state_dict()["state"]
    return {"model": model, "moments": {i: {n: plain(v) for n, v in m.items()} for i, m in moments.items()}}


def save_net(directory: str, kind: str) -> dict[str, Any]:
    state = sharded_net(kind, 0)
    for parameter in state["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        state["optimizer"].step()
    distckpt.save(directory, state, step=9)
    return content(state)


def load_net(directory: str, kind: str) -> dict[str, Any]:
    state = sharded_net(kind, 1)
    distckpt.load(directory, state)
    return content(state)


def pieces_found(directory: str, step: int | None = None) -> dict[str, Any]:
    """Return what a manifest says: its format, and of each tensor how many chunks stand there, and for how many."""
    folder, manifest = catalog.locate(open_storage(directory), step=step)
    import json

    body = json.loads(Path(directory, folder, "manifest.json").read_text())
    told = {name: len(entry["chunks"]) for name, entry in body["tensors"].items()}
    return {"format": body["format"], "told": told, "meant": {n: len(e.chunks) for n, e in manifest.tensors.items()}}

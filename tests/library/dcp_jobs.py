"""What ranks run in the tests of DTensors and of DCP's own entry points."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import distckpt
from distckpt.shards import ShardLoadPlanner, ShardReader, ShardSavePlanner, ShardWriter

SHAPE = (7, 6)


def placed(kind: str) -> list[Placement]:
    return {"rows": [Shard(0)], "columns": [Shard(1)], "replicated": [Replicate()]}[kind]


def a_dtensor(kind: str, fill: bool = True) -> DTensor:
    full = torch.arange(42.0).reshape(SHAPE) if fill else torch.zeros(SHAPE)
    return distribute_tensor(full, init_device_mesh("cpu", (dist.get_world_size(),)), placed(kind))


def save_dtensor(directory: str, kind: str, layout: str) -> None:
    distckpt.save(directory, {"w": a_dtensor(kind), "nested": {"w": a_dtensor(kind)}}, layout=layout)


def load_dtensor(directory: str, kind: str) -> list[Any]:
    """Load into DTensors placed another way, and into plain tensors; return both, whole."""
    state = {"w": a_dtensor(kind, fill=False), "nested": {"w": torch.zeros(SHAPE)}}
    target = state["w"]
    distckpt.load(directory, state)
    assert state["w"] is target
    return [target.full_tensor().tolist(), state["nested"]["w"].tolist()]


def hsdp_blocks(directory: str) -> int:
    """Save a tensor that is replicated and sharded on a 2x2 mesh; return how many bytes of it were stored."""
    mesh = init_device_mesh("cpu", (2, 2))
    tensor = distribute_tensor(torch.arange(42.0).reshape(SHAPE), mesh, [Replicate(), Shard(0)])
    distckpt.save(directory, {"w": tensor}, rng=False)
    state = {"w": torch.zeros(SHAPE)}
    distckpt.load(directory, state)
    assert torch.equal(state["w"], torch.arange(42.0).reshape(SHAPE))
    _, manifest = distckpt.catalog.locate(distckpt.storage.open_storage(directory))
    return sum(file.num_bytes - file.segments[0].num_bytes for file in manifest.files)


def fsdp_state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01)}


def save_fsdp(directory: str) -> dict[str, Any]:
    state = fsdp_state(0)
    for _ in range(3):
        state["model"](torch.ones(2, 6)).square().sum().backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()
    distckpt.save(directory, state)
    return whole(state)


def load_fsdp(directory: str) -> dict[str, Any]:
    state = fsdp_state(1)
    distckpt.load(directory, state)
    return whole(state)


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """Return all tensors of an FSDP2 model and its optimizer, gathered."""

    def plain(value: Any) -> Any:
        if isinstance(value, DTensor):
            return value.full_tensor().tolist()
        return value.tolist() if isinstance(value, torch.Tensor) else value

    model = {name: plain(value) for name, value in state["model"].state_dict().items()}
    moments = {
        index: {name: plain(value) for name, value in moment.items()}
        for index, moment in state["optimizer"].state_dict()["state"].items()
    }
    return {"model": model, "moments": moments}


def dcp_state(fill: bool) -> dict[str, Any]:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.fill_(index + 1.5 if fill else 0.0)
    return {
        "model": model.state_dict(),
        "sharded": a_dtensor("rows", fill=fill),
        "epoch": 3 if fill else 0,
        "name": "run" if fill else "",
        "groups": [{"lr": 0.5 if fill else 0.0, "betas": (0.9, 0.99) if fill else ()}],
    }


def plain(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {name: tensor.tolist() for name, tensor in state["model"].items()},
        "sharded": state["sharded"].full_tensor().tolist(),
        **{key: state[key] for key in ("epoch", "name", "groups")},
    }


def dcp_save(directory: str, ours: bool) -> dict[str, Any]:
    state = dcp_state(fill=True)
    planner = ShardSavePlanner() if ours else None
    dcp.save(state, storage_writer=ShardWriter(directory), planner=planner)
    return plain(state)


def dcp_load(directory: str, ours: bool) -> dict[str, Any]:
    state = dcp_state(fill=False)
    planner = ShardLoadPlanner() if ours else None
    dcp.load(state, storage_reader=ShardReader(directory), planner=planner)
    return plain(state)


def load_with_distckpt(directory: str) -> dict[str, Any]:
    state = dcp_state(fill=False)
    distckpt.load(directory, state)
    return plain(state)


def dcp_load_what_distckpt_saved(directory: str) -> dict[str, Any]:
    distckpt.save(directory, dcp_state(fill=True))
    return dcp_load(directory, ours=False)


def dcp_overwrites(directory: str) -> str:
    """Save twice to one path with dcp.save; return the second one's error."""
    dcp_save(directory, ours=True)
    try:
        dcp_save(directory, ours=True)
    except BaseException as error:  # noqa: BLE001  DCP's own error is no Exception
        return f"{type(error).__name__}: {error}"
    return "no error"


def dcp_loads_another_dtype(directory: str) -> str:
    dcp_save(directory, ours=True)
    state = dcp_state(fill=False)
    state["model"] = {name: tensor.double() for name, tensor in state["model"].items()}
    try:
        dcp.load(state, storage_reader=ShardReader(directory), planner=ShardLoadPlanner())
    except BaseException as error:  # noqa: BLE001  DCP's own error is no Exception
        return f"{type(error).__name__}: {error}"
    return "no error"

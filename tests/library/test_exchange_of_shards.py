"""What three ranks have saved in shards, DTensors and each rank's own state among it, goes out whole and comes back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rank_pool import RankPools
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distckpt
from distckpt import PerRank, catalog
from distckpt.arrays import Source
from distckpt.comparison import compare
from distckpt.exchange import intake
from distckpt.exchange.export import Format, export
from distckpt.storage import open_storage

WORLD_SIZE = 3
TARGETS: dict[str, Format] = {"file.safetensors": "safetensors", "folder": "safetensors", "f.pt": "torch", "dcp": "dcp"}
WEIGHTS = {
    "bf16": torch.linspace(-3, 3, 35).reshape(7, 5).bfloat16(),
    "e4m3": torch.linspace(-8, 8, 24).reshape(8, 3).to(torch.float8_e4m3fn),
    "e5m2": torch.linspace(-8, 8, 10).to(torch.float8_e5m2),
    "half": torch.tensor([1.5, float("inf"), float("nan")], dtype=torch.float16),
    "one": torch.tensor(2.5, dtype=torch.float64),
    "none": torch.zeros(0, 4),
    "complex": torch.complex(torch.ones(3, 2), torch.arange(6.0).reshape(3, 2)),
    "counts": torch.arange(70_000, dtype=torch.int32).reshape(700, 100),
}
DISTRIBUTED = torch.arange(44.0).reshape(11, 4)


def save(path: str) -> None:
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    state = {
        "weights": WEIGHTS,
        "distributed": distribute_tensor(DISTRIBUTED, mesh, [Shard(0)]),
        "own": PerRank({"position": rank, "noise": torch.full((rank, 2), float(rank))}),
        "epoch": 4,
    }
    distckpt.save(path, state, step=9, metrics={"loss": 0.5}, config={"seed": 1})


@pytest.fixture(scope="module")
def shards(session_ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("shards") / "one"
    session_ranks(WORLD_SIZE).run(save, str(path))
    made = source_at(path)
    assert made.manifest.world_size == WORLD_SIZE
    assert len(made.manifest.files) == WORLD_SIZE
    assert len(made.manifest.tensors["distributed"].chunks) == WORLD_SIZE
    return made


def source_at(path: Path) -> Source:
    storage = open_storage(path)
    folder, manifest = catalog.locate(storage)
    return Source(storage=storage, folder=folder, manifest=manifest)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Say whether two tensors have one dtype, shape and bytes, so that NaN equals NaN."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*bits)


@pytest.mark.parametrize("name", TARGETS)
def test_export_then_import_is_the_identity(shards: Source, tmp_path: Path, name: str) -> None:
    export(shards, str(tmp_path / name), form=TARGETS[name])
    storage = open_storage(tmp_path / "run")
    folder, _ = intake.commit(intake.read(str(tmp_path / name)), storage)
    again = source_at(tmp_path / "run" / folder)
    assert list(compare(shards, again)) == []
    assert again.manifest.objects == shards.manifest.objects
    facts = again.manifest.step, again.manifest.world_size, again.manifest.metrics, again.manifest.config
    assert facts == (9, WORLD_SIZE, {"loss": 0.5}, {"seed": 1})


def test_plain_tools_read_what_was_exported(shards: Source, tmp_path: Path) -> None:
    for name, form in TARGETS.items():
        export(shards, str(tmp_path / name), form=form)
    tensors = load_file(tmp_path / "file.safetensors")
    content: dict[str, Any] = torch.load(tmp_path / "f.pt", weights_only=True)
    wanted = {"weights": {name: torch.zeros_like(each) for name, each in WEIGHTS.items()}}
    wanted["distributed"] = torch.zeros_like(DISTRIBUTED)  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP's remark that there is no process group here
        dcp.load(wanted, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name, weight in WEIGHTS.items():
        in_file = tensors[f"weights.{name}"]  # where complex numbers are pairs
        assert same(torch.view_as_complex(in_file) if weight.is_complex() else in_file, weight), name
        assert same(content["weights"][name], weight), name
        assert same(wanted["weights"][name], weight), name
    for whole in (tensors["distributed"], content["distributed"], wanted["distributed"]):
        assert same(whole, DISTRIBUTED)  # type: ignore[arg-type]
    assert [own["position"] for own in content["own"]] == [0, 1, 2]
    assert same(tensors["rank-00002:own.noise"], torch.full((2, 2), 2.0))

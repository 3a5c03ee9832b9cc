"""Weights for inference come from any of the usual files, and no file runs code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import distckpt
from distckpt import CheckpointManager, load_weights
from distckpt.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    StateMismatchError,
    StorageError,
    UnsafeFileError,
)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # DCP's own, on every save without it


def same(one: nn.Module, other: nn.Module) -> bool:
    return repr(one.state_dict()) == repr(other.state_dict())


def wrapped(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict as DDP names it."""
    return {f"module.{name}": tensor for name, tensor in model.state_dict().items()}


FILES = {
    "plain.pt": lambda model: model.state_dict(),
    "ddp.pth": wrapped,
    "general.tar": lambda model: {"epoch": 3, "model_state_dict": model.state_dict(), "loss": 0.5},
    "lightning.ckpt": lambda model: {"state_dict": {f"model.{n}": t for n, t in model.state_dict().items()}},
    "nested.bin": lambda model: {"model": wrapped(model), "args": {"lr": 0.1}},
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_torch_save_load(tmp_path: Path, name: str):
    model = net(1)
    torch.save(FILES[name](model), tmp_path / name)
    found = load_weights(tmp_path / name, net(2)).eval()
    assert same(found, model)
    assert not found.training


def test_a_safetensors_file_loads(tmp_path: Path):
    model = net(1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert same(load_weights(tmp_path / "model.safetensors", net(2)), model)


@pytest.mark.parametrize("nested", [True, False])
def test_a_directory_of_dcp_loads(tmp_path: Path, nested: bool):
    model = net(1)
    state = {"model": model.state_dict(), "epoch": 3} if nested else model.state_dict()
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert same(load_weights(tmp_path / "dcp", net(2)), model)


@pytest.mark.parametrize("key", ["model", "net"])
def test_a_checkpoint_or_a_run_loads(tmp_path: Path, key: str):
    model = net(1)
    with CheckpointManager(tmp_path) as ckpt:
        for step in ckpt.steps({key: model, "optimizer": torch.optim.Adam(model.parameters())}, until=2):
            assert step
    assert same(load_weights(tmp_path, net(2)), model)
    compiled = torch.compile(net(2), backend="eager")  # nothing is run; importing the usual one warns in torch 2.11
    assert same(load_weights(tmp_path, compiled, step=2)._orig_mod, model)
    assert same(load_weights(tmp_path / "step-000000000002", net(2), key=key), model)


def test_one_of_several_models_is_named(tmp_path: Path):
    distckpt.save(tmp_path, {"g": net(1), "d": net(2)})
    assert same(load_weights(tmp_path, net(3), key="d"), net(2))
    with pytest.raises(StateMismatchError, match="several models") as caught:
        load_weights(tmp_path, net(3))
    assert "key='d'" in str(caught.value)


def test_skipped_names_stay(tmp_path: Path):
    model = net(1)
    distckpt.save(tmp_path / "run", {"model": model})
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for path in (tmp_path / "run", tmp_path / "model.pt"):
        other = net(2)
        head = other[3].weight.clone()
        load_weights(path, other, skip=["3.*"])
        assert torch.equal(other[3].weight, head)
        assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize("name", ["run", "model.pt"])
def test_weights_that_do_not_fit_are_refused_untouched(tmp_path: Path, name: str):
    model = net(1)
    distckpt.save(tmp_path / "run", {"model": model})
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    before = repr(other.state_dict())
    with pytest.raises(StateMismatchError, match=r"3\.weight: .* holds \(2, 16\) .*expects \(5, 16\)"):
        load_weights(tmp_path / name, other)
    with pytest.raises(StateMismatchError, match="float16"):
        load_weights(tmp_path / name, net().half())
    assert repr(other.state_dict()) == before


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_runs_code_runs_none(tmp_path: Path):
    marker = tmp_path / "code-ran"
    torch.save({"model": net().state_dict(), "x": Evil(marker)}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"x": Evil(marker)}))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(UnsafeFileError, match="more than tensors and plain values"):
            load_weights(tmp_path / name, net())
    dcp.save(net().state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(UnsafeFileError, match=r"posix\.mkdir"):
        load_weights(tmp_path / "dcp", net())
    assert not marker.exists()


def test_a_dcp_directory_that_points_outside_is_refused(tmp_path: Path):
    dcp.save(net().state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    path = tmp_path / "dcp" / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"../_0.distcp"))
    with pytest.raises(UnsafeFileError, match="outside the directory"):
        load_weights(tmp_path / "dcp", net())


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
def test_a_broken_file_is_called_broken(tmp_path: Path, name: str):
    torch.save(net().state_dict(), tmp_path / "whole.pt")
    (tmp_path / name).write_bytes((tmp_path / "whole.pt").read_bytes()[:700])
    with pytest.raises(CheckpointDamagedError):
        load_weights(tmp_path / name, net())


def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path):
    with pytest.raises(CheckpointNotFoundError):
        load_weights(tmp_path / "none", net())
    with pytest.raises(StorageError, match="no such file"):
        load_weights(tmp_path / "none.pt", net())
    torch.save({"something": {"else": torch.ones(2)}}, tmp_path / "other.pt")
    with pytest.raises(StateMismatchError, match="no name fits the model"):
        load_weights(tmp_path / "other.pt", net())

"""What goes out to other tools comes back as it was, and what is theirs comes in without running anything."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

import distckpt
from distckpt import catalog
from distckpt.arrays import Source
from distckpt.comparison import compare
from distckpt.errors import (
    CheckpointDamagedError,
    CheckpointExistsError,
    ConfigError,
    StorageError,
    UnsafeFileError,
    UnsupportedStateError,
)
from distckpt.exchange import intake
from distckpt.exchange.export import Format, export
from distckpt.exchange.placement import placed
from distckpt.manifest import ObjectEntry
from distckpt.safetensors import ITEM_BYTES
from distckpt.storage import open_storage

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # DCP's own, on every use without it

TARGETS: dict[str, Format] = {
    "file.safetensors": "safetensors",
    "folder": "safetensors",
    "file.pt": "torch",
    "dcp": "dcp",
}


class Tied(nn.Module):
    """A model whose two ends share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight


def odd_state() -> dict[str, Any]:
    """Return a state with everything that a checkpoint can hold."""
    torch.manual_seed(3)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "sgd": torch.optim.SGD(model.parameters(), lr=0.1),
        "epoch": 3,
        "empty": {},
        "values": {
            "none": None,
            "nan": float("nan"),
            "tuple": (1, "two", (3.0,)),
            "bytes": b"\x00\xff",
            "scalar": np.float32(0.1),
            "array": np.arange(6, dtype=np.uint16).reshape(2, 3),
            "by number": {2: "two", 1: ["one", {}]},
            "list": [torch.ones(2), {"inner": torch.zeros(0, 3)}],
            "in a tuple": (torch.full((2,), 7.0), 1),
        },
        "tensors": {
            "bf16": torch.randn(3, 5).bfloat16(),
            "complex": torch.randn(2, 2, dtype=torch.complex64),
            "bool": torch.tensor([True, False]),
            "scalar": torch.tensor(1.5, dtype=torch.float64),
            "f8": torch.randn(4).to(torch.float8_e4m3fn),
        },
    }


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("odd")
    distckpt.save(path, odd_state(), step=12, metrics={"val/loss": 0.5, "bad": float("nan")}, config={"seed": 1})
    return source_at(path)


def source_at(path: Path) -> Source:
    storage = open_storage(path)
    folder, manifest = catalog.locate(storage)
    return Source(storage=storage, folder=folder, manifest=manifest)


def came_back(path: Path, run: Path, **options: Any) -> Source:
    storage = open_storage(run)
    folder, _ = intake.commit(intake.read(str(path), **options), storage)
    return source_at(run / folder)


@pytest.mark.parametrize("name", TARGETS)
def test_export_then_import_is_the_same_checkpoint(odd: Source, tmp_path: Path, name: str) -> None:
    export(odd, str(tmp_path / name), form=TARGETS[name])
    again = came_back(tmp_path / name, tmp_path / "run")
    assert list(compare(odd, again)) == []
    before, after = odd.manifest, again.manifest
    assert after.objects == before.objects
    assert (after.step, after.world_size, after.config) == (12, 1, {"seed": 1})
    assert repr(after.metrics) == repr(before.metrics)
    state = odd_state()
    for parameter in state["model"].parameters():
        parameter.data.zero_()
    assert distckpt.load(again.path, state).step == 12
    assert torch.equal(state["model"].head.weight, odd_state()["model"].head.weight)
    assert state["optimizer"].state_dict()["state"][0]["step"] == 1


def test_several_files_with_an_index_come_back_too(odd: Source, tmp_path: Path) -> None:
    export(odd, str(tmp_path / "folder"), form="safetensors", max_file_bytes=100)
    index = json.loads((tmp_path / "folder" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "folder").glob("*.safetensors"))
    assert files == sorted({*index["weight_map"].values()})
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(entry.num_bytes for entry in odd.manifest.tensors.values())
    again = came_back(tmp_path / "folder", tmp_path / "run")
    assert list(compare(odd, again)) == []


@pytest.mark.parametrize("name", TARGETS)
def test_what_differs_by_rank_comes_back_to_its_rank(tmp_path: Path, name: str) -> None:
    distckpt.save(tmp_path / "one", {"a": torch.ones(2), "position": {"t": torch.ones(3), "n": 0}})
    one = intake.Taken()
    for rank in range(3):
        one.tensors[f"rank-{rank:05d}:position.t"] = torch.full((3,), float(rank))
    trees = tuple({"$dict": [["t", {"$tensor": f"rank-{r:05d}:position.t"}], ["n", r]]} for r in range(3))
    one.objects["position"] = ObjectEntry(kind="value", trees=trees, per_rank=True)
    one.record = intake.Record(step=5, world_size=3, objects=one.objects)
    folder, _ = intake.commit(one, open_storage(tmp_path / "run"))
    made = source_at(tmp_path / "run" / folder)
    export(made, str(tmp_path / name), form=TARGETS[name])
    again = came_back(tmp_path / name, tmp_path / "again")
    assert list(compare(made, again)) == []
    assert again.manifest.world_size == 3
    assert again.manifest.objects["position"].per_rank


def test_stock_tools_read_what_is_exported(odd: Source, tmp_path: Path) -> None:
    state = odd_state()
    weights = state["model"].state_dict()
    export(odd, str(tmp_path / "file.pt"), form="torch")
    content = torch.load(tmp_path / "file.pt", weights_only=True)
    assert content["epoch"] == 3
    Tied().load_state_dict(content["model"])
    state["optimizer"].load_state_dict(content["optimizer"])
    export(odd, str(tmp_path / "dcp"), form="dcp")
    wanted = {"model": Tied().state_dict(), "epoch": 0}
    dcp.load(wanted, checkpoint_id=tmp_path / "dcp")
    assert wanted["epoch"] == 3
    export(odd, str(tmp_path / "hf"), form="hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == weights.keys(), "without the key, and tied weights under both names"
    for loaded in (content["model"], wanted["model"], found):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_parts_are_exported_by_key_and_pattern(odd: Source, tmp_path: Path) -> None:
    export(odd, str(tmp_path / "a.safetensors"), form="safetensors", key="model", only=["model.norm"])
    assert {*load_file(tmp_path / "a.safetensors")} == {
        f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    export(odd, str(tmp_path / "b.pt"), form="torch", only=["values.list.0", "epoch", "optimizer.state.*.step"])
    content = torch.load(tmp_path / "b.pt", weights_only=True)
    assert content.keys() == {"values", "epoch", "optimizer"}
    assert content["values"]["list"][0].tolist() == [1, 1]
    assert {*content["optimizer"]["state"][0]} == {"step"}
    for options in ({"key": "modell"}, {"only": ["model.nrom.*"]}):
        with pytest.raises(ConfigError):
            export(odd, str(tmp_path / "c.pt"), form="torch", **options)
    assert not (tmp_path / "c.pt").exists()


@pytest.mark.parametrize("name", TARGETS)
def test_what_exists_is_not_replaced_and_nothing_half_made_is_left(odd: Source, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        export(odd, str(tmp_path / name), form=TARGETS[name])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, name: str) -> None:
    distckpt.save(tmp_path / "one", {"a": torch.ones(4000)})
    (data,) = (tmp_path / "one").glob("*/*.safetensors")
    body = bytearray(data.read_bytes())
    body[5000] ^= 1
    data.write_bytes(body)
    with pytest.raises(CheckpointDamagedError):
        export(source_at(tmp_path / "one"), str(tmp_path / name), form=TARGETS[name])
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def optimizer_of(model: nn.Module, *, steps: int = 1) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return optimizer


def trains_on(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Restore into fresh objects, do one step on both sides, and compare."""
    fresh = net()
    fresh_optimizer = optimizer_of(fresh, steps=0)
    with distckpt.CheckpointManager(run) as manager:
        assert manager.restore({"model": fresh, "optimizer": fresh_optimizer}, only=["model", "optimizer"]) > 0
    for one, its_optimizer in ((model, optimizer), (fresh, fresh_optimizer)):
        its_optimizer.zero_grad()
        one(torch.full((1, 3), 2.0)).sum().backward()
        its_optimizer.step()
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_checkpoint_of_torch_save_comes_in_and_trains_on(tmp_path: Path) -> None:
    model = net()
    optimizer = optimizer_of(model)
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"net": wrapped, "optimizer": optimizer.state_dict(), "epoch": 4}, tmp_path / "old.tar")
    taken = intake.read(str(tmp_path / "old.tar"), renamed={"net": "model"})
    assert taken.dropped == {"net": "module."}
    intake.commit(taken, open_storage(tmp_path / "run"), step=40)
    assert trains_on(tmp_path / "run", model, optimizer)


def test_a_folder_of_stock_dcp_comes_in_and_trains_on(tmp_path: Path) -> None:
    model = net()
    optimizer = optimizer_of(model)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 4, "names": ["a", "b"]}
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    taken = intake.read(str(tmp_path / "dcp"))
    folder, manifest = intake.commit(taken, open_storage(tmp_path / "run"), step=40)
    assert manifest.objects["epoch"].trees == (4,)
    assert manifest.objects["names"].trees == (["a", "b"],)
    assert manifest.objects["optimizer"].kind == "optimizer"
    assert trains_on(tmp_path / "run", model, optimizer)
    assert folder == "step-000000000040"


def test_an_optimizer_without_state_comes_in_from_dcp(tmp_path: Path) -> None:
    """DCP drops the empty dict that such a state is."""
    model = net()
    dcp.save({"optimizer": torch.optim.SGD(model.parameters(), lr=0.5).state_dict()}, checkpoint_id=tmp_path / "dcp")
    again = came_back(tmp_path / "dcp", tmp_path / "run")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distckpt.load(again.path, {"optimizer": optimizer})
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_bare_weights_stand_under_a_key(tmp_path: Path) -> None:
    model = net()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        again = came_back(tmp_path / name, tmp_path / f"run-{name}", key="net")
        found = distckpt.load_weights(again.path, net(), key="net")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(), strict=True))


def test_values_that_somebody_edits_in_an_export_count(odd: Source, tmp_path: Path) -> None:
    export(odd, str(tmp_path / "file.pt"), form="torch")
    content = torch.load(tmp_path / "file.pt", weights_only=True)
    content["epoch"] = 99
    torch.save(content, tmp_path / "edited.pt")
    again = came_back(tmp_path / "edited.pt", tmp_path / "run")
    assert again.manifest.objects["epoch"].trees == (99,)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_runs_code_runs_none(tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    torch.save({"model": net().state_dict(), "x": Evil(marker)}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(marker)))
    dcp.save({"model": net().state_dict(), "x": Evil(marker)}, checkpoint_id=tmp_path / "values")
    dcp.save(net().state_dict(), checkpoint_id=tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    for name in ("evil.pt", "plain.pt", "values", "dcp"):
        with pytest.raises(UnsafeFileError):
            intake.read(str(tmp_path / name))
    assert not marker.exists()


def test_an_index_that_points_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "w" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UnsafeFileError, match="outside"):
        intake.read(str(tmp_path / "w"))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "dcp"])
def test_what_is_cut_off_is_called_damaged(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(999)}, tmp_path / "w.safetensors")
    torch.save({"a": torch.ones(999)}, tmp_path / "w.pt")
    dcp.save({"a": torch.ones(999)}, checkpoint_id=tmp_path / "dcp")
    path = tmp_path / name if name != "dcp" else tmp_path / "dcp" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointDamagedError):
        intake.read(str(tmp_path / name))


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "dtype": {"x": torch.float32}}, tmp_path / "w.pt")
    with pytest.raises(UnsupportedStateError, match=r"dtype\.x"):
        intake.read(str(tmp_path / "w.pt"))


def test_an_import_never_replaces_a_checkpoint(odd: Source, tmp_path: Path) -> None:
    export(odd, str(tmp_path / "file.safetensors"), form="safetensors")
    taken = intake.read(str(tmp_path / "file.safetensors"))
    storage = open_storage(tmp_path / "run")
    intake.commit(taken, storage)
    with pytest.raises(CheckpointExistsError, match="--step N"):
        intake.commit(taken, storage)
    folder, manifest = intake.commit(taken, storage, step=13)
    assert (folder, manifest.step) == ("step-000000000013", 13)
    with pytest.raises(ConfigError, match="is the folder of step 14"):
        intake.commit(taken, open_storage(tmp_path / "run" / "step-000000000014"))


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path, is_folder: bool) -> None:
    target = tmp_path / "target"

    def race() -> None:
        with placed(target, folder=is_folder) as temporary:
            if is_folder:
                (temporary / "file").write_text("ours")
                target.mkdir()
            else:
                temporary.write_text("ours")
                target.write_text("theirs")

    with pytest.raises(StorageError, match="exists already"):
        race()
    assert list(tmp_path.iterdir()) == [target]
    assert is_folder or target.read_text() == "theirs"


def test_each_exported_tensor_is_aligned_to_its_own_width(odd: Source, tmp_path: Path) -> None:
    export(odd, str(tmp_path / "x.safetensors"), form="safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    places = [(facts["data_offsets"][0], facts["dtype"]) for name, facts in header.items() if name != "__metadata__"]
    assert (8 + size) % 8 == 0
    assert len({dtype for _, dtype in places}) > 4
    assert [begin for begin, dtype in places if begin % ITEM_BYTES[dtype]] == []

"""Damaged and partial checkpoints are found, never loaded, and never passed over in silence."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from torch import nn

import distckpt
from distckpt import CheckpointManager, catalog, verification
from distckpt.errors import CheckpointDamagedError, CheckpointNotFoundError
from distckpt.names import MANIFEST
from distckpt.storage import open_storage

FLIPS = 200


def three_steps(directory: Path) -> None:
    """Write checkpoints 10, 20 and 30; the value of each entry says its step."""
    manager = CheckpointManager(directory, keep=10, background=False)
    for step in (10, 20, 30):
        manager.save(step, filled(step))
    manager.close()


def filled(step: int) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    return {"model": model, "epoch": step}


def found_step(state: dict[str, Any]) -> int:
    """Return the step of which a loaded state is, all of it."""
    values = {int(value) for parameter in state["model"].parameters() for value in parameter.flatten()}
    assert values == {state["epoch"]}
    return state["epoch"]


def problems(directory: Path, step: int) -> list[str]:
    storage = open_storage(directory)
    folder = f"step-{step:012d}"
    try:
        return [p.file for p in verification.verify(storage, catalog.read_manifest(storage, folder), folder=folder)]
    except CheckpointDamagedError as error:
        return [str(error.file)]


def test_any_flipped_byte_is_named_and_the_newest_whole_checkpoint_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    original = tmp_path / "original"
    three_steps(original)
    rng = random.Random(5)
    newest = original / "step-000000000030"
    files = sorted(path.relative_to(original) for path in newest.rglob("*") if path.is_file())
    assert len(files) == 2
    for trial in range(FLIPS):
        directory = tmp_path / "run"
        shutil.copytree(original, directory)
        path = directory / files[trial % len(files)]
        data = bytearray(path.read_bytes())
        place = rng.randrange(len(data))
        data[place] ^= rng.randrange(1, 256)
        path.write_bytes(data)
        assert problems(directory, 30) == [str(path.relative_to(directory / newest.name))], f"byte {place} of {path}"
        state = filled(0)
        caplog.clear()
        with CheckpointManager(directory) as ckpt, caplog.at_level(logging.WARNING, logger="distckpt"):
            assert ckpt.restore(state) == 20
        assert found_step(state) == 20
        (warning,) = [record.message for record in caplog.records]
        assert path.name in warning
        assert "next older one is taken" in warning
        shutil.rmtree(directory)


@pytest.mark.parametrize("how", ["half", "less one byte", "empty", "longer", "missing", "zeros", "swapped"])
def test_every_kind_of_damage_to_a_data_file_is_found(tmp_path: Path, how: str):
    three_steps(tmp_path)
    (path,) = (tmp_path / "step-000000000030").rglob("*.safetensors")
    data = path.read_bytes()
    (other,) = (tmp_path / "step-000000000020").rglob("*.safetensors")
    changed = {
        "half": data[: len(data) // 2],
        "less one byte": data[:-1],
        "empty": b"",
        "longer": data + b"\0",
        "missing": None,
        "zeros": data[:5000] + bytes(100) + data[5100:],
        "swapped": other.read_bytes(),
    }[how]
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    assert problems(tmp_path, 30) == [str(path.relative_to(tmp_path / "step-000000000030"))]
    state = filled(0)
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.restore(state) == 20
    assert found_step(state) == 20


def test_a_damaged_checkpoint_is_put_aside_and_its_step_can_be_saved_again(tmp_path: Path):
    three_steps(tmp_path)
    (path,) = (tmp_path / "step-000000000030").rglob("*.safetensors")
    path.write_bytes(b"")
    with CheckpointManager(tmp_path, background=False) as ckpt:
        assert ckpt.restore(filled(0)) == 20
        assert [c.step for c in ckpt.checkpoints] == [10, 20]
        (aside,) = (tmp_path / "step-000000000030").glob("damaged-*.json")
        assert "rank-00000.safetensors" in json.loads(aside.read_text())["reason"]
        ckpt.save(30, filled(30))
        assert [c.step for c in ckpt.checkpoints] == [10, 20, 30]
    state = filled(0)
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.restore(state) == 30
    assert found_step(state) == 30


def test_a_run_never_starts_afresh_where_all_checkpoints_are_damaged(tmp_path: Path):
    three_steps(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"")
    for _ in range(2):  # the second time, nothing is left but what was put aside
        state = filled(0)
        with CheckpointManager(tmp_path) as ckpt, pytest.raises(CheckpointDamagedError, match="no good checkpoint"):
            ckpt.restore(state)
        assert found_step(state) == 0


def test_a_partial_checkpoint_is_invisible_but_not_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    three_steps(tmp_path)
    for folder in tmp_path.glob("step-*"):
        (folder / MANIFEST).unlink()
    with CheckpointManager(tmp_path) as ckpt, caplog.at_level(logging.WARNING, logger="distckpt"):
        assert ckpt.restore(filled(0)) == 0
        assert ckpt.latest is None
    assert "it holds only partial ones (3)" in caplog.text
    assert "starting from step 0" in caplog.text
    with pytest.raises(CheckpointNotFoundError, match="only partial ones"):
        distckpt.load(tmp_path, filled(0))


def test_what_dead_saves_left_is_removed_by_the_next_save(tmp_path: Path):
    three_steps(tmp_path)
    (tmp_path / "step-000000000030" / MANIFEST).unlink()
    with CheckpointManager(tmp_path, background=False, keep=10) as ckpt:
        assert ckpt.restore(filled(0)) == 20
        ckpt.save(40, filled(40))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:012d}" for step in (10, 20, 40)]


def test_a_load_of_a_damaged_checkpoint_leaves_the_state_as_it_was(tmp_path: Path):
    three_steps(tmp_path)
    (path,) = (tmp_path / "step-000000000030").rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    state = filled(7)
    with pytest.raises(CheckpointDamagedError, match="distckpt verify"):
        distckpt.load(tmp_path, state)
    assert found_step(state) == 7
    model = distckpt.load_weights(tmp_path, filled(7)["model"])
    assert int(model[0].weight[0, 0]) == 20


def test_a_manifest_in_the_wrong_folder_is_damage(tmp_path: Path):
    three_steps(tmp_path)
    shutil.copytree(tmp_path / "step-000000000030", tmp_path / "step-000000000099")
    state = filled(0)
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.restore(state) == 30
    assert found_step(state) == 30


def test_retention_keeps_the_resumed_one_and_the_best(tmp_path: Path):
    state = jobs.build()
    with CheckpointManager(tmp_path, keep=5, background=False) as ckpt:
        for step, loss in ((1, 0.1), (2, 0.9), (3, 0.5)):
            ckpt.save(step, state, metrics={"val/loss": loss})
    keep = distckpt.Retention(last=1, best=1, metric="val/loss")
    with CheckpointManager(tmp_path, keep=keep) as ckpt:
        assert ckpt.restore(state) == 3
        for step in (4, 5, 6):
            ckpt.save(step, state, metrics={"val/loss": 0.7})
            ckpt.wait()
        assert [c.step for c in ckpt.checkpoints] == [1, 3, 6]
        assert ckpt.latest is not None
        assert ckpt.latest.metrics == {"val/loss": 0.7}

"""`distckpt export` and `distckpt import`: the formats, the exit codes, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Command = Callable[..., Any]

FORMS = [("x.safetensors", "safetensors"), ("x.pt", "torch"), ("dcp", "dcp"), ("folder", "safetensors")]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_checkpoint_goes_out_and_comes_back(
    command: Command, run: Path, tmp_path: Path, name: str, form: str
) -> None:
    result = command("export", run, tmp_path / name, "--format", form, "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer.keys() == {
        "path",
        "step",
        "target",
        "format",
        "key",
        "whole",
        "tensors",
        "values",
        "bytes",
        "seconds",
    }
    assert (answer["step"], answer["whole"], answer["format"]) == (30, True, form)
    result = command("import", tmp_path / name, tmp_path / "again", "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer.keys() == {
        "source", "path", "step", "keys", "tensors", "bytes", "from_export", "dropped", "seconds"
    }  # fmt: skip
    assert (answer["step"], answer["from_export"]) == (30, True)
    assert command("diff", run, tmp_path / "again").exit_code == 0


def test_a_model_for_hugging_face_has_its_own_names(command: Command, run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert command("export", run, tmp_path / "hf", "--format", "hf", "--max-file-bytes", 200).exit_code == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert "0.weight" in index["weight_map"]
    found = {name for file in {*index["weight_map"].values()} for name in load_file(tmp_path / "hf" / file)}
    assert found == index["weight_map"].keys()
    result = command("export", run, tmp_path / "m.safetensors", "--format", "safetensors", "--only", "optimizer")
    assert "values left out" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--format", "safetensors", "--key", "modell"], 2, "no key 'modell'"),
        (["--format", "torch", "--only", "nothing.*"], 2, "fits no entry"),
        (["--format", "pickle"], 2, "--format"),
        ([], 2, "--format"),
        (["--format", "torch", "--step", 40], 3, "no checkpoint"),
    ],
)
def test_wrong_usage_of_export_is_told_and_makes_nothing(
    command: Command, run: Path, tmp_path: Path, options: list[Any], code: int, said: str
) -> None:
    result = command("export", run, tmp_path / "x.pt", *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run-7"]


def test_an_existing_target_and_a_url_are_refused(command: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("")
    assert command("export", run, tmp_path / "x.pt", "--format", "torch").exit_code == 6
    assert command("export", run, "s3://bucket/x.pt", "--format", "torch").exit_code == 2


def test_wrong_usage_of_import_is_told(command: Command, tmp_path: Path) -> None:
    torch.save({"net": {"w": torch.ones(2)}, "n": 1}, tmp_path / "x.pt")
    target = tmp_path / "run"
    assert command("import", tmp_path / "none.pt", target).exit_code == 4
    assert command("import", tmp_path, target).exit_code == 4
    assert command("import", tmp_path / "x.pt", target, "--rename", "net").exit_code == 2
    assert command("import", tmp_path / "x.pt", target, "--rename", "nat=model").exit_code == 2
    assert command("import", tmp_path / "x.pt", target, "--format", "safetensors").exit_code == 5
    assert not target.exists()
    assert command("import", tmp_path / "x.pt", target, "--rename", "net=model").exit_code == 0
    assert command("import", tmp_path / "x.pt", target).exit_code == 6


def test_a_pickle_that_asks_for_more_is_not_opened(command: Command, tmp_path: Path) -> None:
    torch.save({"a": torch.nn.Linear(1, 1)}, tmp_path / "x.pt")
    result = command("import", tmp_path / "x.pt", tmp_path / "run")
    assert result.exit_code == 5
    assert "is not opened" in result.stderr


def test_a_checkpoint_on_s3_goes_out_and_comes_back(
    command: Command, run: Path, s3_bucket: str, tmp_path: Path
) -> None:
    url = f"s3://{s3_bucket}/run"
    command("cp", run, url, "--last", 1)
    assert command("export", url, tmp_path / "x.safetensors", "--format", "safetensors").exit_code == 0
    assert command("import", tmp_path / "x.safetensors", f"s3://{s3_bucket}/again").exit_code == 0
    assert command("diff", url, f"s3://{s3_bucket}/again").exit_code == 0

"""`distckpt show` tells what one checkpoint holds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distckpt

Command = Callable[..., Any]


def rows(text: str) -> dict[str, list[str]]:
    """Return the words behind each name in what `show` prints."""
    found = {}
    for line in text.splitlines():
        name, *rest = line.replace("│", "").replace("├─", "").replace("└─", "").split() or [""]
        found[name] = rest
    return found


def test_facts_configuration_entries_and_values_are_shown(command: Command, run: Path) -> None:
    result = command("show", run)
    assert (result.exit_code, result.stderr) == (0, "")
    found = rows(result.stdout)
    assert found["path"] == [str(run / "step-000000000030")]
    assert found["step"][0] == "float32"  # the optimizer's; the last of that name
    assert found["saved"] == ["by", "1", "rank,", "sharded"]
    assert found["metrics"] == ["val/loss", "0.3", "val/top1", "0.5"]
    assert found["model.name"] == ["tiny"]
    assert found["versions"][:2] == ["distckpt", "0.1.0"]
    assert found["running_mean"][:4] == ["float32", "(4,)", "16", "B"]
    assert found["exp_avg_sq"][0] == "float32"
    assert found["epoch"] == ["int", "3"]
    assert found["history"] == ["list", "[1.0,", "nan]"]
    assert found["lr"] == ["float", "0.1"]


def test_json_has_the_documented_fields(command: Command, run: Path) -> None:
    result = command("show", run, "--step", 20, "--json")
    facts = json.loads(result.stdout)
    assert facts.keys() == {
        "url", "path", "pinned", "step", "run", "attempt", "layout", "world_size", "created", "bytes", "metrics",
        "versions", "timings", "parent", "writer", "config", "files", "keys", "tensors",
    }  # fmt: skip
    assert facts["step"] == 20
    assert facts["parent"]["step"] == 10
    assert facts["config"] == {"seed": 1, "model": {"name": "tiny"}}
    assert {key["name"]: key["kind"] for key in facts["keys"]} == {
        "_rng": "stateful", "epoch": "value", "history": "value", "model": "module", "optimizer": "optimizer",
    }  # fmt: skip
    tensors = {tensor["name"]: tensor for tensor in facts["tensors"]}
    assert {"dtype": "F32", "shape": [4, 3, 3, 3], "bytes": 432}.items() <= tensors["model.0.weight"].items()
    assert sum(tensor["share"] for tensor in facts["tensors"]) == pytest.approx(1)
    assert sum(file["bytes"] for file in facts["files"]) == facts["bytes"]


def test_a_checkpoints_own_folder_is_shown(command: Command, run: Path) -> None:
    assert json.loads(command("show", run / "step-000000000010", "--json").stdout)["step"] == 10
    assert command("show", run / "step-000000000010", "--step", 20).exit_code == 3


def test_a_tensor_of_two_names_counts_once(command: Command, tmp_path: Path) -> None:
    model = nn.ModuleDict({"one": nn.Linear(10, 10, bias=False), "two": nn.Linear(10, 10, bias=False)})
    model["two"].weight = model["one"].weight
    distckpt.save(tmp_path / "tied", {"model": model}, rng=False)
    text = command("show", tmp_path / "tied").stdout
    assert "is model.one.weight" in text
    assert rows(text)["model"] == ["module", "400", "B", "100.0", "%"]


def test_odd_values_are_shown(command: Command, tmp_path: Path) -> None:
    state = {
        "words": "x" * 500,
        "many": {f"name {index}": index for index in range(1000)},
        "keys": {1: b"\0", (1, 2): None, "$tensor": ()},
        "nothing": {},
        "scalar": torch.tensor(1.0, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3, dtype=torch.complex64),
    }
    distckpt.save(tmp_path / "odd", state, rng=False)
    text = command("show", tmp_path / "odd").stdout
    found = rows(text)
    assert max(map(len, text.splitlines())) < 200
    assert found["many"][0] == "dict"
    assert found["scalar"] == ["bfloat16", "()", "2", "B", "100.0", "%"]
    assert found["empty"] == ["complex64", "(0,", "3)", "0", "B", "0.0", "%"]
    assert found["nothing"] == ["dict", "{}"]
    assert found["$tensor"] == ["tuple", "()"]
    assert found["1"] == ["bytes", r"b'\x00'"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a checkpoint of 5,000 tensors in 500 parts."""
    weights = {f"part{part}": {f"w{number}": torch.ones(2) for number in range(10)} for part in range(500)}
    path = tmp_path_factory.mktemp("large") / "one"
    distckpt.save(path, {"weights": weights}, rng=False)
    return path


def test_thousands_of_tensors_are_all_written_to_a_pipe(command: Command, large: Path) -> None:
    lines = command("show", large).stdout.splitlines()
    assert sum("float32" in line for line in lines) == 5_000
    assert len({line.index("float32") for line in lines if "float32" in line}) == 1, "in columns"


def test_depth_says_how_many_are_below(command: Command, large: Path) -> None:
    found = rows(command("show", large, "--depth", 1).stdout)
    assert found["weights"] == ["5,000", "entries", "40.0", "kB", "100.0", "%"]
    found = rows(command("show", large, "--depth", 2).stdout)
    assert found["part0"] == found["part499"] == ["10", "entries", "80", "B", "0.2", "%"]
    assert command("show", large, "--depth", 0).exit_code == 2


def test_many_rows_are_not_drawn_by_rich_which_takes_a_millisecond_for_each() -> None:
    code = "import sys; from distckpt.cli.tables import Row, print_table\n"
    code += "print_table(['a', 'b'], [Row(cells=('x\\x1b', f'{n}')) for n in range(5_000)], right=['b'])\n"
    code += "assert not {name for name in sys.modules if name.startswith('rich')}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    lines = result.stdout.splitlines()
    assert (len(lines), lines[0], lines[1], lines[-1]) == (5_001, "a         b", "x\\x1b     0", "x\\x1b  4999")


def test_a_damaged_manifest_is_exit_5(command: Command, run: Path) -> None:
    (run / "step-000000000020" / "manifest.json").write_text("{}")
    result = command("show", run, "--step", 20)
    assert result.exit_code == 5
    assert "'manifest.json' is no whole manifest" in result.stderr

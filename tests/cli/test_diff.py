"""`distckpt diff` exits 0 only if all state is the same, and says where it differs."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distckpt
from distckpt import PerRank, catalog
from distckpt.arrays import Source
from distckpt.comparison import compare
from distckpt.storage import CountingStorage, open_storage

Command = Callable[..., Any]


def state(**changed: Any) -> dict[str, Any]:
    nested = {"nan": math.nan, "array": np.arange(6).reshape(2, 3), "of": {1: (True, None, b"x"), "two": [1.0, -0.0]}}
    entries: dict[str, Any] = {
        "weight": torch.arange(20.0).reshape(4, 5),
        "half": torch.tensor([math.nan, 1.5, -0.0], dtype=torch.bfloat16),
        "nested": nested,
        "epoch": 3,
    }
    return {key: value for key, value in {**entries, **changed}.items() if value is not ...}


@pytest.fixture
def changes(command: Command, tmp_path: Path) -> Callable[..., list[tuple[Any, ...]]]:
    """Save two states, and return what diff finds: (what, kind, name, a, b) each."""

    def between(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[Any, ...]]:
        for name, saved in (("a", first), ("b", second)):
            distckpt.save(tmp_path / name, saved, step=1, rng=False)
        result = command("diff", tmp_path / "a", tmp_path / "b", "--json")
        answer = json.loads(result.stdout)
        assert (result.exit_code == 0) == answer["identical"] == (not answer["changes"])
        assert command("diff", tmp_path / "a", tmp_path / "b").exit_code == result.exit_code
        keys = ("what", "kind", "name", "a", "b")
        return [tuple(change[key] for key in keys) for change in answer["changes"]]

    return between


def test_the_same_state_saved_in_another_way_is_identical(command: Command, tmp_path: Path) -> None:
    distckpt.save(tmp_path / "a", state(), step=1, rng=False, layout="full", metrics={"loss": 1.0})
    distckpt.save(tmp_path / "b", state(), step=1, rng=False, layout="sharded", config={"seed": 1})
    result = command("diff", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 0
    assert "the same  step 1, 4 keys, 3 tensors" in result.stdout
    assert "not state" in result.stdout
    for name in ("layout", "metrics.loss", "config.seed", "attempt"):
        assert name in result.stdout
    answer = json.loads(command("diff", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert answer.keys() == {"a", "b", "identical", "changes", "apart"}
    assert answer["apart"]["layout"] == {"a": "full", "b": "sharded"}


def save_on_two_ranks(directory: Path) -> None:
    """Save one state as "full" and "sharded", and as "other" with another position on rank 1."""
    rank = torch.distributed.get_rank()
    for name, layout, position in (("full", "full", rank), ("sharded", "sharded", rank), ("other", "full", 2 * rank)):
        torch.manual_seed(rank)
        own = PerRank({"position": position, "noise": torch.rand(3)})
        whole = {"big": torch.arange(300_000.0).reshape(3000, 100), "small": torch.ones(3), "epoch": 2}
        distckpt.save(directory / name, {**whole, "own": own}, layout=layout)  # type: ignore[arg-type]


def test_full_and_sharded_by_two_ranks_are_identical(command: Command, ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(save_on_two_ranks, tmp_path)
    assert len(list((tmp_path / "sharded").glob("*/*.safetensors"))) == 2
    assert command("diff", tmp_path / "full", tmp_path / "sharded").exit_code == 0
    answer = json.loads(command("diff", tmp_path / "sharded", tmp_path / "other", "--json").stdout)
    (change,) = answer["changes"]
    assert (change["name"], change["a"], change["b"]) == ("rank-00001:own.position", 1, 2)


def test_runs_are_compared_by_their_newest_checkpoints(command: Command, run: Path) -> None:
    assert command("diff", run, run / "step-000000000030").exit_code == 0
    (run / "step-000000000030" / "manifest.json").unlink()
    assert command("diff", run, run / "step-000000000020").exit_code == 0
    result = command("diff", run / "step-000000000010", run)
    assert result.exit_code == 1
    for words in ("step", "epoch", "optimizer.state.0.exp_avg", "model.0.weight", "different  the step, 1 value"):
        assert words in result.stdout


Changes = Callable[..., list[tuple[Any, ...]]]


def test_nan_equals_nan(changes: Changes) -> None:
    assert changes(state(), state()) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *[(1, 1.0), (1, True), (0.0, -0.0), (None, False), ("1", 1), ([1], (1,)), ({}, [])],
        *[(np.float32(1), 1.0), (b"a", "a")],
    ],
)
def test_values_of_other_types_differ(changes: Changes, before: Any, after: Any) -> None:
    ((what, kind, name, *_),) = changes(state(epoch=before), state(epoch=after))
    assert (what, kind, name) == ("value", "changed", "epoch")


def test_a_changed_value_is_named_with_both_values(changes: Changes) -> None:
    other = state()["nested"]
    other["of"]["two"][0] = 2.0
    other["more"] = [1, 2]
    assert changes(state(), state(nested=other, epoch=...)) == [
        ("key", "removed", "epoch", {"kind": "value", "per_rank": False, "trees": 1}, None),
        ("value", "changed", "nested.of.two.0", 1.0, 2.0),
        ("value", "added", "nested.more", None, [1, 2]),
    ]


def test_another_order_of_keys_is_a_difference(changes: Changes) -> None:
    first, second = OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)
    assert changes({"x": first}, {"x": second}) == [("order", "changed", "x", ["a", "b"], ["b", "a"])]


def test_a_tensor_that_became_an_array_is_a_difference(changes: Changes) -> None:
    found = changes({"x": torch.ones(2)}, {"x": np.ones(2, np.float32)})
    assert found == [("value", "changed", "x", {"$tensor": "x"}, {"$array": "x"})]


def test_a_key_marked_by_rank_is_a_difference(changes: Changes) -> None:
    ((what, kind, name, _, after),) = changes({"x": 1}, {"x": PerRank(1)})
    assert (what, kind, name, after["per_rank"]) == ("key", "changed", "x", True)


def test_added_removed_and_reshaped_tensors_are_named_once(changes: Changes) -> None:
    first = {"d": {"a": torch.ones(2), "b": torch.ones(2, 3), "c": torch.ones(1)}}
    second = {"d": {"b": torch.ones(3, 2), "c": torch.ones(1, dtype=torch.int8), "e": torch.ones(4)}}
    assert [(what, kind, name) for what, kind, name, *_ in changes(first, second)] == [
        ("tensor", "removed", "d.a"),
        ("tensor", "changed", "d.b"),
        ("tensor", "changed", "d.c"),
        ("tensor", "added", "d.e"),
    ]


def test_changed_elements_are_counted_and_measured(command: Command, tmp_path: Path) -> None:
    weight = torch.arange(20.0).reshape(4, 5)
    weight[1, 0], weight[3, 4], weight[0, 0] = 4.5, math.nan, -0.0
    distckpt.save(tmp_path / "a", state(), rng=False)
    distckpt.save(tmp_path / "b", state(weight=weight), rng=False)
    result = command("diff", tmp_path / "a", tmp_path / "b", "--json")
    (change,) = json.loads(result.stdout)["changes"]
    figures = {name: change[name] for name in ("elements", "different", "nan", "max_absolute", "max_relative")}
    assert figures == {"elements": 20, "different": 3, "nan": 1, "max_absolute": 0.5, "max_relative": 0.1}
    text = command("diff", tmp_path / "a", tmp_path / "b").stdout
    assert "3 of 20 by up to 0.5 (relative 0.1), 1 NaN on one side" in text


def test_the_step_is_state(command: Command, tmp_path: Path) -> None:
    for step in (1, 2):
        distckpt.save(tmp_path / str(step), state(), step=step, rng=False)
    (change,) = json.loads(command("diff", tmp_path / "1", tmp_path / "2", "--json").stdout)["changes"]
    assert (change["what"], change["a"], change["b"]) == ("step", 1, 2)


def test_tensors_under_equal_digests_are_not_read(tmp_path: Path) -> None:
    """Two saves of a state of which one large tensor has changed: little else is read."""
    large = {f"weight{number}": torch.randn(3 << 20) for number in range(4)}
    sources = []
    for name in ("a", "b"):
        large["weight2"][-1] += name == "b"
        distckpt.save(tmp_path / name, large, step=1, rng=False)
        storage = CountingStorage(open_storage(tmp_path / name))
        folder, manifest = catalog.locate(storage)
        sources.append((storage, Source(storage=storage, folder=folder, manifest=manifest)))
    before = [storage.counted("read").num_bytes for storage, _ in sources]
    (change,) = compare(sources[0][1], sources[1][1])
    assert (change.name, change.deviation and change.deviation.num_different) == ("weight2", 1)
    for (storage, _), earlier in zip(sources, before, strict=True):
        assert large["weight2"].nbytes <= storage.counted("read").num_bytes - earlier <= 2 * large["weight2"].nbytes
    whole = Source(storage=sources[0][0], folder="", manifest=sources[0][1].manifest)
    before = sources[0][0].counted("read")
    assert not list(compare(sources[0][1], whole))
    assert sources[0][0].counted("read") == before


def test_damage_is_an_error_of_its_own(command: Command, run: Path) -> None:
    (file,) = (run / "step-000000000020").glob("*/*")
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    result = command("diff", run / "step-000000000020", run / "step-000000000030")
    assert (result.exit_code, result.stdout) == (5, "")
    assert f"{file.name}' has wrong bytes" in result.stderr

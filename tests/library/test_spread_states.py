"""States that are cut over meshes: saved in runs, and whole again on any number of ranks and for every tool."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spread_jobs
import torch
import torch.distributed.checkpoint as dcp
from rank_pool import RankPools
from spread_jobs import CUTS
from typer.testing import CliRunner

import distckpt
from distckpt import catalog, verification
from distckpt.arrays import Source
from distckpt.cli.application import application
from distckpt.comparison import compare
from distckpt.exchange import intake
from distckpt.exchange.export import Format, export
from distckpt.shards import ShardReader
from distckpt.storage import open_storage

WORLD_SIZE = 4
FOLDER = "step-000000000005"
NOT_IN_RUNS = {"another order", "backwards"}


@pytest.fixture(scope="module")
def saved(session_ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuts") / "one"
    session_ranks(WORLD_SIZE).run(spread_jobs.save_cuts, str(path), list(CUTS), True)
    return path


def told(*arguments: object) -> str:
    """Run `distckpt`, and return what it says."""
    result = CliRunner().invoke(application, [str(argument) for argument in arguments], prog_name="distckpt")
    assert result.exit_code == 0, result.output
    return result.output


def source_at(path: Path) -> Source:
    storage = open_storage(path)
    folder, manifest = catalog.locate(storage)
    return Source(storage=storage, folder=folder, manifest=manifest)


def test_what_meshes_cut_is_saved_in_runs(saved: Path):
    found = spread_jobs.pieces_found(str(saved))
    assert found["format"] == 2
    told = {name: found["told"][f"cut.{name}"] for name in CUTS}
    meant = {name: found["meant"][f"cut.{name}"] for name in CUTS}
    assert meant == {
        **{"even": 4, "uneven": 4, "fewer rows than ranks": 3, "one row": 1, "columns": 3, "many": 4},
        **{"replicas of rows": 2, "rows of replicas": 2, "a grid": 4, "a turned grid": 4, "rows of rows": 4},
        **{"even rows of rows": 4, "another order": 4, "backwards": 4, "by columns of ranks": 4},
    }
    assert all(told[name] == meant[name] for name in NOT_IN_RUNS)
    assert {name for name in CUTS if told[name] == 1} >= {"even", "many", "even rows of rows", "a turned grid"}


@pytest.mark.parametrize("loading", [1, 3, 4])
def test_what_was_saved_in_runs_comes_back_bit_for_bit(ranks: RankPools, saved: Path, loading: int):
    assert ranks(loading).run(spread_jobs.load_cuts, str(saved), list(CUTS)) == [[]] * loading


def test_ranks_without_anything_to_write_leave_no_hole(ranks: RankPools, tmp_path: Path):
    names = ["fewer rows than ranks", "one row"]
    ranks(WORLD_SIZE).run(spread_jobs.save_cuts, str(tmp_path / "one"), names, False)
    assert ranks(2).run(spread_jobs.load_cuts, str(tmp_path / "one"), names) == [[]] * 2


def test_the_pages_reader_reads_runs(saved: Path):
    page = (Path(distckpt.__file__).parent / "FORMAT.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, "FORMAT.md", "exec"), namespace)
    _, states = namespace["read"](saved)
    for name in CUTS:
        bits = spread_jobs.whole(name).contiguous().view(torch.uint8).numpy()
        for state in states:
            assert np.array_equal(state["cut"][name].view("u1"), bits), name


def test_every_tool_takes_runs(saved: Path, tmp_path: Path):
    source = source_at(saved)
    assert list(verification.verify(source.storage, source.manifest, folder=source.folder)) == []
    told("verify", saved)
    assert '"cut.uneven"' in told("show", saved, "--json")
    told("cp", saved, tmp_path / "copy")
    assert (tmp_path / "copy" / FOLDER / "manifest.json").read_bytes() == (saved / "manifest.json").read_bytes()
    told("diff", saved, tmp_path / "copy")
    targets: dict[str, Format] = {"file.safetensors": "safetensors", "f.pt": "torch", "dcp": "dcp"}
    for name, form in targets.items():
        export(source, str(tmp_path / name), form=form)
        storage = open_storage(tmp_path / f"from-{name}")
        folder, _ = intake.commit(intake.read(str(tmp_path / name)), storage)
        again = source_at(tmp_path / f"from-{name}" / folder)
        assert list(compare(source, again)) == list(compare(again, source)) == []


def test_dcp_reads_runs(saved: Path):
    state = {"cut": {name: torch.zeros_like(spread_jobs.whole(name)) for name in CUTS}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP's remark that there is no process group here
        dcp.load(state, storage_reader=ShardReader(saved), no_dist=True)
    for name in CUTS:
        assert torch.equal(state["cut"][name], spread_jobs.whole(name)), name


def test_damage_in_any_file_of_a_run_is_found(saved: Path, tmp_path: Path):
    told("cp", saved, tmp_path / "copy")
    for number in range(WORLD_SIZE):
        [file] = (tmp_path / "copy" / FOLDER).glob(f"*/rank-{number:05d}.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        source = source_at(tmp_path / "copy")
        found = verification.verify(source.storage, source.manifest, folder=source.folder)
        assert [problem.file for problem in found] == [f"{file.parent.name}/{file.name}"]
        data[-1] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize("odd_ranks", [[0], [2], [0, 1, 2, 3]])
def test_ranks_that_cannot_tell_what_others_write_say_what_they_write(
    ranks: RankPools, tmp_path: Path, odd_ranks: list[int]
):
    ranks(WORLD_SIZE).run(spread_jobs.save_partly_odd, str(tmp_path / "one"), "uneven", odd_ranks)
    found = spread_jobs.pieces_found(str(tmp_path / "one"))
    everywhere = len(odd_ranks) == WORLD_SIZE
    assert found["told"]["cut.uneven"] == found["meant"]["cut.uneven"] == WORLD_SIZE
    assert (found["format"], found["told"]["cut.even"]) == ((2, 1) if everywhere else (1, WORLD_SIZE))
    state = {"cut": {name: torch.zeros_like(spread_jobs.whole(name)) for name in ("uneven", "even")}}
    distckpt.load(tmp_path / "one", state)
    assert all(torch.equal(tensor, spread_jobs.whole(name)) for name, tensor in state["cut"].items())


@pytest.mark.parametrize("odd_ranks", [[], [1]])
def test_later_saves_of_a_run_are_whole_too(ranks: RankPools, tmp_path: Path, odd_ranks: list[int]):
    names = ["many", "uneven", "replicas of rows", "a grid"]
    ranks(WORLD_SIZE).run(spread_jobs.save_thrice, str(tmp_path), names, odd_ranks)
    for step, more in ((1, 0), (2, 1), (3, 1)):
        state = {"cut": {name: torch.zeros_like(spread_jobs.whole(name)) for name in [*names, *["even"][: step // 3]]}}
        distckpt.load(tmp_path / f"step-{step:012d}", state)
        for name, tensor in state["cut"].items():
            assert torch.equal(tensor, spread_jobs.whole(name) + (0 if name == "even" else more)), (step, name)
        assert spread_jobs.pieces_found(str(tmp_path), step=step)["format"] == (1 if odd_ranks else 2)


@pytest.mark.parametrize(
    ("kind", "loading"),
    [
        ("tp in part", 4),
        ("tp in part", 2),
        ("fsdp", 2),
        ("fsdp", 3),
        ("hsdp", 2),
        pytest.param("tp", 2, marks=pytest.mark.slow),
        ("tp", 4),
    ],
)
def test_an_fsdp2_model_is_saved_in_runs_and_comes_back_on_other_ranks(
    ranks: RankPools, tmp_path: Path, kind: str, loading: int
):
    saved = ranks(WORLD_SIZE).run(spread_jobs.save_net, str(tmp_path / "one"), kind)
    found = spread_jobs.pieces_found(str(tmp_path / "one"))
    assert found["format"] == 2
    assert [found["told"][f"model.{name}"] for name in ("up.weight", "up.bias")] == [1] * 2
    assert found["meant"]["model.up.weight"] == (2 if kind == "hsdp" else 4)
    again = kind if loading == WORLD_SIZE else "fsdp"
    assert ranks(loading).run(spread_jobs.load_net, str(tmp_path / "one"), again) == [saved[0]] * loading
    model = spread_jobs.Net()
    distckpt.load_weights(tmp_path / "one", model)
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == saved[0]["model"]

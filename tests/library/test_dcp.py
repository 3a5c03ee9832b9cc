"""DTensors, FSDP2, and DCP's own entry points with our writer, reader and planners."""

from __future__ import annotations

import itertools
from pathlib import Path

import dcp_jobs
import pytest
from rank_pool import RankPools

KINDS = ["rows", "columns", "replicated"]
FULL = [[float(6 * row + column) for column in range(6)] for row in range(7)]


@pytest.mark.parametrize(("kind", "layout"), [*itertools.product(KINDS, ["sharded", "full"])])
def test_a_dtensor_comes_back_on_another_mesh_and_placement(ranks: RankPools, tmp_path: Path, kind: str, layout: str):
    ranks(3).run(dcp_jobs.save_dtensor, str(tmp_path / "one"), kind, layout)
    for num_ranks, placement in itertools.product([1, 2, 3], KINDS):
        for found in ranks(num_ranks).run(dcp_jobs.load_dtensor, str(tmp_path / "one"), placement):
            assert found == [FULL, FULL]


def test_replicas_of_a_dtensors_shards_are_stored_once(ranks: RankPools, tmp_path: Path):
    assert ranks(4).run(dcp_jobs.hsdp_blocks, str(tmp_path / "one")) == [42 * 4] * 4


@pytest.mark.parametrize("loading", [1, 2, 3])
def test_an_fsdp2_model_and_its_optimizer_reshard(ranks: RankPools, tmp_path: Path, loading: int):
    saved = ranks(2).run(dcp_jobs.save_fsdp, str(tmp_path / "one"))
    assert ranks(loading).run(dcp_jobs.load_fsdp, str(tmp_path / "one")) == [saved[0]] * loading


@pytest.mark.parametrize(("saver", "loader"), [*itertools.product([True, False], [True, False])])
def test_dcp_save_and_load_take_our_writer_and_reader(ranks: RankPools, tmp_path: Path, saver: bool, loader: bool):
    saved = ranks(2).run(dcp_jobs.dcp_save, str(tmp_path / "step-000000000012"), saver)
    assert ranks(3).run(dcp_jobs.dcp_load, str(tmp_path / "step-000000000012"), loader) == [saved[0]] * 3
    assert ranks(2).run(dcp_jobs.load_with_distckpt, str(tmp_path)) == saved


def test_dcp_load_reads_what_distckpt_saved(ranks: RankPools, tmp_path: Path):
    found = ranks(2).run(dcp_jobs.dcp_load_what_distckpt_saved, str(tmp_path / "one"))
    assert found[0]["sharded"] == FULL
    assert found[0]["epoch"] == 3
    assert found[0]["groups"] == [{"lr": 0.5, "betas": (0.9, 0.99)}]


def test_dcp_save_never_replaces_a_checkpoint(ranks: RankPools, tmp_path: Path):
    for error in ranks(2).run(dcp_jobs.dcp_overwrites, str(tmp_path / "one")):
        assert "CheckpointExistsError" in error


def test_our_planner_refuses_to_cast(ranks: RankPools, tmp_path: Path):
    for error in ranks(2).run(dcp_jobs.dcp_loads_another_dtype, str(tmp_path / "one")):
        assert "model.weight: the checkpoint holds (3, 4) torch.float32, the state (3, 4) torch.float64" in error

"""The simulation of many ranks says what many ranks would: it uses their code, and makes a checkpoint of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from benchmarks import scale
from benchmarks.simulation import Facts, Kind, restored, simulate
from distckpt.plan import MANY_WRITERS


def both(kind, num_tensors: int, world_size: int, directory: Path) -> list[Facts]:
    return simulate(kind, num_tensors, world_size, directory / f"{kind}-{num_tensors}-{world_size}")


KINDS = get_args(Kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_save_sends_as_much_however_many_tensors_and_ranks_there_are(kind, tmp_path):
    (_, small), (_, large) = both(kind, 20, 4, tmp_path), both(kind, 200, 128, tmp_path)
    assert abs(large.sent - small.sent) <= 32  # digits of longer numbers
    per_rank = small.received / 3
    assert large.received <= 127 * (per_rank + 32)


@pytest.mark.parametrize("kind", KINDS)
def test_what_rank_0_gets_and_publishes_does_not_grow_with_ranks_times_tensors(kind, tmp_path):
    def grown(world_size: int) -> tuple[int, int]:
        few, many = both(kind, 100, world_size, tmp_path)[0], both(kind, 300, world_size, tmp_path)[0]
        return many.received - few.received, many.manifest_bytes - few.manifest_bytes

    small, large = grown(4), grown(256)
    assert large[0] <= 1.5 * small[0] + 64 * 256
    assert large[1] <= 1.5 * small[1] + 64 * 256


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_writes_one_file_and_asks_the_storage_for_nothing_else(kind, tmp_path):
    for facts in both(kind, 20, 8, tmp_path):
        assert facts.requests["one rank"] == ({} if kind == "full" else {"put": 1, "sync": 1})
        assert facts.requests["rank 0"] == {"put": 1, "sync": 1, "publish": 1}


def test_a_restore_of_a_small_state_reads_the_files_of_few_ranks(tmp_path):
    simulate("replicated", 20, 4 * MANY_WRITERS, tmp_path)
    assert restored("replicated", 20, 4 * MANY_WRITERS, tmp_path).files <= MANY_WRITERS + 1


@pytest.mark.parametrize("kind", ["sharded", "fsdp x tp"])
def test_a_restore_of_a_sharded_state_reads_only_its_own_file(kind, tmp_path):
    simulate(kind, 20, 64, tmp_path)
    assert restored(kind, 20, 64, tmp_path).files == 1


@pytest.mark.parametrize("kind", ["sharded", "hsdp", "fsdp x tp"])
def test_what_says_where_tensors_lie_does_not_grow_with_the_ranks(kind, tmp_path):
    (first, few), (_, many) = both(kind, 50, 16, tmp_path), both(kind, 50, 1024, tmp_path)
    own = 6 * 1008 * 150  # of each rank's generators
    assert many.tensor_table_bytes - few.tensor_table_bytes < own + 50 * 40
    assert first.sent < 4000


def test_the_table_has_a_row_for_each_case(tmp_path, capsys):
    scale.main(["--ranks", "2", "8", "--tensors", "10", "--results", str(tmp_path)])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in rows[1:]] == [
        [*kind.split(), "10", ranks][:3] for kind in KINDS for ranks in ("2", "8")
    ]
    (line,) = [json.loads(text) for text in (tmp_path / "scale.jsonl").read_text().splitlines()]
    assert len(line["cases"]) == 2 * len(KINDS)
    assert {case["ranks"] for case in line["cases"] if "dcp" in case} == {2, 8}

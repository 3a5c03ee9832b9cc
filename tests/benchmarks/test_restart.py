"""The restart benchmark starts real processes, which restore and say what took how long; no number is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import restart
from benchmarks.disk import forget
from benchmarks.restarted import STORED
from distckpt import sharedmemory
from distckpt.memorytier import MemoryTier

MODEL = "shufflenet_v2_x0_5"


def test_the_parts_of_a_restart_are_all_of_it(tmp_path: Path) -> None:
    assert restart.save(tmp_path / "run", MODEL) > 1 << 20
    forget(tmp_path / "run")
    seconds = restart.start("ahead", tmp_path / "run", MODEL)
    parts = {"start Python", "import torch", "build the model", "import distckpt", "rendezvous", "find", "match"}
    parts |= {"read and verify", "apply", "other", "first batch", "first step"}
    assert seconds.keys() == parts | {"total", STORED}
    assert seconds[STORED] > 1 << 20
    assert sum(seconds[part] for part in parts) == pytest.approx(seconds["total"])


@pytest.mark.skipif(sharedmemory.place() is None, reason="no shared memory")
def test_with_a_memory_tier_no_data_comes_from_the_storage(tmp_path: Path) -> None:
    restart.save(tmp_path / "run", MODEL)
    restart.keep_in_memory(tmp_path / "run")
    assert restart.start("memory", tmp_path / "run", MODEL)[STORED] == 0
    MemoryTier(str(tmp_path / "run")).leave(in_good_order=True)


def test_a_process_that_finds_no_checkpoint_is_not_counted(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="there is no checkpoint"):
        restart.start("plain", tmp_path, MODEL)


def test_the_table_compares_within_each_round_and_leaves_the_step_out_once() -> None:
    seen = {
        "build, cold": [{"import torch": each, "total": each} for each in (1.0, 2.0, 10.0)],
        "plain, cold": [
            {"import torch": each, "first step": each, "total": 2 * each, STORED: 3e6} for each in (1.0, 2.0, 10.0)
        ],
    }
    titles, build, plain = restart.table(seen)
    assert titles == ["", "import torch", "first step", "total", "x build", "without the step", "MB from the storage"]
    assert build == ["build, cold", "2.000", "", "2.000", "1.00", "1.00", ""]
    assert plain == ["plain, cold", "2.000", "2.000", "4.000", "2.00", "1.00", "3.0"]

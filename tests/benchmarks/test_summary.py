from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.summary import behind, failures, main, markdown, newest, rows

MACHINE = {"num_cores": 2, "processor": "a processor", "memory_gb": 25.0, "gpu": None}


def verdict(**others: Any) -> dict[str, Any]:
    body = {
        "contender": "distckpt",
        "figure": "save / raw write",
        "value": 1.1,
        "ratio": 1.1,
        "target": 1.2,
        "aim": 1.05,
    }
    return {**body, "best_peer": "peer", "against_peer": 0.5, "word": "reached", **others}


def line(time: str = "1", **others: Any) -> dict[str, Any]:
    facts = {"benchmark": "local_save", "state": "vgg16", "bytes": 1.1e9, "ranks": 1, "size": "moderate"}
    made_on = {"machine": MACHINE, "versions": {"torch": "2.15", "python": "3.11"}, "commit": "abc"}
    return {"time": time, **facts, **made_on, "too_noisy": False, "targets": [verdict()], "failed": {}, **others}


def test_the_newest_run_of_each_kind_counts_unless_it_was_too_noisy() -> None:
    lines = [line("1"), line("2", ranks=2), line("3"), line("4", too_noisy=True), line("5", state="small")]
    assert [each["time"] for each in newest(lines)] == ["3", "2", "5"]


def test_a_kind_that_was_always_too_noisy_is_not_lost() -> None:
    assert [each["time"] for each in newest([line("1", too_noisy=True), line("2", too_noisy=True)])] == ["2"]


def test_a_line_that_does_not_name_a_device_was_measured_on_the_processor() -> None:
    lines = [line("1"), line("2", device="cpu", backend="gloo"), line("3", device="cuda")]
    assert [each["time"] for each in newest(lines)] == ["2", "3"]


def test_a_row_says_target_aim_and_what_was_seen() -> None:
    [row] = rows([line()])
    assert row == [
        "save / raw write",
        "vgg16, 1,100 MB, 1 rank",
        "distckpt",
        "1.2",
        "1.05",
        "**1.1**",
        "reached",
        "0.5 x peer",
    ]


def test_a_row_of_a_noisy_run_says_so() -> None:
    [row] = rows([line(targets=[verdict(ratio=None, value=None, against_peer=None)])])
    assert row[5:] == ["too noisy", "", ""]


def test_whoever_is_not_behind_distckpt_is_named() -> None:
    lines = [line(targets=[verdict(against_peer=0.9), verdict(against_peer=1.0), verdict(against_peer=3.0)])]
    assert [each.split(": ")[1] for each in behind(lines)] == [
        "distckpt is level with peer, 1 times its figure.",
        "distckpt is behind peer, 3 times its figure.",
    ]


def test_a_failure_is_told_once_with_its_error() -> None:
    failed = {"peer": "rank 0: OSError: no\nmore"}
    assert failures([line(failed=failed), line(failed=failed, ranks=2)]) == ["- local_save: peer: rank 0: OSError: no"]


def test_the_summary_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "local_save.jsonl").write_text(json.dumps(line()) + "\n")
    assert main(["--results", str(tmp_path), "--output", str(tmp_path / "summary.md")]) == 0
    assert (tmp_path / "summary.md").read_text() == markdown([line()])
    assert "Measured on 2 cores of a processor" in capsys.readouterr().out


def test_without_results_the_summary_says_how_to_get_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--results", str(tmp_path)]) == 1
    assert "make bench" in capsys.readouterr().err

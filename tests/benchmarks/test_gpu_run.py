"""The run on a GPU, as far as it needs none: its plan, its limits, its summary, and a part that is tried out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import gpu
from benchmarks.options import parse as parse_benchmark

ROOT = Path(__file__).parents[2]
PARTS = ["limits", "stall", "stall-4-gb", "save", "load", "nccl", "bytes", "tests"]


def planned(*arguments: str) -> dict[str, gpu.Part]:
    return {part.name: part for part in gpu.plan(gpu.parse(list(arguments)))}


def test_the_plan_has_every_part() -> None:
    assert list(planned()) == PARTS
    assert list(planned("--parts", "save", "limits")) == ["limits", "save"]


def test_a_part_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match=r"no part 'lod'; there are limits, stall"):
        planned("--parts", "lod")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_benchmark_of_the_plan_understands_its_arguments(device: str) -> None:
    for name, part in planned("--device", device).items():
        if name != "tests":
            _, module, *arguments = part.arguments
            assert (ROOT / f"{module.replace('.', '/')}.py").exists()
            given = parse_benchmark(arguments, about="", ranks=(1,))
            assert given.device == device
            assert given.backend == ("nccl" if (name, device) == ("nccl", "cuda") else "gloo")


def test_contenders_of_the_plan_are_contenders() -> None:
    from benchmarks.contenders.background import BACKGROUND_SAVERS, PREWARMED
    from benchmarks.contenders.synchronous import SAVERS

    known = {*BACKGROUND_SAVERS, *PREWARMED, *SAVERS}
    assert {*gpu.STALLS, *gpu.DCP, *gpu.SAVERS} <= known


def test_only_tests_that_are_marked_are_asked_for() -> None:
    modules = gpu.gpu_tests()
    assert modules
    assert all("mark.gpu" in (ROOT / module).read_text() for module in modules)


def test_rounds_end_long_before_a_part_is_cut_off() -> None:
    for part in planned().values():
        if "--max-seconds" in part.arguments:
            rounds_s = float(part.arguments[part.arguments.index("--max-seconds") + 1])
            num_runs = 2 if part.name == "load" else 1  # a warm cache and a cold one
            assert rounds_s * num_runs <= part.limit_s * 0.6 or part.name == "bytes"


def python_part(code: str, *, limit_s: float = 60.0) -> gpu.Part:
    return gpu.Part(name="part", arguments=("-c", code), limit_s=limit_s)


def test_a_part_that_fails_is_said_to_and_its_output_kept(tmp_path: Path) -> None:
    outcome = gpu.run(python_part("raise SystemExit('no room')"), log=tmp_path / "log", limit_s=60)
    assert outcome.word == "FAILED with status 1, see log"
    assert (tmp_path / "log").read_text() == "no room\n"


def test_a_part_that_hangs_is_cut_off_with_all_that_it_has_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); child.wait()"
    )
    outcome = gpu.run(python_part(code), log=tmp_path / "log", limit_s=3)
    assert outcome.word == "CUT OFF after 3 s, see log"
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def line(**others: Any) -> dict[str, Any]:
    figures = [{"contender": "device to pinned", "measure": "gb_per_s", "median": 55.0, "low": 54.0, "high": 55.5}]
    machine = {"num_cores": 16, "processor": "a processor", "memory_gb": 128.0, "gpu": "a GPU"}
    return {
        **{"benchmark": "gpu_limits", "about": "GB/s", "bytes": 2**30, "device": "cuda", "verdict": "5 of 5 rounds"},
        **{"figures": figures, "not_run": {"peer": "not asked for", "other": "ImportError"}, "targets": []},
        **{"machine": machine, "versions": {"torch": "2.11", "python": "3.12"}, "commit": "abc", **others},
    }


def test_the_summary_has_every_median_and_what_became_of_each_part() -> None:
    text = gpu.summary([line()], [gpu.Outcome(part="save", word="CUT OFF after 50 s", seconds=50.2)])
    assert "| device to pinned | gb_per_s | 55 | 54 | 55.5 |" in text
    assert "16 cores of a processor, 128.0 GB, a GPU, torch 2.11" in text
    assert "- not run: other: ImportError" in text
    assert "not asked for" not in text
    assert "- save: CUT OFF after 50 s, 50 s" in text


def script(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHON": sys.executable, "VENV": str(tmp_path / "venv"), **environment}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=given)


def test_the_script_runs_a_part_without_a_gpu_and_writes_the_summary(tmp_path: Path) -> None:
    places = ["--directory", str(tmp_path / "disk"), "--results", str(tmp_path / "results")]
    done = script(tmp_path, "--device", "cpu", "--size", "tiny", "--parts", "limits", *places)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "results" / "summary.md").read_text()
    assert "- limits: done" in text
    assert "| disk, write direct | gb_per_s |" in text


def test_the_script_says_what_it_cannot_run_without(tmp_path: Path) -> None:
    bare = tmp_path / "python"  # without site-packages nothing is there
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    done = script(tmp_path, PYTHON=str(bare), WHEELS="")
    assert done.returncode == 2
    assert "gpu.sh: cannot run without: torch torchvision numpy" in done.stderr
    assert "Fix: on a machine with network: pip download" in done.stderr

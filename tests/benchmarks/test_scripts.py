"""Every benchmark runs to its end with states that are tiny, and says what it should; no number is looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import BENCHMARKS

ROOT = Path(__file__).parents[2]

SCRIPTS = {
    "planning": [],
    "digests": ["--states", "small"],
    "local_save": ["--states", "resnet50", "--ranks", "2"],
    "async_stall": ["--states", "vgg16"],
    "load": ["--states", "resnet50"],
    "small_tensors": [],
    "ddp_bytes": ["--states", "resnet50", "--ranks", "2"],
}
# The peers that come with what the tests need anyway.
PEERS = ["--only", "distckpt", "torch.save", "safetensors", "DCP", "DCP async", "raw copy and direct write"]


def run(name: str, directory: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """Run a benchmark; return what it printed, and its JSON lines."""
    results = directory / "results"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--size", "tiny", "--rounds", "1", *PEERS]
    command += ["--directory", str(directory / "disk"), "--results", str(results), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]


def test_every_script_is_run_here_and_by_the_command_that_runs_all() -> None:
    scripts = {file.stem for file in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in file.read_text()}
    assert scripts - {"__main__", "plots"} == set(SCRIPTS) == set(BENCHMARKS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_opens_with_the_command_that_runs_it(name: str) -> None:
    assert f"    python -m benchmarks.{name}\n" in (ROOT / "benchmarks" / f"{name}.py").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_measures_and_reports(name: str, tmp_path: Path) -> None:
    printed, lines = run(name, tmp_path, *SCRIPTS[name])
    assert lines
    for line in lines:
        assert line["failed"] == {}
        assert not line["too_noisy"]
        assert [figure for figure in line["figures"] if figure["contender"].startswith(("distckpt", "digests on"))]
        assert line["about"] in printed
    assert not list((tmp_path / "disk").iterdir())

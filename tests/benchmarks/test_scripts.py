"""Every benchmark runs to its end with states that are tiny, and says what it should; no number is looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import AFTERWARDS, BENCHMARKS

ROOT = Path(__file__).parents[2]

SCRIPTS = {
    "planning": [],
    "digests": ["--states", "small"],
    "local_save": ["--states", "vgg16"],
    "async_stall": ["--states", "gpt2-medium"],
    "load": ["--states", "gpt2-medium"],
    "small_tensors": [],
    "ddp_bytes": ["--states", "gpt2-medium", "small"],
    "collectives": [],
    "gpu_limits": [],
}
OWN_TESTS = {"s3", "slow_link", "scale", "restart", "restarted"}  # others than this, as their arguments or servers are
# The peers that come with what the tests need anyway.
PEERS = ["--only", "distckpt", "distckpt, prewarmed", "torch.save", "safetensors", "DCP", "DCP async"]
PEERS += ["torch.save of a clone, on a thread", "raw copy and direct write"]
# Starting Python with torch takes longer than any of them: so all run in one process, one after another.
ALL_IN_ONE = """
import contextlib, importlib, json, pathlib, sys, traceback
for name, arguments in json.loads(sys.argv[1]).items():
    with pathlib.Path(sys.argv[2], name + ".out").open("w") as out, contextlib.redirect_stdout(out):
        try:
            importlib.import_module("benchmarks." + name).main(arguments)
        except Exception:
            traceback.print_exc(file=out)
"""


def arguments(directory: Path) -> list[str]:
    tiny = ["--size", "tiny", "--rounds", "1", *PEERS]
    return [*tiny, "--directory", str(directory / "disk"), "--results", str(directory / "results")]


def python(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


def lines(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "results" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every script on one rank; give the folder with what each printed, and its results."""
    made = tmp_path_factory.mktemp("scripts")
    commands = {name: [*arguments(made), "--ranks", "1", *own] for name, own in SCRIPTS.items()}
    done = python("-c", ALL_IN_ONE, json.dumps(commands), str(made))
    assert done.returncode == 0, done.stderr
    return made


def test_every_script_is_run_here_and_by_the_command_that_runs_all() -> None:
    files = (ROOT / "benchmarks").glob("*.py")
    scripts = {file.stem for file in files if '__name__ == "__main__"' in file.read_text()} - OWN_TESTS
    assert scripts - {"__main__", "gpu", *AFTERWARDS} == set(SCRIPTS)
    assert set(SCRIPTS) - {"gpu_limits"} == set(BENCHMARKS) - OWN_TESTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_opens_with_the_command_that_runs_it(name: str) -> None:
    assert f"    python -m benchmarks.{name}" in (ROOT / "benchmarks" / f"{name}.py").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_measures_and_reports(name: str, directory: Path) -> None:
    printed = (directory / f"{name}.out").read_text()
    assert (directory / "results" / f"{name}.jsonl").exists(), printed
    for line in lines(directory, name):
        assert line["failed"] == {}
        assert not line["too_noisy"]
        contenders = {figure["contender"] for figure in line["figures"]}
        assert any(contender.startswith("distckpt") for contender in contenders) or name == "gpu_limits"
        # Whether the peers lose more time than there is noise, nobody knows with states as small as these.
        judged = [verdict for verdict in line["targets"] if "lost" not in verdict["figure"]]
        assert all(verdict["ratio"] is not None for verdict in judged)
        assert line["about"] in printed


@pytest.mark.parametrize(
    ("name", "figures"),
    {
        "local_save": {"synchronous save / best raw write"},
        "async_stall": {
            "training time lost per save / the best peer's",
            "stall of a background save / memory copy",
            "stall of the first save / memory copy",
            "background save durable, training idle / best raw write",
        },
        "load": {"warm load / raw warm read", "cold load / raw cold read"},
        "digests": {"save, digests on / off", "warm load, digests on / off"},
        "ddp_bytes": {
            "bytes staged per rank of 1 / state",
            "host memory beyond the model, per rank / (share + 64 MiB)",
            "bytes written per rank, largest / mean",
            "bytes read from the device by a restore / state",
        },
    }.items(),
)
def test_each_figure_that_has_a_target_is_judged(name: str, figures: set[str], directory: Path) -> None:
    assert figures <= {verdict["figure"] for line in lines(directory, name) for verdict in line["targets"]}


def test_nothing_is_left_on_the_disk(directory: Path) -> None:
    assert not list((directory / "disk").iterdir())


def test_a_script_starts_ranks_of_its_own(tmp_path: Path) -> None:
    done = python("-m", "benchmarks.collectives", *arguments(tmp_path), "--ranks", "2")
    assert done.returncode == 0, done.stderr
    [line] = lines(tmp_path, "collectives")
    assert (line["ranks"], line["failed"]) == (2, {})
    meetings = {f["contender"]: f["median"] for f in line["figures"] if f["measure"] == "later_meetings"}
    assert set(meetings.values()) - {0} != set(), "no meeting of the ranks was counted"

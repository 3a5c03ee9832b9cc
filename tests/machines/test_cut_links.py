"""Links that are cut, slow or lossy while a checkpoint is saved, committed or restored."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from elastic_job import ROOT, ElasticJob, distckpt
from machines import Room, why_not

JOB = Path(__file__).parent / "cut_link_job.py"
START_S = 240.0
END_S = 120.0  # far more than the timeout, far less than TCP takes to give a connection up

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}"),
    pytest.mark.timeout(600),
]


def start(room: Room, phase: str) -> list[subprocess.Popen[bytes]]:
    """Start the job's two ranks."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return [
        machine.start(
            [sys.executable, str(JOB), str(machine.number), "node-0:29600", str(room.folder), phase],
            log=room.folder / f"{machine.name}.txt",
            env=env,
            cwd=ROOT,
        )
        for machine in room.machines
    ]


def outcome(room: Room, number: int) -> dict[str, str]:
    text = (room.folder / f"node-{number}.txt").read_text()
    lines = [line for line in text.splitlines() if line.startswith("{")]
    assert lines, text
    found: dict[str, str] = json.loads(lines[-1])
    return found


def wait_for(room: Room, ranks: list[subprocess.Popen[bytes]], name: str) -> None:
    """Wait until both ranks have left their file."""
    deadline = time.monotonic() + START_S
    while not all((room.folder / f"{name}-{number}").exists() for number in range(2)):
        assert time.monotonic() < deadline, "it never came there"
        assert [rank.poll() for rank in ranks] == [None, None], outcome(room, 0)
        time.sleep(0.01)


@pytest.mark.parametrize(
    "phase", ["save", pytest.param("commit", marks=pytest.mark.slow), pytest.param("restore", marks=pytest.mark.slow)]
)
def test_a_link_that_is_cut_for_good_fails_both_ranks_soon_and_harms_no_checkpoint(tmp_path: Path, phase: str) -> None:
    with Room(tmp_path, num_machines=2) as room:
        ranks = start(room, phase)
        wait_for(room, ranks, "at")
        room.machines[1].link.is_cut = True
        (tmp_path / "cut").touch()
        codes = [rank.wait(END_S) for rank in ranks]
        assert codes == [0, 0]
        errors = [outcome(room, number)["error"] for number in range(2)]
    listed = json.loads(distckpt("ls", str(tmp_path / "run"), "--json").stdout)
    steps = [found["step"] for found in listed["checkpoints"] if found["state"] == "committed"]
    if phase == "commit" and not errors[0]:  # it was done before the link was cut
        assert steps == [1, 2]
    else:
        assert steps == [1]
        assert "did not arrive within 4 s" in errors[0]
        assert "rank 1" in errors[0]
        assert errors[1].startswith(("RankTimeoutError", "RankFailedError"))
    assert distckpt("verify", str(tmp_path / "run")).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_links_that_are_slow_lossy_and_cut_for_moments_change_nothing(tmp_path: Path) -> None:
    chance = random.Random(5)
    with Room(tmp_path / "calm", num_machines=2) as room, ElasticJob(room, epochs=6, num_machines="2") as calm:
        calm.start()
        calm.wait()
    with Room(tmp_path / "rough", num_machines=2, seed=5) as room:
        link = room.machines[1].link
        with ElasticJob(room, epochs=6, num_machines="2") as rough:
            rough.start()
            rough.wait_until_step(5)
            link.loss, link.delay_s, link.bytes_per_s = 0.02, 0.01, 5e6
            for at in range(10, 130, 12):
                rough.wait_until_step(at)
                link.is_cut = True
                time.sleep(chance.uniform(0.05, 0.5))  # how long a cut lasts is what is tried here
                link.is_cut = False
            rough.wait()
            rough.assert_every_sample_was_seen_once()
        assert room.switch.num_lost > 100
    diff = distckpt("diff", str(rough.run), str(calm.run))
    assert diff.returncode == 0, diff.stdout + diff.stderr

"""A disk that is full, at different points of a save: a clear error, nothing left behind, and nothing lost.

A sample runs every time; all trials by: python -m pytest -m slow tests/e2e/test_full_disk.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
NUM_TRIALS = 13 * 8  # points and kinds of jobs
FULL = r"would write [\d,]+ bytes there, [\d,]+ are free|No space left on device.*: [\d,]+ bytes are free"


def carried_out(folder: Path, first: int, step: int, *, timeout_s: float) -> list[dict[str, Any]]:
    """Carry out every `step`-th trial in a mount namespace of its own; skip, visibly, where there can be none."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    rights = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *rights, "--mount", "--propagation", "private", sys.executable, "full_disk_trials.py"]
    places = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE)))
    done = subprocess.run(
        [*command, str(folder), str(first), str(NUM_TRIALS), str(step)],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if not done.stdout:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[1:]]


def judge(found: dict[str, Any]) -> str:
    """Check what came of a trial; return the kind of error that its ranks were told."""
    trial = found["trial"]
    assert not found["hung"], found
    assert set(found["codes"]) == {0}, found
    errors = []
    for said in found["told"].values():
        told = {line["event"]: line for line in said}
        assert told.keys() == {"failed", "left", "older", "again"}, found
        text = told["failed"]["text"]
        assert re.search(FULL.replace(": [", "[^:]*; ["), text), text
        assert f"{trial['disk']}/run" in text
        assert "\nFix: free " in text
        assert f"df -h {trial['disk']}" in text, "it names the file system"
        assert told["left"]["names"] == [], found
        assert told["older"]["good"], found
        assert (told["again"]["step"], told["again"]["good"]) == (3, True), found
        errors.append(told["failed"]["error"])
        if told["failed"]["error"] == "RankFailedError":
            assert re.search(r"abandoned: rank \d \(host ", text), text
    assert len(set(errors)) == 1, found
    if trial["when"] == "before":
        assert errors[0] == "StorageFullError", found
    return str(errors[0])


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    found = Counter(judge(one) for one in carried_out(tmp_path, 1, 19, timeout_s=280))
    assert found.total() == 6
    assert found["StorageFullError"]
    assert found["StorageError"] or found["RankFailedError"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_full_disk_is_told_and_leaves_nothing_at_every_point(tmp_path: Path) -> None:
    found = Counter(judge(one) for one in carried_out(tmp_path, 0, 1, timeout_s=3500))
    print(f"{found.total()} trials; the ranks raised {dict(found)}")
    assert found.total() == NUM_TRIALS

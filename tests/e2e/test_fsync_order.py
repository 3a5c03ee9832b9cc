"""What a save has acknowledged lies on the disk: seen by strace, call by call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from syscalls import STRACE, Audit, audit
from training_job import ROOT

SAVES = """
    import sys
    from pathlib import Path

    import torch
    from torch import nn

    import distckpt

    directory, acknowledged, background = sys.argv[1:]
    model = nn.Sequential(nn.Linear(700, 700), nn.Linear(700, 3))
    with distckpt.CheckpointManager(directory, background=background == "background") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"model": model, "step": step})
            checkpoints.wait()
            Path(acknowledged, f"acknowledged-{step}").touch()
"""


def audited(tmp_path: Path, way: str, *, before: str = "") -> Audit:
    """Save twice under strace, and return what its log shows."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace (apt install strace)")
    script, log, disk = tmp_path / "script.py", tmp_path / "strace.log", tmp_path / "disk"
    disk.mkdir()
    script.write_text(before + textwrap.dedent(SAVES))
    command = [*STRACE, "-o", str(log), sys.executable, str(script), str(disk / "runs" / "run"), str(tmp_path), way]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    if "PTRACE_TRACEME" in run.stderr or "Operation not permitted" in run.stderr:
        pytest.skip(f"strace may not trace here: {run.stderr.splitlines()[0]}")
    assert run.returncode == 0, run.stderr
    with log.open(errors="replace") as lines:
        return audit(lines, str(disk))


@pytest.mark.parametrize("way", ["background", "foreground"])
def test_all_is_synced_before_the_manifest_appears_and_when_a_save_is_acknowledged(tmp_path: Path, way: str) -> None:
    found = audited(tmp_path, way)
    assert found.problems == []
    assert (found.num_manifests, found.num_acknowledged) == (2, 2)
    assert sum(file.endswith(".safetensors") for file in found.files) == 2, "the data files were not seen"


def test_a_program_that_syncs_nothing_is_found_out(tmp_path: Path) -> None:
    found = audited(tmp_path, "foreground", before="import os\nos.fsync = os.fdatasync = lambda fd: None\n")
    told = "\n".join(found.problems)
    assert "rank-00000.safetensors was not synced after its last write" in told
    assert "was not synced after it got manifest.json" in told


# The auditor itself, on logs as strace writes them.

GOOD = """\
7 mkdir("/d/run", 0777) = 0
7 openat(AT_FDCWD</x>, "/d", O_RDONLY|O_DIRECTORY) = 3</d>
7 mkdirat(4</d/run>, "step-1", 0777) = 0
7 openat(5</d/run/step-1>, "data", O_WRONLY|O_CREAT|O_EXCL, 0666) = 6</d/run/step-1/data>
8 pwrite64(6</d/run/step-1/data>, ""..., 4096, 0 <unfinished ...>
7 write(1</dev/null>, ""..., 3) = 3
8 <... pwrite64 resumed>) = 4096
7 fsync(6</d/run/step-1/data>) = 0
7 fsync(5</d/run/step-1>) = 0
7 fsync(4</d/run>) = 0
7 fsync(3</d>) = 0
7 openat(5</d/run/step-1>, "m.0a.tmp", O_WRONLY|O_CREAT|O_EXCL, 0666) = 6</d/run/step-1/m.0a.tmp>
7 write(6</d/run/step-1/m.0a.tmp>, ""..., 30) = 30
7 fsync(6</d/run/step-1/m.0a.tmp>) = 0
7 linkat(5</d/run/step-1>, "m.0a.tmp", 5</d/run/step-1>, "manifest.json", 0) = 0
7 unlinkat(5</d/run/step-1>, "m.0a.tmp", 0) = 0
7 fsync(5</d/run/step-1>) = 0
7 openat(AT_FDCWD</x>, "/y/acknowledged-1", O_WRONLY|O_CREAT, 0666) = 6</y/acknowledged-1>
"""


def problems(log: str) -> list[str]:
    return audit(log.splitlines(), "/d").problems


def without(call: str, *, log: str = GOOD) -> str:
    assert log.count(call) > 0
    head, _, tail = log.partition(call)
    return head + tail


def test_a_log_in_which_all_is_synced_has_no_problems() -> None:
    found = audit(GOOD.splitlines(), "/d")
    assert found.problems == []
    assert (found.num_manifests, found.num_acknowledged) == (1, 1)
    assert found.files == ["/d/run/step-1/data", "/d/run/step-1/manifest.json"]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("7 fsync(6</d/run/step-1/data>) = 0\n", "step-1/data was not synced after its last write"),
        ("7 fsync(4</d/run>) = 0\n", "/d/run was not synced after it got step-1"),
        ("7 fsync(3</d>) = 0\n", "/d was not synced after it got run"),
        ("7 fsync(6</d/run/step-1/m.0a.tmp>) = 0\n", "manifest.json was not synced"),
    ],
)
def test_a_sync_that_is_missing_is_found(call: str, told: str) -> None:
    assert any(told in problem for problem in problems(without(call)))


def test_the_folder_has_to_be_synced_again_after_the_manifest() -> None:
    head, _, tail = GOOD.rpartition("7 fsync(5</d/run/step-1>) = 0\n")
    assert problems(head + tail) == ["at acknowledged-1, /d/run/step-1 was not synced after it got manifest.json"]


def test_a_sync_that_failed_is_none() -> None:
    assert problems(GOOD.replace("fsync(6</d/run/step-1/data>) = 0", "fsync(6</d/run/step-1/data>) = -1 EIO (Error)"))


def test_a_write_after_the_sync_is_found() -> None:
    late = "8 pwrite64(6</d/run/step-1/data>, ..., 4096, 0) = 4096\n"
    assert problems(GOOD.replace("7 fsync(4</d/run>) = 0\n", late + "7 fsync(4</d/run>) = 0\n"))


def test_a_sync_that_began_before_the_write_had_ended_does_not_count() -> None:
    sync, written = "7 fsync(6</d/run/step-1/data>) = 0\n", "8 <... pwrite64 resumed>) = 4096\n"
    overlapping = without(sync).replace(written, "7 fsync(6</d/run/step-1/data> <unfinished ...>\n" + written)
    ended = "7 fsync(5</d/run/step-1>) = 0\n"
    assert problems(overlapping.replace(ended, "7 <... fsync resumed>) = 0\n" + ended, 1))


def test_a_manifest_that_appears_before_the_data_is_synced_is_found() -> None:
    sync = "7 fsync(6</d/run/step-1/data>) = 0\n"
    late = without(sync).replace("7 unlinkat(", sync + "7 unlinkat(")
    assert problems(late) == [
        "when /d/run/step-1/manifest.json appeared, /d/run/step-1/data was not synced after its last write"
    ]
    renamed = GOOD.replace("linkat(", "renameat2(", 1).replace('7 unlinkat(5</d/run/step-1>, "m.0a.tmp", 0) = 0\n', "")
    assert problems(renamed) == []
    assert problems(without(sync, log=renamed))

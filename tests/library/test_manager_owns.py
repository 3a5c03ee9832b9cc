"""A manager that saves owns its directory: a second job fails at its start, a reader reads, an outcome is left."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt.errors import DirectoryBusyError
from distckpt.leasefiles import Record, file_name, look, standing
from distckpt.owner import Owner
from distckpt.storage import Capabilities, CountingStorage, open_storage

ROOT = Path(__file__).parents[2]
OTHER = """
import sys, torch, distckpt
state = {"weights": torch.zeros(3)}
ckpt = distckpt.CheckpointManager(sys.argv[1], every=1)
for step in ckpt.steps(state, until=2):
    print("begun", flush=True)
    sys.stdin.readline()
"""


def state() -> dict[str, Any]:
    return {"weights": torch.zeros(3)}


def test_a_second_job_fails_at_its_start_while_readers_read(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OTHER, str(tmp_path)]
    with subprocess.Popen(command, env={"PYTHONPATH": str(ROOT)}, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "begun\n"
        for enter in (
            lambda m: next(m.steps(state(), until=5)),
            lambda m: m.restore(state()),
            lambda m: m.save(9, state()),
        ):
            with pytest.raises(DirectoryBusyError, match=f"process {other.pid} "):
                enter(distckpt.CheckpointManager(tmp_path, every=1))
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "begun\n"
        assert distckpt.CheckpointManager(tmp_path).restore(state()) in (0, 1)
        other.kill()
    with distckpt.CheckpointManager(tmp_path, every=1) as ckpt:
        assert list(ckpt.steps(state(), until=3))[-1] == 3
    found = standing(open_storage(tmp_path))
    assert found is not None
    assert found.record.outcome is not None
    assert (found.state, found.record.outcome.step) == ("complete", 3)


def test_where_no_lease_can_be_written_a_job_goes_on_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lease").write_text("a file where the folder should be")
    with caplog.at_level("WARNING", "distckpt"), distckpt.CheckpointManager(tmp_path, every=1) as ckpt:
        assert list(ckpt.steps(state(), until=2)) == [1, 2]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("going on without a lease, so a second job here would go unnoticed: ")


def test_a_save_asks_nothing_of_the_lease_that_was_renewed_in_time(tmp_path: Path) -> None:
    with distckpt.CheckpointManager(tmp_path, every=1) as ckpt:
        ckpt._home.storage = ckpt._saver.storage = storage = CountingStorage(ckpt._home.storage)
        ckpt.restore(state())
        verbs = ("publish", "read_all")
        before = [storage.counted(verb).num_calls for verb in verbs]
        assert before[0] == 1, "the lease"
        for step in (1, 2):
            ckpt.save(step, state())
        ckpt.wait()
        asked = [storage.counted(verb).num_calls - count for verb, count in zip(verbs, before, strict=True)]
    assert asked == [2, 0], "more than the two manifests"


class LateStorage(CountingStorage):
    """A storage where a manifest of a killed save may still be on its way."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, late_requests=True)


def leave_the_lease_of_another_machine(directory: Path) -> None:
    storage = open_storage(directory)
    seen = look(storage)
    owner = Owner(host="elsewhere", pid=1)
    record = Record(job="0" * 16, owner=owner, acquired=1.0, renewed=1.0, duration_s=0.2)
    storage.publish(file_name(seen.number + 1), record.to_bytes())


@pytest.mark.parametrize("why", [None, "requests come late", "its owner may stand still"])
def test_what_killed_saves_have_left_is_deleted_at_the_start_but_for_one_that_may_still_come(
    tmp_path: Path, why: str | None
) -> None:
    late = why is not None
    with distckpt.CheckpointManager(tmp_path, every=1) as ckpt:
        list(ckpt.steps(state(), until=2))
    for number, (step, attempt) in enumerate([(2, "a" * 16), (3, "b" * 16), (3, "c" * 16), (4, "d" * 16)]):
        left = tmp_path / f"step-{step:012d}" / attempt / "rank-00000.safetensors"
        left.parent.mkdir(parents=True)
        left.write_bytes(b"left")
        os.utime(left, (1000.0, 1000.0 + (number if step != 4 else 0)))
    with distckpt.CheckpointManager(tmp_path, every=1) as ckpt:
        if why == "requests come late":
            ckpt._saver.storage = LateStorage(ckpt._saver.storage)
        elif why == "its owner may stand still":
            leave_the_lease_of_another_machine(tmp_path)
        assert ckpt.restore(state()) == 2
        ckpt.wait()
        left_over = [path.parent.name for path in tmp_path.glob("step-*/*/*.safetensors")]
        assert {name for name in left_over if len(set(name)) == 1} == ({"c" * 16} if late else set())
        assert len(left_over) == 2 + late, "the two checkpoints, and the youngest that is dead"


def test_an_error_is_the_outcome(tmp_path: Path) -> None:
    def train() -> None:
        with distckpt.CheckpointManager(tmp_path, every=1) as ckpt:
            for step in ckpt.steps(state(), until=3):
                _ = 1 // (2 - step)

    with pytest.raises(ZeroDivisionError):
        train()
    found = standing(open_storage(tmp_path))
    assert found is not None
    assert found.record.outcome is not None
    assert (found.state, found.record.outcome.step) == ("failed", 1)
    assert found.record.outcome.reason == "ZeroDivisionError: integer division or modulo by zero"

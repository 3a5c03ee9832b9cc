"""What happened in a run, told from its logs and its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import histories
import pytest

from distckpt import inventory, leasefiles
from distckpt.errors import CheckpointNotFoundError
from distckpt.inventory import Found
from distckpt.lease import Lease
from distckpt.logfolder import EVENTS_NAME
from distckpt.outcome import Outcome
from distckpt.report import Facts, gather, read_logs
from distckpt.retention import Retention
from distckpt.storage import open_storage

NOW = histories.BEGUN + 10_000


def facts_of(folder: Path) -> Facts:
    storage = open_storage(folder)
    found: list[Found] = []
    if any(folder.glob("step-*")):
        found = inventory.take(storage, brief=True)
    return gather(found, leasefiles.standing(storage), read_logs(folder), url=str(folder), now=NOW)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    folder = tmp_path_factory.mktemp("told") / "run-7"
    histories.write_history(folder)
    return facts_of(folder)


def event(kind: str, step: int | None = None, *, job: str = "a", time: float = 0.0, **facts: Any) -> dict[str, Any]:
    return {"time": histories.BEGUN + time, "job": job, "kind": kind, "step": step, **facts}


def write_events(folder: Path, *events: dict[str, Any]) -> None:
    histories.write_lines(folder / EVENTS_NAME, events)


def test_each_start_is_a_job_and_ends_as_it_said(told: Facts) -> None:
    assert [job.ending for job in told.jobs] == ["killed", "preempted", "killed", "failed", "killed", "complete"]
    assert [job.first_step for job in told.jobs] == [0, 120, 300, 360, 480, 540]
    assert [(job.host, job.pid, job.world_size) for job in told.jobs[:1]] == [("gpu-03", 1001, 2)]
    assert (told.state, told.restarts, told.name, told.step) == ("complete", 5, "run-7", 900)
    assert told.jobs[3].reason == "StorageError: no space left on '/scratch'"


def test_a_job_is_as_long_as_its_events(told: Facts) -> None:
    assert all(0 < job.ended - job.started < 200 for job in told.jobs)
    assert told.jobs[0].restore_s is None
    assert told.jobs[1].restore_s == 0.21


def test_restarts_preemptions_and_failures_are_marked_at_their_steps(told: Facts) -> None:
    marks = [(mark.step, mark.kind) for mark in told.marks]
    assert marks == [
        (120, "restart"),
        (300, "restart"),
        (300, "preemption"),
        (360, "restart"),
        (480, "restart"),
        (480, "failure"),
        (540, "restart"),
    ]
    assert "job 5 went on from here; job 4 had failed" in [mark.text for mark in told.marks]


def test_every_save_is_there_and_what_became_of_it(told: Facts) -> None:
    assert [save.step for save in told.saves] == list(range(60, 901, 60))
    assert [(row.step, row.fate) for row in told.rows][-4:] == [
        (720, "deleted"),
        (780, "kept"),
        (840, "kept"),
        (900, "kept"),
    ]
    deleted = [row for row in told.rows if row.fate == "deleted"]
    assert len(deleted) == 12
    assert all(row.gone is not None and row.created is not None and row.gone > row.created for row in deleted)


def test_why_a_checkpoint_is_kept_comes_from_the_configuration(told: Facts) -> None:
    assert told.retention == Retention(last=3)
    assert [row.reasons for row in told.kept] == [("last 3",), ("last 3",), ("newest", "last 3")]


@pytest.mark.parametrize("keep", [None, 0, -1, "all", {"last": 2, "new": 1}, {"best": 1}, [3]])
def test_a_retention_that_makes_no_sense_is_none(tmp_path: Path, keep: Any) -> None:
    histories.checkpoint(tmp_path, 10, config={"checkpoint": {"keep": keep}})
    assert facts_of(tmp_path).retention is None


def test_a_step_saved_again_after_damage_has_two_lives(tmp_path: Path) -> None:
    write_events(
        tmp_path,
        event("saved", 10, time=1, num_bytes=5, stall_s=0.1, write_s=1.0),
        event("saved", 20, time=2, num_bytes=5),
        event("quarantined", 20, job="b", time=3, reason="wrong bytes"),
        event("restored", 10, job="b", time=4, seconds=1.0, num_bytes=5),
        event("saved", 20, job="b", time=5, num_bytes=5),
    )
    histories.checkpoint(tmp_path, 10, created=histories.BEGUN + 1)
    histories.checkpoint(tmp_path, 20, created=histories.BEGUN + 5)
    facts = facts_of(tmp_path)
    assert [(row.step, row.fate, row.gone) for row in facts.rows] == [
        (10, "kept", None),
        (20, "damaged", histories.BEGUN + 3),
        (20, "kept", None),
    ]
    assert facts.rows[1].reasons == ("wrong bytes",)
    assert [(mark.step, mark.kind) for mark in facts.marks] == [(10, "restart"), (20, "damage")]
    assert facts.saves[0].rate == 5.0
    assert facts.saves[1].rate is None


@pytest.mark.parametrize(
    ("read", "is_from_memory"),
    [({}, False), ({"memory_bytes": 5, "storage_bytes": 0}, True), ({"memory_bytes": 5, "storage_bytes": 1}, False)],
)
def test_a_restore_that_read_only_memory_is_told(tmp_path: Path, read: dict[str, int], is_from_memory: bool) -> None:
    write_events(tmp_path, event("restored", 10, seconds=1.0, num_bytes=5, **read))
    histories.checkpoint(tmp_path, 10)
    [job] = facts_of(tmp_path).jobs
    assert job.restore_memory == is_from_memory


def test_a_job_without_an_end_runs_if_its_lease_says_so(tmp_path: Path) -> None:
    histories.checkpoint(tmp_path, 10)
    with_lease = Lease(open_storage(tmp_path), background=False)
    with_lease.acquire()
    record = leasefiles.look(open_storage(tmp_path)).record
    assert record is not None
    write_events(tmp_path, event("started", pid=record.owner.pid, host="h"), event("saved", 10, time=1))
    assert facts_of(tmp_path).state == "running"
    with_lease.release(Outcome(ending="failed", step=10, time=histories.BEGUN, host="h", reason="why"))
    assert facts_of(tmp_path).state == "killed"


def test_checkpoints_alone_tell_of_the_jobs_that_made_them(tmp_path: Path) -> None:
    first = histories.checkpoint(tmp_path, 10, pid=1)
    parent = {"step": first.step, "attempt": first.attempt}
    histories.checkpoint(tmp_path, 20, pid=2, created=histories.BEGUN + 60, parent=parent)
    histories.checkpoint(tmp_path, 30, pid=2, created=histories.BEGUN + 70, parent={"step": 20, "attempt": "x"})
    facts = facts_of(tmp_path)
    assert [(job.pid, job.first_step, job.last_step, job.num_saves) for job in facts.jobs] == [
        (1, None, 10, 1),
        (2, 10, 30, 2),
    ]
    assert [(mark.step, mark.kind) for mark in facts.marks] == [(10, "restart")]
    assert (facts.state, facts.has_events) == ("unknown", False)
    assert [save.write_s for save in facts.saves] == [0.03, 0.03, 0.03]
    assert [step for step, _ in facts.curves["val/top1"]] == [10, 20, 30]
    assert facts.versions["torch"] == "2.15.0"


def test_what_lies_there_broken_is_told_of(tmp_path: Path) -> None:
    histories.checkpoint(tmp_path, 10)
    (tmp_path / "step-000000000010" / "manifest.json").write_bytes(b"{}")
    (tmp_path / "step-000000000020").mkdir()
    (tmp_path / "step-000000000020" / "half").write_bytes(b"123")
    rows = facts_of(tmp_path).rows
    assert {(row.step, row.fate) for row in rows} == {(10, "damaged"), (20, "partial")}


def test_the_trainers_configuration_says_how_many_steps_there_are(tmp_path: Path) -> None:
    config = {"train": {"epochs": 3, "global_batch_size": 64}, "dataset": {"num_train": 100}}
    histories.checkpoint(tmp_path, 4, config=config)
    assert facts_of(tmp_path).total_steps == 6


@pytest.mark.parametrize("steps", [None, 7, ["a", None, 10**30], [10, 10]])
def test_a_pruning_that_makes_no_sense_deletes_nothing_else(tmp_path: Path, steps: Any) -> None:
    histories.checkpoint(tmp_path, 30)
    write_events(tmp_path, event("saved", 10), event("pruned", 30, steps=steps, time=1))
    assert [(row.step, row.fate) for row in facts_of(tmp_path).rows] == [(10, "deleted"), (30, "kept")]


def test_logs_are_enough_where_no_checkpoint_is_left(tmp_path: Path) -> None:
    histories.write_history(tmp_path)
    for manifest in tmp_path.glob("*/manifest.json"):
        manifest.unlink()
        manifest.parent.rmdir()
    with pytest.raises(CheckpointNotFoundError):
        inventory.take(open_storage(tmp_path))
    facts = facts_of(tmp_path)
    assert {row.fate for row in facts.rows} == {"deleted"}
    assert facts.step == 900


def test_the_same_run_gives_the_same_facts(tmp_path: Path) -> None:
    histories.write_history(tmp_path)
    assert facts_of(tmp_path) == facts_of(tmp_path)
    assert json.loads((tmp_path / EVENTS_NAME).read_text().splitlines()[0])["kind"] == "started"

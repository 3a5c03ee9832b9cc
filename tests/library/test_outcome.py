"""How a run's latest job stands, as a launcher reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from distckpt.lease import Lease
from distckpt.leasefiles import Record, Standing, file_name, look, standing
from distckpt.outcome import MAX_REASON_CHARS, Outcome
from distckpt.owner import Fate, Machine, Owner
from distckpt.storage import LocalStorage

RENEWED = 1000.0


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "run")


def outcome(**changes: object) -> Outcome:
    facts = {"ending": "preempted", "step": 40, "time": 5.0, "host": "gpu-1", "reason": "SIGTERM", **changes}
    return Outcome(**facts)  # type: ignore[arg-type]


def stands(storage: LocalStorage, fate: Fate, *, now: float = RENEWED) -> Standing:
    found = standing(storage, machine=Machine(fate=lambda _owner: fate), now=now)
    assert found is not None
    return found


def leave_record(storage: LocalStorage, *, released: bool = False) -> None:
    owner = Owner(host="gpu-1", pid=1)
    record = Record(
        job="0" * 16, owner=owner, acquired=900.0, renewed=RENEWED, duration_s=60.0, run="r", released=released
    )
    storage.publish(file_name(1), record.to_bytes())


@pytest.mark.parametrize("ending", ["complete", "preempted", "failed"])
def test_what_a_job_said_at_its_end_is_what_a_launcher_reads(storage: LocalStorage, ending: str) -> None:
    said = outcome(ending=ending)
    with Lease(storage, background=False) as lease:
        lease.run = "0123456789abcdef"
        lease.conclude(said)
        assert stands(storage, "runs").state == ending, "also before it has left"
    found = stands(storage, "gone")
    assert (found.state, found.record.outcome, found.record.run) == (ending, said, "0123456789abcdef")
    assert found.record.released
    assert len(look(storage).files) == 1


def test_what_was_said_before_the_end_stands(storage: LocalStorage) -> None:
    for said, state in ((None, "complete"), (outcome(ending="preempted"), "preempted")):
        lease = Lease(storage, background=False)
        lease.acquire()
        if said is not None:
            lease.conclude(said)
        lease.release(outcome(ending="complete"))
        assert stands(storage, "gone").state == state


def test_the_next_job_wipes_what_the_last_one_said(storage: LocalStorage) -> None:
    with Lease(storage, background=False) as lease:
        lease.conclude(outcome())
    with Lease(storage, background=False):
        assert stands(storage, "runs").state == "running"
    assert stands(storage, "gone").state == "unknown"


@pytest.mark.parametrize(
    ("fate", "age_s", "released", "state"),
    [
        ("runs", 1e6, False, "running"),
        ("gone", 0.0, False, "unknown"),
        ("unknown", 100.0, False, "running"),
        ("unknown", 130.0, False, "unknown"),
        ("runs", 0.0, True, "unknown"),
    ],
)
def test_a_job_that_said_nothing_runs_or_was_killed(
    storage: LocalStorage, fate: Fate, age_s: float, released: bool, state: str
) -> None:
    leave_record(storage, released=released)
    assert stands(storage, fate, now=RENEWED + age_s).state == state


def test_a_directory_that_nobody_ever_owned_has_no_outcome(storage: LocalStorage) -> None:
    assert standing(storage) is None
    storage.publish(file_name(1), b"{}")
    assert standing(storage) is None


def test_what_could_not_be_written_is_said_at_the_end(storage: LocalStorage) -> None:
    lease = Lease(storage, background=False)
    lease.acquire()
    (storage.root / file_name(2)).mkdir()  # in the way of the next file
    with pytest.raises(OSError, match="000000000002"):
        lease.conclude(outcome())
    (storage.root / file_name(2)).rmdir()
    lease.release()
    assert stands(storage, "gone").state == "preempted"


def test_a_long_reason_is_cut() -> None:
    long = outcome(reason="x" * 2000)
    assert len(Outcome.from_json(long.to_json()).reason or "") == MAX_REASON_CHARS


@pytest.mark.parametrize(
    "change", [{"ending": "won"}, {"step": -1}, {"step": True}, {"time": float("nan")}, {"host": 3}, {"reason": 3}]
)
def test_an_outcome_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"has|is no"):
        Outcome.from_json({**outcome().to_json(), **change})


def test_only_an_object_is_an_outcome() -> None:
    with pytest.raises(ValueError, match="is no outcome"):
        Outcome.from_json([])

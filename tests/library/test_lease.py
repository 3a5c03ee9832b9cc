"""Exactly one job owns a run's directory, on every storage; a dead owner's is taken over, a live one's is not."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import ConfigError, DirectoryBusyError, StorageError, UsageError
from distckpt.failure import from_wire, to_wire
from distckpt.lease import Lease
from distckpt.leasefiles import FOLDER, Record, file_name, look, named, parse
from distckpt.outcome import Outcome
from distckpt.owner import Fate, Machine, Owner, fate_of, this_process
from distckpt.storage import CountingStorage, LocalStorage, Storage, open_storage

WAIT_LIMIT_S = 30.0


@dataclass
class Clock:
    """A machine whose time goes by when somebody waits for it."""

    time: float = 0.0
    fates: dict[str, Fate] = field(default_factory=dict)
    on_pause: Callable[[], None] = field(default=lambda: None)

    def machine(self, host: str) -> Machine:
        me = Owner(host=host, pid=1)
        return Machine(me=me, now=lambda: self.time, pause=self.pause, fate=lambda o: self.fates.get(o.host, "unknown"))

    def pause(self, seconds: float) -> None:
        self.time += seconds
        self.on_pause()

    def lease(self, storage: Storage, host: str) -> Lease:
        return Lease(storage, duration_s=60.0, background=False, machine=self.machine(host))


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield open_storage(tmp_path / "run")
    elif request.param == "memory":
        yield open_storage("memory://lease/run")
        MemoryFileSystem().store.clear()
    else:
        yield open_storage(f"s3://{request.getfixturevalue('s3_bucket')}/run")


@pytest.fixture
def local(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "run")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lease_files(storage: Storage) -> list[str]:
    return [file.name for file in storage.list(FOLDER)]


def test_one_job_owns_the_directory_and_the_other_is_told_who(storage: Storage, clock: Clock) -> None:
    clock.fates = {"host-a": "runs"}
    owner = clock.lease(storage, "host-a")
    owner.acquire()
    with pytest.raises(DirectoryBusyError, match=r"process 1 on host 'host-a', since 20\d\d-") as caught:
        clock.lease(storage, "host-b").acquire()
    assert (caught.value.host, caught.value.pid, caught.value.taken_over) == ("host-a", 1, False)
    assert clock.time == 0.0, "an owner that is known to run is not waited for"
    owner.check()
    owner.renew()
    assert owner.still_held()
    owner.release()
    assert not owner.still_held()
    with clock.lease(storage, "host-b") as next_owner:
        next_owner.check()
    assert len(lease_files(storage)) == 1


def test_an_owner_elsewhere_is_taken_over_when_its_duration_has_gone_by_unrenewed(
    storage: Storage, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    dead = clock.lease(storage, "host-a")
    dead.acquire()
    clock.time = 1000.0  # however long ago it renewed: who comes now cannot know
    taker = clock.lease(storage, "host-b")
    with caplog.at_level(logging.INFO, "distckpt"):
        taker.acquire()
    assert 1060.0 <= clock.time < 1064.0
    assert "waiting up to 60 s for a sign of life" in caplog.text
    assert "process 1 on host 'host-a', gave no sign of life for 60.0 s" in caplog.text
    for told in (dead.check, dead.renew, dead.check):
        with pytest.raises(DirectoryBusyError, match="was taken over from this job by process 1 on host 'host-b'"):
            told()
    dead.release()
    taker.check()
    assert len(lease_files(storage)) == 1


def test_an_owner_elsewhere_that_renews_is_left_alone(local: LocalStorage, clock: Clock) -> None:
    owner = clock.lease(local, "host-a")
    owner.acquire()
    renewals = iter([20.0, 40.0])
    due = next(renewals)

    def renew_when_due() -> None:
        nonlocal due
        if clock.time >= due:
            owner.renew()
            due = next(renewals)

    clock.on_pause = renew_when_due
    with pytest.raises(DirectoryBusyError, match="belongs to another job"):
        clock.lease(local, "host-b").acquire()
    assert 20.0 <= clock.time < 24.0
    owner.check()


def test_the_last_words_of_a_dead_owner_do_not_make_it_live(local: LocalStorage, clock: Clock) -> None:
    dying = clock.lease(local, "host-a")
    dying.acquire()
    first = True

    def arrive_late() -> None:
        nonlocal first
        if first:
            first = False
            dying.renew()

    clock.on_pause = arrive_late
    clock.lease(local, "host-b").acquire()
    assert 60.0 <= clock.time < 70.0


def test_an_owner_known_to_be_dead_is_taken_over_at_once(storage: Storage, clock: Clock) -> None:
    clock.lease(storage, "host-a").acquire()
    clock.fates = {"host-a": "gone"}
    clock.lease(storage, "host-b").acquire()
    assert clock.time == 0.0


def test_a_process_does_not_lock_itself_out(local: LocalStorage) -> None:
    older, newer = Lease(local, background=False), Lease(local, background=False)
    older.acquire()
    newer.acquire()
    newer.check()
    with pytest.raises(DirectoryBusyError, match=f"taken over from this job by process {os.getpid()}"):
        older.check()


def test_a_lease_that_was_overwritten_is_lost_where_publish_is_not_exclusive(clock: Clock) -> None:
    storage = open_storage("memory://lease/overwritten")
    assert not storage.capabilities.exclusive_publish
    lease = clock.lease(storage, "host-a")
    lease.acquire()
    rival = parse(storage.read_all(file_name(1), limit_bytes=10_000))
    MemoryFileSystem().pipe(f"/lease/overwritten/{file_name(1)}", replace(rival, job="f" * 16).to_bytes())
    with pytest.raises(DirectoryBusyError):
        lease.check()
    MemoryFileSystem().store.clear()


def test_the_thread_renews_until_the_lease_is_given_back(local: LocalStorage) -> None:
    with Lease(local, duration_s=0.2) as lease:
        wait_until(lambda: look(local).number > 3)
        lease.check()
    number = look(local).number
    record = look(local).record
    assert record is not None
    assert record.released
    assert lease_files(local) == [file_name(number)]


def test_a_renewal_costs_one_publish_and_one_delete(local: LocalStorage) -> None:
    counting = CountingStorage(local)
    lease = Lease(counting, background=False)
    lease.acquire()
    before = {verb: counting.counted(verb).num_calls for verb in ("publish", "delete", "list", "read_all")}
    lease.renew()
    after = {verb: counting.counted(verb).num_calls for verb in before}
    assert {verb: after[verb] - before[verb] for verb in before} == {
        "publish": 1,
        "delete": 1,
        "list": 0,
        "read_all": 0,
    }


class _Broken(CountingStorage):
    """A storage that publishes nothing while it is broken."""

    is_broken = False

    def publish(self, name: str, data: bytes) -> None:
        if self.is_broken:
            raise StorageError(path=name, action="publish", cause="made by a test")
        super().publish(name, data)


def test_an_outage_longer_than_the_lease_costs_nothing_if_nobody_came(local: LocalStorage, clock: Clock) -> None:
    storage = _Broken(local)
    lease = clock.lease(storage, "host-a")
    lease.acquire()
    storage.is_broken = True
    with pytest.raises(StorageError, match="made by a test"):
        lease.renew()
    lease.check()
    clock.time = 61.0
    assert not lease.still_held()
    with pytest.raises(StorageError, match="made by a test"):
        lease.check()
    storage.is_broken = False
    lease.check()
    assert lease.still_held()


def test_a_broken_storage_fails_the_start_and_only_warns_at_the_end(
    local: LocalStorage, caplog: pytest.LogCaptureFixture
) -> None:
    storage = _Broken(local)
    storage.is_broken = True
    with pytest.raises(StorageError, match="made by a test"):
        Lease(storage, background=False).acquire()
    storage.is_broken = False
    with Lease(storage, background=False):
        storage.is_broken = True
    assert "could not give" in caplog.text


def test_files_that_make_no_sense_are_an_owner_of_whom_nothing_is_known(local: LocalStorage, clock: Clock) -> None:
    local.publish(file_name(41), b"{]")
    lease = clock.lease(local, "host-b")
    lease.acquire()
    assert clock.time >= 60.0
    assert look(local).number == 42
    assert lease_files(local) == [file_name(42)]


def test_what_killed_jobs_have_left_is_removed(local: LocalStorage) -> None:
    for name in (file_name(1), f"{file_name(2)}.0123456789abcdef.tmp", file_name(2)):
        record = Record(job="1" * 16, owner=this_process(), acquired=1.0, renewed=1.0, duration_s=1.0, released=True)
        (local.root / name).parent.mkdir(parents=True, exist_ok=True)
        (local.root / name).write_bytes(record.to_bytes())
    with Lease(local, background=False):
        assert lease_files(local) == [file_name(3)]


def test_a_folder_removed_by_hand_is_made_again(local: LocalStorage) -> None:
    lease = Lease(local, background=False)
    lease.acquire()
    lease.renew()
    local.delete(lease_files(local))
    lease.check()
    assert look(local).number == 3


def test_a_lease_is_used_as_it_is_meant(local: LocalStorage) -> None:
    lease = Lease(local, background=False)
    for call in (lease.check, lease.renew):
        with pytest.raises(UsageError, match="not held"):
            call()
    lease.release()
    with pytest.raises(UsageError, match="acquired once"):
        lease.acquire()
    for duration_s in (0.0, -1.0, 1e9, float("nan")):
        with pytest.raises(ConfigError, match="duration_s"):
            Lease(local, duration_s=duration_s)


# Who lives.


def sleeper() -> subprocess.Popen[bytes]:
    """Start a process that waits for its input to end, and return once it runs."""
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        os.sched_yield()


def owner_of(process: subprocess.Popen[bytes]) -> Owner:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return replace(this_process(), pid=process.pid, started=int(fields[19]))


def test_a_process_of_this_host_is_known_to_run_or_to_be_gone() -> None:
    assert fate_of(this_process()) == "runs"
    with sleeper() as process:
        owner = owner_of(process)
        assert fate_of(owner) == "runs"
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: fate_of(owner) == "unknown")
        process.kill()
        wait_until(lambda: fate_of(owner) == "gone")  # before anybody has waited for it
        process.wait()
        assert fate_of(owner) == "gone"


def test_a_number_that_another_process_has_by_now_is_not_the_owner() -> None:
    me = this_process()
    assert me.started is not None
    assert fate_of(replace(me, started=me.started - 1)) == "gone"


@pytest.mark.parametrize("other", [{"host": "x"}, {"boot": "x"}, {"namespace": "x"}, {"boot": None}, {"started": None}])
def test_nothing_is_said_of_what_this_kernel_cannot_see(other: dict[str, str | None]) -> None:
    assert fate_of(replace(this_process(), pid=2**31 - 1, **other)) == "unknown"  # type: ignore[arg-type]


# What the files say.

texts = st.text(max_size=50)
moments = st.floats(min_value=0, max_value=1e12)
outcomes = st.builds(
    Outcome,
    ending=st.sampled_from(["complete", "preempted", "failed"]),
    step=st.none() | st.integers(0, 10**9),
    time=moments,
    host=texts,
    reason=st.none() | texts,
)
owners = st.builds(
    Owner,
    host=texts,
    pid=st.integers(1, 2**31 - 1),
    started=st.none() | st.integers(0, 2**60),
    boot=st.none() | texts,
    namespace=st.none() | texts,
)
records = st.builds(
    Record,
    job=texts,
    owner=owners,
    acquired=moments,
    renewed=moments,
    duration_s=st.floats(min_value=0.001, max_value=3600),
    run=st.none() | texts,
    released=st.booleans(),
    outcome=st.none() | outcomes,
)
jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts, lambda inner: st.lists(inner, max_size=3)
)


@given(records)
def test_a_record_comes_back_as_it_was_written(record: Record) -> None:
    assert parse(record.to_bytes()) == record


KEYS = ["job", "host", "pid", "started", "boot", "namespace", "acquired", "renewed", "duration_s", "run", "outcome"]


@given(records, st.sampled_from(KEYS), jsons)
def test_any_other_content_is_refused_or_understood(record: Record, key: str, value: object) -> None:
    body = json.loads(record.to_bytes())
    body[key] = value
    try:
        parsed = parse(json.dumps(body).encode())
    except ValueError:
        return
    assert 0 < parsed.duration_s <= 3600
    assert named(parsed).startswith("process ")


@given(st.binary(max_size=50))
def test_bytes_that_are_no_record_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  of whichever decoder
        parse(data)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse(b"[" * 60_000)


def test_the_error_travels_between_ranks() -> None:
    error = DirectoryBusyError(path="/ckpt", host="gpu-1", pid=7, since=0.0)
    twin = from_wire(json.loads(json.dumps(to_wire(error))))
    assert isinstance(twin, BlockingIOError)
    assert str(twin) == str(error)
    assert "process 7 on host 'gpu-1', since 1970-01-01 00:00:00 UTC\nFix: wait for that job" in str(error)
    nobody = DirectoryBusyError(path="/ckpt", host=None, pid=None, since=None)
    assert "belongs to another job: a job that does not say who it is\n" in str(nobody)

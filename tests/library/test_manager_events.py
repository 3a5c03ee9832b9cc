"""What a manager tells of: to a log at once, to callbacks between two steps, and on rank 0 alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import event_jobs
import pytest
import torch
from failing_storage import FailingStorage
from in_flight_jobs import GatedStorage, gated
from rank_pool import RankPools

from distckpt import CheckpointManager, __version__, names
from distckpt.errors import SaveInFlightError, StateMismatchError
from distckpt.events import (
    Ended,
    Event,
    EventLog,
    Preempted,
    Pruned,
    Quarantined,
    Restored,
    Saved,
    SaveFailed,
    SaveSkipped,
    Started,
)
from distckpt.storage import Buffer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kinds(events: Iterable[Event]) -> list[tuple[str, int | None]]:
    return [(event.kind, event.step) for event in events]


def of_kind(events: Iterable[Event], kind: type[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_a_run_tells_its_story(tmp_path: Path):
    told: list[Event] = []
    begun = time.time()
    with CheckpointManager(tmp_path, every=2, keep=1, callbacks=[told.append], background=False) as ckpt:
        for _ in ckpt.steps({"x": torch.ones(1000)}, until=5):
            pass
        size = ckpt.checkpoints[-1].num_bytes
    assert sorted(kinds(told), key=str) == sorted(
        [
            ("started", None),
            ("restored", 0),
            *[("saved", step) for step in (2, 4, 5)],
            *[("pruned", step) for step in (4, 5)],
            ("ended", 5),
        ],
        key=str,
    )
    started, restored, *_, ended = told
    assert isinstance(started, Started)
    assert (started.world_size, started.host, started.pid) == (1, socket.gethostname(), os.getpid())
    assert (started.directory, started.version) == (str(tmp_path), __version__)
    assert isinstance(restored, Restored)
    assert restored.num_bytes == 0
    assert ended == Ended(time=ended.time, job=ckpt.job, step=5, ending="complete", reason=None)
    for saved in of_kind(told, Saved):
        assert saved.num_bytes == size > 4000
        assert 0 < saved.write_s <= saved.durable_s == saved.stall_s
        assert (saved.world_size, saved.layout) == (1, "sharded")
    assert [(pruned.steps, pruned.num_bytes) for pruned in of_kind(told, Pruned)] == [((2,), size), ((4,), size)]
    assert {event.job for event in told} == {ckpt.job}
    assert all(begun <= event.time <= time.time() for event in told)


def test_the_log_holds_what_the_callbacks_are_told_and_a_restart_appends(tmp_path: Path):
    told: list[Event] = []
    path = tmp_path / "logs" / "events.jsonl"
    for until in (4, 7, 7):
        with CheckpointManager(tmp_path / "run", every=2, callbacks=[told.append, EventLog(path)]) as ckpt:
            for _ in ckpt.steps({"x": 1}, until=until):
                pass
    assert lines(path) == [event.to_json() for event in told]
    restored = of_kind(told, Restored)
    assert [event.step for event in restored] == [0, 4, 7]
    assert [event.num_bytes > 0 for event in restored] == [False, True, True]
    assert len({event.job for event in told}) == 3
    assert [event.ending for event in of_kind(told, Ended)] == ["complete"] * 3


def test_callbacks_are_called_by_the_thread_of_the_training_and_the_log_at_once(tmp_path: Path):
    threads: dict[str, set[threading.Thread]] = {}

    def note(event: Event) -> None:
        threads.setdefault(event.kind, set()).add(threading.current_thread())

    path = tmp_path / "events.jsonl"
    with CheckpointManager(tmp_path / "run", keep=1, callbacks=[note, EventLog(path)]) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"x": step})
        while not {"saved", "pruned"} <= {line["kind"] for line in lines(path)}:  # with no call of the manager
            time.sleep(0.001)
        assert "pruned" not in threads
        ckpt.wait()
        assert "pruned" in threads
    assert set().union(*threads.values()) == {threading.main_thread()}


def test_a_damaged_checkpoint_is_told_of_before_the_restore_of_an_older_one(tmp_path: Path):
    told: list[Event] = []
    with CheckpointManager(tmp_path) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, {"x": torch.full((1000,), float(step))})
    [data] = (tmp_path / names.step_name(3)).rglob("*.safetensors")
    content = bytearray(data.read_bytes())
    content[-100] ^= 1
    data.write_bytes(content)
    (tmp_path / names.step_name(2) / "manifest.json").write_text("{")
    with CheckpointManager(tmp_path, callbacks=[told.append]) as ckpt:
        assert ckpt.restore({"x": torch.zeros(1000)}) == 1
    assert kinds(told) == [("started", None), ("quarantined", 3), ("quarantined", 2), ("restored", 1), ("ended", 1)]
    for event in of_kind(told, Quarantined):
        assert str(tmp_path) in event.reason
        assert event.reason.endswith("; it is put aside")


@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_fails_is_told_of_once(tmp_path: Path, background: bool):
    told: list[Event] = []
    with CheckpointManager(tmp_path, callbacks=[told.append], background=background) as ckpt:
        ckpt.save(1, {"x": 1})
        ckpt.wait()
        whole = ckpt._home.storage
        ckpt._home.storage = ckpt._saver.storage = FailingStorage(whole, fail_at=0)
        with pytest.raises(OSError, match="made by a test"):  # noqa: PT012  which of them raises depends on the setting
            ckpt.save(2, {"x": 2})
            ckpt.wait()
        ckpt._home.storage = ckpt._saver.storage = whole
        ckpt.save(3, {"x": 3})
    [failed] = of_kind(told, SaveFailed)
    assert (failed.step, failed.error) == (2, "OSError")
    assert "Input/output error, made by a test" in failed.reason
    assert [event.step for event in of_kind(told, Saved)] == [1, 3]


def test_a_save_that_fails_while_the_state_is_taken_is_told_of(tmp_path: Path):
    told: list[Event] = []
    with CheckpointManager(tmp_path, callbacks=[told.append]) as ckpt:
        with pytest.raises(TypeError):
            ckpt.save(4, {"x": object()})
        assert not of_kind(told, SaveFailed)
    [failed] = of_kind(told, SaveFailed)
    assert (failed.step, failed.error) == (4, "UnsupportedStateError")


@pytest.mark.parametrize("when_busy", ["skip", "raise"])
def test_a_skipped_save_names_the_one_in_flight(tmp_path: Path, when_busy: Any):
    told: list[Event] = []
    with CheckpointManager(tmp_path, callbacks=[told.append], when_busy=when_busy) as ckpt:
        gates = gated(ckpt)
        gates.writing.clear()
        ckpt.save(1, {"x": 1})
        assert gates.reached.wait(60)
        if when_busy == "skip":
            ckpt.save(2, {"x": 2})
        else:
            with pytest.raises(SaveInFlightError):
                ckpt.save(2, {"x": 2})
        gates.writing.set()
    assert [(event.step, event.in_flight) for event in of_kind(told, SaveSkipped)] == [(2, 1)]


def test_a_preempted_job_says_so_and_ends_as_preempted(tmp_path: Path):
    told: list[Event] = []
    with CheckpointManager(tmp_path, callbacks=[told.append]) as ckpt:
        for step in ckpt.steps({"x": 1}, until=50):
            if step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
    assert kinds(told) == [("started", None), ("restored", 0), ("preempted", 7), ("saved", 7), ("ended", 7)]
    [preempted] = of_kind(told, Preempted)
    assert preempted.signal == "SIGTERM"
    assert preempted.choice
    assert told[-1].to_json()["ending"] == "preempted"


def test_a_job_that_fails_says_why(tmp_path: Path):
    told: list[Event] = []

    def fail_in_step_5() -> None:
        with CheckpointManager(tmp_path, every=2, callbacks=[told.append]) as ckpt:
            for step in ckpt.steps({"x": 1}, until=9):
                assert 1 / (5 - step)

    with pytest.raises(ZeroDivisionError):
        fail_in_step_5()
    ended = told[-1]
    assert isinstance(ended, Ended)
    assert (ended.step, ended.ending, ended.reason) == (4, "failed", "ZeroDivisionError: division by zero")


def test_a_job_that_cannot_begin_says_that_it_failed(tmp_path: Path):
    told: list[Event] = []
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, {"x": 1})
    with pytest.raises(StateMismatchError), CheckpointManager(tmp_path, every=1, callbacks=[told.append]) as ckpt:
        ckpt.restore({"y": 1})
    assert kinds(told) == [("started", None), ("ended", None)]
    ended = told[-1]
    assert isinstance(ended, Ended)
    assert ended.ending == "failed"
    assert ended.reason is not None
    assert ended.reason.startswith("StateMismatchError: ")
    assert "Fix:" not in ended.reason


def test_a_callback_that_raises_is_logged_once_and_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    told: list[Event] = []
    calls: list[Event] = []

    def careless(event: Event) -> None:
        calls.append(event)
        raise ValueError("made by a test")

    with CheckpointManager(tmp_path, every=1, callbacks=[careless, told.append]) as ckpt:
        for _ in ckpt.steps({"x": 1}, until=5):
            pass
    assert len(calls) == 1
    assert [event.step for event in of_kind(told, Saved)] == [1, 2, 3, 4, 5]
    [record] = [record for record in caplog.records if "is not called again" in record.message]
    assert "careless failed at a 'started' event" in record.message
    assert "made by a test" in caplog.text


def test_a_callback_may_use_the_manager(tmp_path: Path):
    counts: list[int] = []
    manager: list[CheckpointManager] = []

    def look(event: Event) -> None:
        if isinstance(event, Saved):
            manager[0].wait()
            counts.append(len(manager[0].checkpoints))

    with CheckpointManager(tmp_path, every=1, callbacks=[look]) as ckpt:
        manager.append(ckpt)
        for _ in ckpt.steps({"x": 1}, until=3):
            pass
    assert len(counts) == 3
    assert counts[-1] == 3


def test_a_manager_that_is_not_used_tells_nothing(tmp_path: Path):
    told: list[Event] = []
    with CheckpointManager(tmp_path / "run", callbacks=[told.append, EventLog(tmp_path / "events.jsonl")]) as ckpt:
        assert ckpt.latest is None
    assert not told
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_harms_no_save(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    with CheckpointManager(tmp_path / "run", every=1, callbacks=[EventLog(tmp_path / "file" / "log")]) as ckpt:
        assert [*ckpt.steps({"x": 1}, until=3)] == [1, 2, 3]
        assert len(ckpt.checkpoints) == 3
    assert len([record for record in caplog.records if "events are not logged" in record.message]) == 1


def test_only_rank_0_tells_and_says_what_all_did(ranks: RankPools, tmp_path: Path):
    (told, job), *others = ranks(2).run(event_jobs.run, str(tmp_path), until=9, signalled=5)
    assert all(quiet == [] for quiet, _ in others)
    assert [file.name for file in tmp_path.glob("log-*")] == ["log-0.jsonl"]
    assert lines(tmp_path / "log-0.jsonl") == told
    assert {line["job"] for line in told} == {job}
    by_kind = {line["kind"]: line for line in told}
    assert by_kind["started"]["world_size"] == by_kind["saved"]["world_size"] == 2
    assert by_kind["preempted"]["step"] == by_kind["ended"]["step"] in (5, 6)
    assert (by_kind["preempted"]["signal"], by_kind["ended"]["ending"]) == ("SIGTERM", "preempted")


# --- progress ---


class HaltingStorage(GatedStorage):
    """A storage that stops in the middle of each data file until `writing` is set."""

    def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
        def halting() -> Any:
            taken = 0
            for chunk in chunks:
                if num_bytes is not None and taken > num_bytes / 2:
                    self._pass(self.writing)
                yield chunk
                taken += len(chunk)

        return self.inner.put(name, halting(), num_bytes=num_bytes)


def test_progress_says_how_far_the_save_in_flight_is(tmp_path: Path):
    state = {"x": torch.zeros(10 << 20)}
    with CheckpointManager(tmp_path, rng=False) as ckpt:
        assert str(ckpt.progress) == ""
        ckpt.save(1, state)
        ckpt.wait()
        done = ckpt.progress
        assert (done.saved_step, done.saving_step) == (1, None)
        assert done.saved_ago_s is not None
        storage = HaltingStorage(ckpt._home.storage)
        ckpt._home.storage = ckpt._saver.storage = storage
        storage.writing.clear()
        ckpt.save(2, state)
        assert storage.reached.wait(60)
        now = ckpt.progress
        assert (now.saved_step, now.saving_step) == (1, 2)
        assert now.saving_bytes > 40 << 20
        assert 0.4 < now.written_bytes / now.saving_bytes < 0.8
        assert str(now).startswith("saved 1, ")
        assert f"; saving 2: {100 * now.written_bytes // now.saving_bytes} %" in str(now)
        storage.writing.set()
        ckpt.wait()
        assert (ckpt.progress.saved_step, ckpt.progress.saving_step) == (2, None)
    with CheckpointManager(tmp_path, rng=False) as ckpt:
        ckpt.restore(state)
        assert str(ckpt.progress) == "restored 2"


def test_a_failed_save_is_no_longer_in_flight(tmp_path: Path):
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, {"x": torch.ones(9)})
        ckpt.wait()
        ckpt._home.storage = ckpt._saver.storage = FailingStorage(ckpt._home.storage, fail_at=0)
        ckpt.save(2, {"x": torch.ones(9)})
        with pytest.raises(OSError, match="made by a test"):
            ckpt.wait()
        assert (ckpt.progress.saved_step, ckpt.progress.saving_step) == (1, None)

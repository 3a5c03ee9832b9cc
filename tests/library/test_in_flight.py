"""What goes on beside the training: saves that find one in flight, pruning, and saves that are due by the clock."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import in_flight_jobs as jobs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_flight_jobs import GatedStorage, Recorder, gated
from rank_pool import RankPools

import distckpt
from distckpt import CheckpointManager, catalog, names
from distckpt.background import Pruner, PruneRequest
from distckpt.errors import ConfigError, DirectoryBusyError, SaveInFlightError
from distckpt.retention import Retention
from distckpt.storage import open_storage


def steps_in(directory: Path) -> list[int]:
    return [checkpoint.step for checkpoint in CheckpointManager(directory).checkpoints]


def opened_meanwhile(gate: threading.Event) -> threading.Thread:
    """Open a gate on another thread; return the thread."""
    thread = threading.Thread(target=gate.set)
    thread.start()
    return thread


# --- pruning beside the training ---


@pytest.mark.parametrize("background", [True, False])
def test_saves_do_not_wait_for_pruning_and_wait_does(tmp_path: Path, background: bool):
    with CheckpointManager(tmp_path, keep=1, background=background) as ckpt:
        gates = gated(ckpt)
        gates.deleting.clear()
        for step in range(1, 6):
            ckpt.save(step, {"x": step})
        assert gates.reached.wait(60)
        assert ckpt.latest is not None
        assert ckpt.latest.step >= 4
        assert steps_in(tmp_path)[0] == 1
        opener = opened_meanwhile(gates.deleting)
        ckpt.wait()
        assert steps_in(tmp_path) == [5]
        opener.join()
        assert gates.most_at_once == 1


def test_a_stop_and_the_end_of_the_loop_leave_what_retention_says(tmp_path: Path):
    with CheckpointManager(tmp_path, every=1, keep=2) as ckpt:
        for step in ckpt.steps({"x": 1}, until=9):
            if step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
        assert ckpt.preempted
        assert steps_in(tmp_path) == [5, 6]
        assert [*ckpt.steps({"x": 1}, until=5)] == []


@pytest.mark.parametrize("error", [OSError(5, "made by a test"), distckpt.errors.UsageError(problem="made by a test")])
def test_pruning_that_fails_is_a_warning(tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture):
    class Undeletable(GatedStorage):
        def delete(self, names: Any) -> None:
            raise error

    with CheckpointManager(tmp_path, keep=1) as ckpt, caplog.at_level(logging.WARNING, logger="distckpt"):
        ckpt._saver.storage = Undeletable(ckpt._home.storage)
        for step in (1, 2, 3):
            ckpt.save(step, {"x": step})
        ckpt.wait()
        assert f"could not prune {ckpt.directory}" in caplog.text
        assert "made by a test" in caplog.text
        ckpt._saver.storage = ckpt._home.storage
        ckpt.save(4, {"x": 4})
    assert steps_in(tmp_path) == [4]


def put(directory: Path, step: int, attempt: str) -> Path:
    """Write what a save has in its folder before it is committed."""
    file = directory / names.step_name(step) / attempt / "rank-00000.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"bytes")
    return file


@given(steps=st.lists(st.integers(1, 6), min_size=1, max_size=4), before=st.booleans(), over=st.booleans())
@settings(max_examples=25, deadline=None)
def test_pruning_touches_nothing_of_a_save_that_was_in_flight_since_it_looked(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], before: bool, over: bool
):
    """A save may be of any step, the newest or an older one; it may have begun before the look, and be over by now."""
    directory = tmp_path_factory.mktemp("run")
    dead = {step: put(directory, step, "dead") for step in range(1, 7)}
    gates = GatedStorage(open_storage(directory))
    pruner = Pruner(Retention())
    if before:
        pruner.spare(steps[0])
        alive = [put(directory, steps[0], "alive")]
        gates.listed.clear()
        pruner.start(gates, PruneRequest(newest=5, resumed_from=None))
        assert gates.reached.wait(60)
    else:
        gates.listed.clear()
        pruner.start(gates, PruneRequest(newest=5, resumed_from=None))
        assert gates.reached.wait(60)
        pruner.spare(steps[0])
        alive = [put(directory, steps[0], "alive")]
    for step in steps[1:]:  # failed, and tried again at another step
        pruner.release()
        pruner.spare(step)
        alive.append(put(directory, step, "alive"))
    if over:
        pruner.release()
    gates.listed.set()
    pruner.wait()
    assert all(file.exists() for file in alive)
    assert {step for step, file in dead.items() if file.exists()} == {*steps, 6}
    pruner.release()
    pruner.start(gates, PruneRequest(newest=6, resumed_from=None))
    pruner.wait()
    assert not catalog.scan(gates)


def test_a_save_waits_until_its_folder_is_not_being_deleted(tmp_path: Path):
    put(tmp_path, 3, "dead")
    gates = GatedStorage(open_storage(tmp_path))
    pruner, order = Pruner(Retention()), []
    gates.deleting.clear()
    pruner.start(gates, PruneRequest(newest=5, resumed_from=None))
    assert gates.reached.wait(60)

    def save() -> None:
        pruner.spare(3)
        order.append("gone" if not list(tmp_path.rglob("*.safetensors")) else "there")

    pruner.spare(4)  # another folder's save begins at once
    pruner.release()
    thread = threading.Thread(target=save)
    thread.start()
    while thread.is_alive() and not pruner._turn._waiters:
        thread.join(0.001)
    gates.deleting.set()
    thread.join()
    pruner.wait()
    assert order == ["gone"]


def test_pruning_that_finds_an_older_step_half_written_leaves_it_alone(tmp_path: Path):
    with CheckpointManager(tmp_path, keep=5) as ckpt:
        gates = gated(ckpt)
        ckpt.save(4, {"x": 4})  # the first one looks at the directory, too
        ckpt.wait()
        gates.looking.clear()
        ckpt.save(5, {"x": 5})
        ckpt._saver.await_commit()
        gates.publishing.clear()
        gates.reached.clear()
        ckpt.save(3, {"x": 3})
        assert gates.reached.wait(60)
        assert list((tmp_path / names.step_name(3)).rglob("*.safetensors"))
        gates.looking.set()
        ckpt._saver.await_pruning()
        gates.publishing.set()
    assert steps_in(tmp_path) == [3, 4, 5]
    state = {"x": 0}
    distckpt.load(tmp_path / names.step_name(3), state)
    assert state == {"x": 3}


def test_a_restore_in_the_middle_of_a_run_sees_what_was_in_flight(tmp_path: Path):
    with CheckpointManager(tmp_path, keep=1) as ckpt:
        gates = gated(ckpt)
        gates.writing.clear()
        ckpt.save(1, {"x": 1})
        assert gates.reached.wait(60)
        opener = opened_meanwhile(gates.writing)
        state = {"x": 0}
        assert ckpt.restore(state) == 1
        opener.join()
        ckpt.save(2, {"x": 2})
        ckpt.save(3, {"x": 3})
    assert steps_in(tmp_path) == [1, 3]  # the one that it resumed from stays


# --- a save finds one in flight ---


def test_a_save_that_finds_one_in_flight_can_be_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with CheckpointManager(tmp_path, when_busy="skip") as ckpt, caplog.at_level(logging.WARNING, logger="distckpt"):
        gates = gated(ckpt)
        gates.writing.clear()
        ckpt.save(1, {"x": 1})
        ckpt.save(2, {"x": 2})
        ckpt.save(3, {"x": 3})
        assert ckpt.num_skipped == 2
        assert caplog.messages == [
            f"save of step {step} skipped: the save of step 1 is still being written; {step - 1} skipped so far"
            for step in (2, 3)
        ]
        gates.writing.set()
        ckpt.wait()
        ckpt.save(4, {"x": 4})
    assert steps_in(tmp_path) == [1, 4]


def test_a_save_that_finds_one_in_flight_can_be_an_error(tmp_path: Path):
    with CheckpointManager(tmp_path, when_busy="raise") as ckpt:
        gates = gated(ckpt)
        gates.writing.clear()
        ckpt.save(1, {"x": 1})
        with pytest.raises(SaveInFlightError, match="save of step 2 refused: the save of step 1 is still") as raised:
            ckpt.save(2, {"x": 2})
        assert (raised.value.step, raised.value.in_flight) == (2, 1)
        assert 'when_busy="wait"' in str(raised.value.fix)
        gates.writing.set()
    assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize("when_busy", ["wait", "skip", "raise"])
def test_a_second_save_of_the_step_in_flight_is_neither_skipped_nor_an_error(tmp_path: Path, when_busy: Any):
    with CheckpointManager(tmp_path, when_busy=when_busy) as ckpt:
        gates = gated(ckpt)
        gates.writing.clear()
        ckpt.save(1, {"x": 1})
        opener = opened_meanwhile(gates.writing)
        ckpt.save(1, {"x": 2})
        opener.join()
        assert ckpt.num_skipped == 0
    assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("when_busy", ["wait", "skip", "raise"])
def test_the_last_save_waits_whatever_is_in_flight(tmp_path: Path, when_busy: Any, stopped: bool):
    with CheckpointManager(tmp_path, when_busy=when_busy) as ckpt:
        gates, opener = gated(ckpt), None
        gates.writing.clear()
        for step in ckpt.steps({"x": 1}, until=9 if stopped else 3):
            if step == 1:
                ckpt.save(1, {"x": 1})
            if step == 3:
                opener = opened_meanwhile(gates.writing)
                if stopped:
                    os.kill(os.getpid(), signal.SIGTERM)
        assert opener is not None
        opener.join()
        assert ckpt.preempted == stopped
    assert steps_in(tmp_path) == [1, 3]


@pytest.mark.parametrize("wrong", [{"when_busy": "never"}, {"mtbf_s": 0}, {"mtbf_s": float("inf")}, {"every": "10m"}])
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, wrong: dict):
    with pytest.raises(ConfigError):
        CheckpointManager(tmp_path, **wrong)


@pytest.mark.parametrize("when_busy", ["skip", "raise"])
def test_all_ranks_pass_over_the_save_that_one_of_them_is_too_slow_for(
    ranks: RankPools, tmp_path: Path, when_busy: str
):
    expected = {
        "skip": "1 skipped",
        "raise": "SaveInFlightError: save of step 2 refused: the save of step 1 is still being written\nFix: save less "
        'often, or let saves wait or be skipped: CheckpointManager(..., when_busy="wait")',
    }
    for told in ranks(2).run(jobs.refuse_beside_a_slow_rank, str(tmp_path), when_busy):
        assert told == ["0 skipped", expected[when_busy]]
    assert steps_in(tmp_path) == [1, 3]


@pytest.mark.parametrize("together", [True, False])
def test_ranks_that_save_as_fast_as_they_can_skip_the_same_saves(ranks: RankPools, tmp_path: Path, together: bool):
    options = {"every": 1, "when_busy": "skip", "keep": 2}
    first, second = ranks(2).run(jobs.run_steps, str(tmp_path), options, until=150, together=together, signalled={})
    assert first == second
    assert first["newest"] == first["done"] == first["saved"][-1] == 150
    assert first["skipped"] + len(first["saved"]) == 150


def test_ranks_that_save_without_a_pause_skip_the_same_saves(ranks: RankPools, tmp_path: Path):
    first, second = ranks(2).run(jobs.save_without_a_pause, str(tmp_path), num_saves=30)
    assert first == second
    assert len(first["saved"]) == 30
    assert first["skipped"] == first["saved"][-1] - 30


# --- when a save is due ---


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("every", ["0.001s", "auto", 7])
def test_all_ranks_save_the_same_steps_whatever_says_when(
    ranks: RankPools, tmp_path: Path, every: int | str, together: bool
):
    first, second = ranks(2).run(
        jobs.run_steps, str(tmp_path), {"every": every}, until=300, together=together, signalled={}
    )
    assert first == second
    assert first["saved"][-1] == first["newest"] == 300
    # A rank that waits for nobody may be at the end before the first announcement.
    assert len(first["saved"]) >= 2 or (every != 7 and not together)
    if every == 7:
        assert first["saved"] == [*range(7, 300, 7), 300]


@pytest.mark.parametrize("signalled", [{0: 41}, {1: 41}, {0: 41, 1: 44}])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("every", ["0.001s", 2, None])
def test_a_stop_and_a_save_that_come_together_are_one(
    ranks: RankPools, tmp_path: Path, every: int | str | None, together: bool, signalled: dict[int, int]
):
    first, second = ranks(2).run(
        jobs.run_steps, str(tmp_path), {"every": every}, until=200_000, together=together, signalled=signalled
    )
    assert first == second
    assert first["preempted"]
    assert first["newest"] == first["done"] == first["saved"][-1]
    if together:
        assert first["done"] in (41, 42, 43)


def test_only_rank_0s_clock_decides_but_any_ranks_save_in_flight_counts(ranks: RankPools):
    due = ranks(3).run(jobs.due_by_a_clock_of_each_ranks_own, 40)
    assert due == [[(12, True), (23, True), (34, True)]] * 3


def test_auto_in_one_process_saves_early_and_at_the_end(tmp_path: Path):
    recorder = Recorder()
    with CheckpointManager(tmp_path, every="auto") as ckpt:
        for step in ckpt.steps({"recorder": recorder}, until=50):
            recorder.step = step
    assert recorder.saved == [10, 50]


def test_the_line_of_a_save_names_what_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with CheckpointManager(tmp_path) as ckpt, caplog.at_level(logging.INFO, logger="distckpt"):
        ckpt.save(7, {"x": 1})
        ckpt.wait()
    [line] = [message for message in caplog.messages if message.startswith("saved")]
    number = r"\d+\.\d+"
    pattern = rf"saved step 7 to \S+: stall {number} s, {number} MB written in {number} s \(\d+ MB/s\)"
    assert re.fullmatch(pattern, line)


def test_a_job_that_has_lost_the_directory_deletes_nothing_more(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with CheckpointManager(tmp_path, keep=9) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, {"x": torch.ones(1)})
    asked: list[int] = []

    def insist() -> None:
        asked.append(len(asked))
        if len(asked) == 3:  # before the pruning, and before the first deletion, all is well
            raise DirectoryBusyError(path=str(tmp_path), host="elsewhere", pid=7, since=None, taken_over=True)

    pruner = Pruner(Retention(last=1), insist=insist)
    pruner.start(open_storage(tmp_path), PruneRequest(newest=3, resumed_from=None))
    pruner.wait()
    assert [c.step for c in CheckpointManager(tmp_path).checkpoints] == [2, 3]
    assert "could not prune" in caplog.text

"""How a run is left: with a last save, with the one in flight, or without; and what the directory says of it."""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import departure_jobs as jobs
import pytest
from in_flight_jobs import Recorder, gated
from rank_pool import RankPools

from distckpt import CheckpointManager
from distckpt.errors import ConfigError
from distckpt.leasefiles import standing
from distckpt.storage import open_storage


def outcome(directory: Path) -> tuple[str, int | None, str]:
    """Return how the latest job ended, at which step, and why."""
    found = standing(open_storage(directory))
    assert found is not None
    said = found.record.outcome
    return found.state, said and said.step, (said and said.reason) or ""


def steps_in(directory: Path) -> list[int]:
    return [checkpoint.step for checkpoint in CheckpointManager(directory).checkpoints]


def run(ckpt: CheckpointManager, *, until: int, asked_at: int, takes_s: float | None = None) -> Recorder:
    """Run a loop that gets a signal at a step; from then on a save is known to take so long."""
    recorder = Recorder()
    for step in ckpt.steps({"recorder": recorder}, until=until):
        recorder.step = step
        if step == asked_at:
            if takes_s is not None:
                jobs.let_saves_take(ckpt, takes_s)
            os.kill(os.getpid(), signal.SIGTERM)
    return recorder


def test_the_log_and_the_outcome_say_what_was_chosen_and_why(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with (
        caplog.at_level(logging.INFO, logger="distckpt"),
        CheckpointManager(tmp_path, background=False, every=4, grace_s=30) as ckpt,
    ):
        assert run(ckpt, until=50, asked_at=7, takes_s=2.0).step == 7
        assert ckpt.preempted
    assert steps_in(tmp_path) == [4, 7]
    state, step, reason = outcome(tmp_path)
    assert (state, step) == ("preempted", 7)
    [line] = [record.getMessage() for record in caplog.records if "asked to stop" in record.getMessage()]
    assert line == f"asked to stop: {reason}"
    assert line.startswith("asked to stop: SIGTERM, ")
    assert line.endswith("s left, a save takes 2.0 s: saving step 7")


def test_without_the_time_for_a_save_the_run_leaves_with_the_newest_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with CheckpointManager(tmp_path, every=4, grace_s=30, background=False) as ckpt:
        assert run(ckpt, until=50, asked_at=7, takes_s=60.0).step == 7
        assert ckpt.preempted
    assert steps_in(tmp_path) == [4]
    state, step, reason = outcome(tmp_path)
    assert (state, step) == ("preempted", 4)
    assert reason.endswith("a save takes 60.0 s: no time to save step 7; steps 5 to 7 will have to be done again")
    assert [record.levelname for record in caplog.records if "no time to save" in record.getMessage()] == ["WARNING"]
    with CheckpointManager(tmp_path, every=4) as ckpt:
        assert next(ckpt.steps({"recorder": Recorder()}, until=50)) == 5


def test_a_save_in_flight_is_finished_where_there_is_no_time_for_another(tmp_path: Path):
    said = []
    with CheckpointManager(tmp_path, every=4, grace_s=30) as ckpt:
        gates = gated(ckpt)
        gates.writing.clear()
        await_commit = ckpt._saver.await_commit

        def open_then_wait() -> None:
            said.append(outcome(tmp_path))  # what a launcher finds if the kill comes now
            gates.writing.set()
            await_commit()

        for step in ckpt.steps({"x": 1}, until=50):
            if step == 6:
                jobs.let_saves_take(ckpt, 40.0)
                ckpt._saver.await_commit = open_then_wait  # type: ignore[method-assign]
                os.kill(os.getpid(), signal.SIGTERM)
        assert step == 6
    assert steps_in(tmp_path) == [4]
    state, step, reason = said[0]
    assert (state, step) == ("preempted", None)
    assert "that of step 4 began " in reason
    assert reason.endswith(": finishing the save of step 4; steps 5 to 6 only if time is left then")
    state, step, reason = outcome(tmp_path)
    assert (state, step) == ("preempted", 4)
    assert reason.endswith(": no time to save step 6; steps 5 to 6 will have to be done again")


def test_a_save_in_flight_that_ends_sooner_than_expected_leaves_time_for_another(tmp_path: Path):
    with CheckpointManager(tmp_path, every=4, grace_s=30) as ckpt:
        ckpt._pace.save_committed(stall_s=0.0, durable_s=25.0)  # one strange one; the usual ones take no time
        assert run(ckpt, until=50, asked_at=6).step == 6
    assert steps_in(tmp_path)[-1] == 6
    assert outcome(tmp_path)[:2] == ("preempted", 6)


def test_a_save_that_failed_before_does_not_keep_the_last_one_from_being_made(ranks: RankPools, tmp_path: Path):
    outcomes = ranks(2).run(jobs.be_asked_while_a_save_fails, str(tmp_path), failing=1)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["preempted"]
    assert outcomes[0]["newest"] == outcomes[0]["step"]
    assert outcome(tmp_path)[:2] == ("preempted", outcomes[0]["step"])


def test_a_last_save_that_fails_is_a_failure(tmp_path: Path):
    def put(*_: Any, **__: Any) -> int:
        raise OSError(28, "made by a test")

    def fail_at_the_end() -> None:
        with CheckpointManager(tmp_path, every=4) as ckpt:
            gates = gated(ckpt)
            for step in ckpt.steps({"x": 1}, until=50):
                if step == 6:
                    ckpt.wait()
                    gates.put = put  # type: ignore[method-assign]
                    os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(OSError, match="made by a test"):
        fail_at_the_end()
    state, step, reason = outcome(tmp_path)
    assert (state, step) == ("failed", 4)
    assert "made by a test" in reason


@pytest.mark.parametrize("restored", [0, 4])
def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path: Path, restored: int):
    if restored:
        with CheckpointManager(tmp_path, every=2) as ckpt:
            list(ckpt.steps({"x": 1}, until=restored))
    with CheckpointManager(tmp_path, every=2) as ckpt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(ckpt.steps({"x": 1}, until=9)) == []
        assert ckpt.preempted
    state, step, reason = outcome(tmp_path)
    assert (state, step) == ("preempted", restored or None)
    assert reason.endswith("step 4 is saved" if restored else "no step is done, so there is nothing to save")
    assert steps_in(tmp_path) == ([2, 4] if restored else [])


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_on_one_rank_before_the_first_step_ends_all(ranks: RankPools, tmp_path: Path, signalled: int):
    expected = {"done": 0, "preempted": True, "restored": 0}
    assert ranks(2).run(jobs.be_asked_before_the_first_step, str(tmp_path), signalled=signalled) == [expected] * 2
    assert outcome(tmp_path)[0] == "preempted"
    ranks(2).run(jobs.run_to, str(tmp_path), until=4)
    expected |= {"restored": 4}
    assert ranks(2).run(jobs.be_asked_before_the_first_step, str(tmp_path), signalled=signalled) == [expected] * 2
    assert outcome(tmp_path)[:2] == ("preempted", 4)


def test_a_signal_in_the_last_step_leaves_a_run_that_is_complete(tmp_path: Path):
    with CheckpointManager(tmp_path, every=4) as ckpt:
        assert run(ckpt, until=6, asked_at=6).step == 6
        assert not ckpt.preempted
    assert steps_in(tmp_path) == [4, 6]
    assert outcome(tmp_path)[:2] == ("complete", 6)


def test_a_run_stops_by_itself_before_its_allocation_ends(tmp_path: Path):
    recorder = Recorder()
    with CheckpointManager(tmp_path, every=100, ends_at=time.time() + 3600) as ckpt:
        for step in ckpt.steps({"recorder": recorder}, until=50):
            recorder.step = step
            if (
                step == 7
            ):  # from here on a save is known to take 20 minutes: with the one in flight, too long for the rest
                ckpt._pace.save_committed(stall_s=0.0, durable_s=1200.0)
        assert ckpt.preempted
    assert (recorder.step, steps_in(tmp_path)) == (7, [7])
    state, step, reason = outcome(tmp_path)
    assert (state, step) == ("preempted", 7)
    expected = "the end of the allocation is near, # s ago on rank 0; # s left, a save takes # s: saving step 7"
    assert re.sub(r"\d+\.\d", "#", reason) == expected


def test_the_end_that_slurm_tells_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 30))
    with CheckpointManager(tmp_path, every=100) as ckpt:
        assert list(ckpt.steps({"x": 1}, until=50)) == []  # a minute is kept for a first save
        assert ckpt.preempted
    with CheckpointManager(tmp_path, every=100, ends_at=time.time() + 1e6) as ckpt:
        assert list(ckpt.steps({"x": 1}, until=3)) == [1, 2, 3]


def test_what_a_save_took_in_the_run_before_counts_until_one_was_made(tmp_path: Path):
    with CheckpointManager(tmp_path, every=2) as ckpt:
        list(ckpt.steps({"x": 1}, until=2))
        assert ckpt._pace.usual_durable_s is not None
    with CheckpointManager(tmp_path, every=2) as ckpt:
        assert ckpt._pace.usual_durable_s is None
        ckpt.restore({"x": 1})
        timings = ckpt.checkpoints and ckpt._pace.usual_durable_s
        assert timings is not None
        assert timings == ckpt._pace.slow_durable_s > 0


@pytest.mark.parametrize("graces", [[600.0, 20.0], [20.0, 600.0]])
def test_the_least_time_of_all_ranks_decides(ranks: RankPools, tmp_path: Path, graces: list[float]):
    much, little = tmp_path / "much", tmp_path / "little"
    for outcome_of_rank in ranks(2).run(
        jobs.leave_with_little_time_on_one_rank, str(little), graces=graces, takes_s=25.0
    ):
        assert outcome_of_rank == {
            "done": outcome_of_rank["done"],
            "newest": 4,
            "preempted": True,
            "saved": [4],
        }
        assert outcome_of_rank["done"] in (5, 6)
    for outcome_of_rank in ranks(2).run(jobs.leave_with_little_time_on_one_rank, str(much), graces=graces, takes_s=5.0):
        assert outcome_of_rank["newest"] == outcome_of_rank["done"]


@pytest.mark.parametrize("signalled", [0, 1])
def test_every_rank_sees_between_two_steps_that_one_was_asked(ranks: RankPools, tmp_path: Path, signalled: int):
    assert (
        ranks(2).run(jobs.see_a_stop_between_two_steps, str(tmp_path), signalled=signalled) == [[False, True, True]] * 2
    )


@pytest.mark.parametrize(("every", "at"), [(100, 5), (5, 5), (1, 5)])
def test_ranks_may_agree_on_a_stop_by_themselves(ranks: RankPools, tmp_path: Path, every: int, at: int):
    expected = {"step": at, "newest": at, "preempted": True}
    assert ranks(2).run(jobs.stop_where_all_have_agreed, str(tmp_path), every=every, at=at) == [expected] * 2
    assert outcome(tmp_path)[:2] == ("preempted", at)
    assert "by the training itself" in outcome(tmp_path)[2]


# --- SIGUSR1 ---


def test_sigusr1_asks_for_a_stop_and_calls_a_users_own_handler(tmp_path: Path):
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with CheckpointManager(tmp_path) as ckpt:
            for step in ckpt.steps({"x": 1}, until=9):
                if step == 3:
                    os.kill(os.getpid(), signal.SIGUSR1)
            assert ckpt.preempted
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (heard, steps_in(tmp_path)) == ([signal.SIGUSR1], [3])


def test_sigusr1_is_left_to_faulthandler(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # a manager of a test before may never have been closed
    with (tmp_path / "stacks.txt").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
        try:
            with (
                caplog.at_level(logging.INFO, logger="distckpt"),
                CheckpointManager(tmp_path / "run", every=2) as ckpt,
            ):
                for step in ckpt.steps({"x": 1}, until=6):
                    if step == 3:
                        os.kill(os.getpid(), signal.SIGUSR1)
                assert not ckpt.preempted
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            faulthandler.unregister(signal.SIGUSR1)
    assert "SIGUSR1 is left alone" in caplog.text
    assert (tmp_path / "stacks.txt").read_text().count("most recent call first") == 2


def test_a_handler_that_came_later_stays_when_the_manager_is_closed(tmp_path: Path):
    before = signal.getsignal(signal.SIGUSR1)
    heard: list[int] = []

    def later(number: int, _: object) -> None:
        heard.append(number)

    try:
        with CheckpointManager(tmp_path) as ckpt:
            ckpt.save(1, {"x": 1})
            signal.signal(signal.SIGUSR1, later)
        assert signal.getsignal(signal.SIGUSR1) is later
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("settings", [{"grace_s": 0.0}, {"grace_s": -1.0}, {"ends_at": float("inf")}, {"ends_at": 0.0}])
def test_a_time_that_is_none_is_refused(tmp_path: Path, settings: dict[str, float]):
    [name] = settings
    with pytest.raises(ConfigError, match=f"CheckpointManager: {name} must be above 0"):
        CheckpointManager(tmp_path, **settings)

"""A manager in one process: its verbs, its settings, and what it refuses."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path

import jobs
import pytest
import torch

import distckpt
from distckpt import CheckpointManager
from distckpt.errors import CheckpointExistsError, CheckpointNotFoundError, ConfigError, StorageError, UsageError


def steps_in(directory: Path) -> list[int]:
    return [checkpoint.step for checkpoint in CheckpointManager(directory).checkpoints]


def test_three_lines_give_saves_when_due_and_at_the_end(tmp_path: Path):
    state = jobs.build()
    with CheckpointManager(tmp_path, every=3, keep=2) as ckpt:
        done = [step for step in ckpt.steps(state, until=8) if jobs.train(state, 1) is None]
        assert not ckpt.preempted
    assert done == [*range(1, 9)]
    assert steps_in(tmp_path) == [6, 8]


def test_a_second_start_goes_on_and_a_finished_run_has_nothing_to_do(tmp_path: Path):
    for until, expected in ((4, [1, 2, 3, 4]), (6, [5, 6]), (6, [])):
        with CheckpointManager(tmp_path, every=4) as ckpt:
            assert [*ckpt.steps(jobs.build(), until=until)] == expected


def test_a_constructor_touches_neither_storage_nor_signals(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    CheckpointManager(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_explicit_verbs_do_the_same(tmp_path: Path):
    state = jobs.build()
    ckpt = CheckpointManager(tmp_path, every=2)
    done = ckpt.restore(state)
    for step in range(done + 1, 6):
        jobs.train(state, 1)
        assert not ckpt.step(step, state, metrics={"loss": 1 / step})
    ckpt.close()
    assert steps_in(tmp_path) == [2, 4]
    assert CheckpointManager(tmp_path).checkpoints[0].metrics == {"loss": 0.5}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_ends_the_loop(tmp_path: Path, number: signal.Signals):
    state = jobs.build()
    before = signal.getsignal(number)
    done = []
    with CheckpointManager(tmp_path, every=100) as ckpt:
        for step in ckpt.steps(state, until=50):
            if step == 7:
                os.kill(os.getpid(), number)
            done.append(step)
        assert ckpt.preempted
    assert done == [*range(1, 8)]
    assert steps_in(tmp_path) == [7]
    assert signal.getsignal(number) is before
    with CheckpointManager(tmp_path) as ckpt:
        assert next(ckpt.steps(jobs.build(), until=50)) == 8


def test_a_users_own_handler_is_called_too(tmp_path: Path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with CheckpointManager(tmp_path) as ckpt:
            for _ in ckpt.steps({"x": 1}, until=3):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_outside_the_main_thread_signals_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def run() -> None:
        with CheckpointManager(tmp_path) as ckpt, caplog.at_level(logging.WARNING, logger="distckpt"):
            ckpt.save(1, {"x": 1})

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "signals are not handled" in caplog.text
    assert steps_in(tmp_path) == [1]


def test_the_same_step_is_saved_once(tmp_path: Path):
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, {"x": 1})
        ckpt.save(1, {"x": 2})
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.restore({"x": 0}) == 1
        ckpt.save(1, {"x": 3})
    state = {"x": 0}
    distckpt.load(tmp_path, state)
    assert state["x"] == 1


def test_a_step_that_another_job_committed_is_refused(tmp_path: Path):
    with CheckpointManager(tmp_path, background=False) as ckpt:
        ckpt.save(1, {"x": 1})
    with CheckpointManager(tmp_path, background=False) as ckpt, pytest.raises(CheckpointExistsError, match="run "):
        ckpt.save(1, {"x": 2})


def test_a_restart_keeps_the_runs_name_and_names_the_parent(tmp_path: Path):
    for step in (1, 2):
        with CheckpointManager(tmp_path, config={"lr": 0.1}) as ckpt:
            ckpt.restore({"x": 0})
            ckpt.save(step, {"x": step})
    first, second = CheckpointManager(tmp_path).checkpoints
    assert first.run == second.run
    assert second.config == {"lr": 0.1}
    _, manifest = distckpt.catalog.locate(distckpt.storage.open_storage(tmp_path))
    assert manifest.parent == {"step": 1, "attempt": first.attempt}


def test_an_older_step_can_be_asked_for(tmp_path: Path):
    with CheckpointManager(tmp_path) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, {"x": step})
    state = {"x": 0}
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.restore(state, step=2) == 2
        assert state["x"] == 2
        with pytest.raises(CheckpointNotFoundError):
            ckpt.restore(state, step=9)


def test_an_error_in_the_loop_is_not_hidden_and_the_save_in_flight_is_committed(tmp_path: Path):
    def train() -> None:
        with CheckpointManager(tmp_path, every=1) as ckpt:
            for step in ckpt.steps(jobs.build(), until=9):
                if step == 3:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": 0},
        {"every": True},
        {"every": "10"},
        {"every": "soon"},
        {"keep": 0},
        {"layout": "round"},
        {"timeout_s": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(tmp_path: Path, wrong: dict):
    with pytest.raises(ConfigError):
        CheckpointManager(tmp_path, **wrong)


def test_calls_that_make_no_sense_are_refused(tmp_path: Path):
    ckpt = CheckpointManager(tmp_path)
    with pytest.raises(UsageError, match="step must be an int"):
        ckpt.save(1.5, {})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="metric 'loss' is 'low'"):
        ckpt.save(1, {"x": 1}, metrics={"loss": "low"})  # type: ignore[dict-item]
    ckpt.close()
    with pytest.raises(UsageError, match="closed"):
        ckpt.save(1, {"x": 1})


def test_prewarming_tells_the_bytes_of_the_share_and_writes_nothing(tmp_path: Path):
    state = jobs.build()
    jobs.train(state, 1)
    with CheckpointManager(tmp_path / "run") as ckpt:
        num_bytes = ckpt.prewarm(state)
        assert not (tmp_path / "run").exists()
        ckpt.save(1, state)
        ckpt.wait()
        [saved] = ckpt.checkpoints
        assert 0 <= saved.num_bytes - num_bytes < 32_768  # with or without the headers of the data files
        assert ckpt.prewarm(state) == num_bytes


@pytest.mark.parametrize("background", [True, False])
def test_prewarming_starts_the_thread_that_will_write(tmp_path: Path, *, background: bool):
    before = set(threading.enumerate())
    with CheckpointManager(tmp_path / "run", background=background) as ckpt:
        ckpt.prewarm({"x": torch.ones(3)})
        started = [thread.name for thread in threading.enumerate() if thread not in before]
        assert [name.startswith("distckpt-write") for name in started] == [True] * background
        ckpt.save(1, {"x": torch.ones(3)})


def test_a_file_in_the_directorys_place_is_one_clear_error(tmp_path: Path):
    (tmp_path / "run").write_text("in the way")
    with CheckpointManager(tmp_path / "run", background=False) as ckpt:
        with pytest.raises(StorageError, match="run"):
            ckpt.restore({"x": 1})
        with pytest.raises(StorageError, match="run"):
            ckpt.save(1, {"x": 1})

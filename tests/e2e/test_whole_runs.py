"""The whole of it, as a user runs it: training jobs that are killed, stopped and moved end as if undisturbed."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
import resume_jobs
from forked_ranks import ForkedRanks
from training_job import END_TIMEOUT_S, ROOT, TrainingJob, distckpt, last_step, logged, train

from distckpt.logfolder import EVENTS_NAME

TOTAL = 4 * 45  # epochs by steps of an epoch
COMMON = ["--seed=3", "--train.epochs=4", "--train.global_batch_size=32", "--train.log_every=1", "--checkpoint.every=7"]


def settings(directory: Path | str, *more: str) -> list[str]:
    return [*COMMON, f"--checkpoint.directory={directory}", *more]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once without any disturbance and return the run's directory."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(settings(folder / "run"), folder)
    return folder / "run"


def assert_same_end(run: Path | str, undisturbed: Path, log: Path | None = None) -> None:
    """Compare the logs, line by line, and the newest checkpoints, entry by entry."""
    assert logged(log or Path(run)) == logged(undisturbed)
    diff = distckpt("diff", str(run), str(undisturbed))
    assert diff.returncode == 0, diff.stdout + diff.stderr


def kill_at(step: int, run_settings: list[str], folder: Path, log: Path, *, later_s: float = 0.0) -> None:
    """Train on, and kill the whole job as soon as its log has the step, or a moment later."""
    with TrainingJob(run_settings, folder) as job:
        job.wait_until(lambda: last_step(log) >= step)
        time.sleep(later_s)  # anywhere between two steps, and in the middle of a save
        job.kill()
    assert last_step(log) < TOTAL, "killed too late to show anything"


def test_an_undisturbed_run_learns_and_keeps_what_it_should(undisturbed: Path) -> None:
    lines = logged(undisturbed)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, TOTAL + 1))
    assert lines[-1]["val/top1"] > 0.9
    assert distckpt("verify", str(undisturbed)).returncode == 0
    assert len(list(undisturbed.glob("step-*"))) == 3


@pytest.mark.parametrize("layout", ["sharded", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_that_is_killed_twice_ends_as_if_nothing_had_happened(
    undisturbed: Path, tmp_path: Path, layout: str
) -> None:
    run = tmp_path / "run"
    mine = settings(run, f"--checkpoint.layout={layout}")
    kill_at(20, mine, tmp_path, run)
    kill_at(90, mine, tmp_path, run)
    train(mine, tmp_path)
    assert_same_end(run, undisturbed)


def kill_and_go_on(mine: list[str], run: Path, moment: random.Random) -> int:
    """Train to the end, killed again and again at any moment; return how often."""
    for num_kills in itertools.count():
        step = last_step(run) + moment.randrange(1, TOTAL // 3)
        with ForkedRanks(2, run.parent / f"leg-{num_kills}", resume_jobs.train, mine, joins=False) as ranks:
            if step < TOTAL - 3 and ranks.wait_until(partial(has_come_to, run, step), timeout_s=END_TIMEOUT_S):
                time.sleep(moment.uniform(0, 0.05))  # anywhere between two steps, and in the middle of a save
                ranks.kill()
                continue
            hung = ranks.join((0, 1), timeout_s=END_TIMEOUT_S)
            assert not hung, ranks.log(0)
            assert [ranks.told(rank)[-1]["complete"] for rank in (0, 1)] == [True, True], ranks.log(0)
            return num_kills
    raise AssertionError("unreachable")


def has_come_to(run: Path, step: int) -> bool:
    return last_step(run) >= step


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("layout", ["sharded", "full"])
def test_fifty_kills_at_any_moment_change_nothing(undisturbed: Path, tmp_path: Path, layout: str) -> None:
    """Each resume has to be exact, or a later line of the log, or the end, would not be."""
    num_kills = 0
    for number in itertools.count():
        run = tmp_path / str(number) / "run"
        mine = settings(run, f"--checkpoint.layout={layout}")
        num_kills += kill_and_go_on(mine, run, random.Random(f"{layout} {number}"))
        assert_same_end(run, undisturbed)
        if num_kills >= 50:
            break
    print(f"{layout}: {num_kills} kills in {number + 1} runs, each resumed from; every end was the same")


def test_sigterm_in_the_middle_of_an_epoch_saves_that_step_and_ends_cleanly(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with TrainingJob(settings(run), tmp_path) as job:
        job.wait_until(lambda: last_step(run) >= 50)
        said = job.terminate()
    stopped = last_step(run)
    assert 50 <= stopped < TOTAL
    assert f"preempted: saved step {stopped}" in said
    assert (run / f"step-{stopped:012d}" / "manifest.json").exists()
    said_of_it = json.loads(distckpt("ls", str(run), "--json").stdout)["outcome"]
    assert (said_of_it["state"], said_of_it["step"]) == ("preempted", stopped)
    assert "SIGTERM" in said_of_it["reason"]
    assert "s left, a save takes" in said_of_it["reason"], "torchrun's grace is known"
    train(settings(run), tmp_path)
    assert_same_end(run, undisturbed)


def test_a_finished_run_says_so_and_changes_nothing(undisturbed: Path) -> None:
    def files() -> dict[Path, int]:
        """All but what is the history of its jobs."""
        found = [path for path in undisturbed.rglob("*") if path.is_file() and path.parent.name != "lease"]
        return {path: path.stat().st_mtime_ns for path in found if path.name != EVENTS_NAME}

    before = files()
    said = train(settings(undisturbed), undisturbed.parent)
    assert f"complete: all {TOTAL} steps" in said
    assert files() == before


def test_a_finished_run_goes_on_when_more_epochs_are_asked_for(undisturbed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    said = train([*settings(run), "--train.epochs=5"], tmp_path)
    assert f"complete: step {TOTAL // 4 * 5}" in said
    assert logged(run)[: len(logged(undisturbed))] == logged(undisturbed)
    assert last_step(run) == TOTAL // 4 * 5


def test_a_run_moves_to_other_numbers_of_ranks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_at(20, settings(run), tmp_path, run)
    with TrainingJob(settings(run), tmp_path, num_ranks=3) as job:
        job.wait_until(lambda: last_step(run) >= 60)
        job.kill()
    said = train(settings(run), tmp_path, num_ranks=1)
    assert "complete" in said
    steps = [line["step"] for line in logged(run) if line["kind"] == "train"]
    assert steps == list(range(1, TOTAL + 1))
    assert logged(run)[-1]["val/top1"] > 0.9


def test_a_run_on_s3_is_killed_and_ends_as_if_nothing_had_happened(
    undisturbed: Path, tmp_path: Path, s3_bucket: str
) -> None:
    url = f"s3://{s3_bucket}/runs/digits"
    mine = settings(url, f"--train.log_dir={tmp_path / 'log'}")
    kill_at(60, mine, tmp_path, tmp_path / "log")
    train(mine, tmp_path)
    assert_same_end(url, undisturbed, log=tmp_path / "log")
    listed = distckpt("ls", url)
    assert listed.returncode == 0, listed.stderr
    assert str(TOTAL) in listed.stdout
    assert distckpt("verify", url).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_kill_at_any_moment_changes_nothing_on_s3(undisturbed: Path, tmp_path: Path, s3_bucket: str) -> None:
    for attempt in range(20):
        url, folder = f"s3://{s3_bucket}/runs/{attempt}", tmp_path / str(attempt)
        mine = settings(url, f"--train.log_dir={folder / 'log'}")
        moment = random.Random(attempt)
        kill_at(moment.randrange(1, TOTAL // 2), mine, folder, folder / "log", later_s=moment.uniform(0, 0.5))
        train(mine, folder)
        assert_same_end(url, undisturbed, log=folder / "log")


def test_what_ddp_saved_loads_in_a_plain_script(undisturbed: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            import torch
            import distckpt
            from distckpt.trainer.models import LeNet

            model = LeNet(num_classes=10)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
            state = {"model": model, "optimizer": optimizer}
            checkpoint = distckpt.load(sys.argv[1], state, only=["model.*", "optimizer.*"])
            assert checkpoint.world_size == 2
            assert all("momentum_buffer" in slot for slot in optimizer.state.values())
            assert len(optimizer.state) == len(list(model.parameters()))
            print("step", checkpoint.step)
        """)
    )
    newest = max(undisturbed.glob("step-*"))
    run = subprocess.run(
        [sys.executable, str(script), str(newest)],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"step {TOTAL}\n"

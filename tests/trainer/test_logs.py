from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from distckpt.errors import StorageError
from distckpt.logfolder import LOG_NAME, log_folder
from distckpt.trainer.logs import RunLog, find_evaluation


def write(folder: Path, *, done: int, to: int) -> None:
    """Log the steps after `done` ones, as a run does that is then killed: nothing is closed in time but the files."""
    with RunLog(folder, done=done) as log:
        for step in range(done + 1, to + 1):
            log.write("train", step=step, values={"loss": step / 3, "lr": 0.1}, board_only={"rate": 5.0})
            if step % 2 == 0:
                log.write("eval", step=step, values={"epoch": step // 2, "val/top1": step / 7})


def lines(folder: Path) -> list[str]:
    return (folder / LOG_NAME).read_text().splitlines()


def board(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.parametrize("restored", [0, 3, 4, 6])
def test_a_resumed_log_is_the_log_of_an_undisturbed_run(
    tmp_path: Path, restored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorBoard reads files of one second and process in the order of a number's digits: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))
    write(tmp_path / "whole", done=0, to=9)
    write(tmp_path / "resumed", done=0, to=6)
    write(tmp_path / "resumed", done=restored, to=9)
    assert lines(tmp_path / "resumed") == lines(tmp_path / "whole")
    for tag in ("train/loss", "train/rate", "val/top1"):
        assert board(tmp_path / "resumed", tag) == board(tmp_path / "whole", tag)
    assert [step for step, _ in board(tmp_path / "resumed", "train/loss")] == list(range(1, 10))


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    write(tmp_path, done=0, to=3)
    whole = lines(tmp_path)
    with (tmp_path / LOG_NAME).open("a") as file:
        file.write('{"kind": "train", "step": 3, "lo')
    with RunLog(tmp_path, done=3):
        assert lines(tmp_path) == whole


def test_numbers_keep_every_digit_and_what_is_no_number_is_null(tmp_path: Path) -> None:
    with RunLog(tmp_path, done=0) as log:
        log.write("train", step=1, values={"loss": 0.1 + 0.2, "grad_norm": float("inf")})
        line = json.loads(lines(tmp_path)[0])  # whoever follows the run sees it at once
    assert line == {"kind": "train", "step": 1, "loss": 0.30000000000000004, "grad_norm": None}


@pytest.mark.parametrize(
    ("log_dir", "directory", "folder"),
    [
        (None, "runs/digits", "runs/digits"),
        (None, "file:///data/run", "/data/run"),
        (None, "s3://bucket/a/run-7/", "runs/run-7"),
        (None, "s3://bucket", "runs/bucket"),
        ("logs", "s3://bucket/run-7", "logs"),
    ],
)
def test_logs_lie_with_local_checkpoints_or_under_runs(log_dir: str | None, directory: str, folder: str) -> None:
    assert log_folder(log_dir, directory) == Path(folder)


@pytest.mark.parametrize(("log_dir", "folder"), [(None, "runs/digits"), ("logs", "logs")])
def test_a_branch_has_a_log_of_its_own(log_dir: str | None, folder: str) -> None:
    assert log_folder(log_dir, "runs/digits", branch="wide") == Path(folder) / "branches/wide"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"could not write .*log\.jsonl.*\nFix: .*--train\.log_dir DIR"):
        RunLog(tmp_path / "file" / "folder", done=0)


def test_the_figures_of_an_evaluation_are_found_by_its_step(tmp_path: Path) -> None:
    assert find_evaluation(tmp_path, 2) is None
    write(tmp_path, done=0, to=5)
    with (tmp_path / LOG_NAME).open("a") as log:
        log.write('{"kind": "eval", "step": 6, "val/to')
    assert [find_evaluation(tmp_path, step) for step in (2, 3, 4, 6)] == [
        {"val/top1": 2 / 7},
        None,
        {"val/top1": 4 / 7},
        None,
    ]

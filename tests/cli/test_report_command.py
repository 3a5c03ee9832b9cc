"""`distckpt report` writes one page, of any run, from whatever tells of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distckpt.logfolder import LOG_NAME
from distckpt.storage import open_storage

Command = Callable[..., Any]
LINES = "".join(json.dumps({"kind": "train", "step": step, "loss": 1 / step}) + "\n" for step in range(1, 31))


def test_a_run_becomes_a_page_named_after_it(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command("report", run)
    assert (result.exit_code, result.stdout) == (0, "report-run-7.html\n")
    assert "--log-dir" in result.stderr
    page = (tmp_path / "report-run-7.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<h1>run-7</h1>" in page
    assert [file.name for file in tmp_path.glob("*report*")] == ["report-run-7.html"]


def test_the_logs_beside_a_run_are_read(command: Command, run: Path, tmp_path: Path) -> None:
    (run / LOG_NAME).write_text(LINES)
    answer = json.loads(command("report", run, "-o", tmp_path / "page.html", "--json").stdout)
    assert answer == {
        "url": str(run),
        "report": str(tmp_path / "page.html"),
        "bytes": (tmp_path / "page.html").stat().st_size,
        "logs": str(run),
        "state": "complete",
        "step": 30,
        "jobs": 1,
        "saves": 3,
        "checkpoints": 3,
    }
    assert "<h3>Loss</h3>" in (tmp_path / "page.html").read_text()


def test_a_page_goes_to_stdout_if_asked(command: Command, run: Path) -> None:
    result = command("report", run, "-o", "-")
    assert (result.exit_code, result.stdout[:15], result.stderr) == (0, "<!doctype html>", "")
    assert command("report", run, "-o", "-", "--json").exit_code == 2


def test_a_run_on_s3_has_its_logs_elsewhere(
    command: Command, run: Path, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"s3://{s3_bucket}/far/run-9"
    assert command("cp", run, url).exit_code == 0
    answer = json.loads(command("report", url, "--json").stdout)
    assert (answer["logs"], answer["checkpoints"], answer["report"]) == (None, 3, "report-run-9.html")
    for folder, options in (("runs/run-9", []), ("elsewhere", ["--log-dir", "elsewhere"])):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / LOG_NAME).write_text(LINES)
        assert json.loads(command("report", url, "--json", *options).stdout)["logs"] == folder


def test_one_checkpoint_has_a_page_too(command: Command, run: Path, tmp_path: Path) -> None:
    answer = json.loads(command("report", run / "step-000000000020", "-o", tmp_path / "page.html", "--json").stdout)
    assert (answer["step"], answer["checkpoints"]) == (20, 1)


def test_where_nothing_is_there_is_no_page(command: Command, tmp_path: Path) -> None:
    assert command("report", tmp_path, "-o", tmp_path / "page.html").exit_code == 3
    assert not (tmp_path / "page.html").exists()
    (tmp_path / LOG_NAME).write_text(LINES)
    assert command("report", tmp_path, "-o", tmp_path / "page.html").exit_code == 0


def test_a_page_that_cannot_be_written_leaves_the_old_one(command: Command, run: Path, tmp_path: Path) -> None:
    result = command("report", run, "-o", tmp_path / "nowhere" / "page.html")
    assert result.exit_code == 4
    assert "-o FILE" in result.stderr
    (tmp_path / "page.html").mkdir()
    assert command("report", run, "-o", tmp_path / "page.html").exit_code == 4
    assert list(tmp_path.glob(".page*")) == []


def test_the_run_is_left_as_it_was(command: Command, run: Path, tmp_path: Path) -> None:
    before = open_storage(run).list()
    assert command("report", run, "-o", tmp_path / "page.html").exit_code == 0
    assert open_storage(run).list() == before


def test_a_report_needs_neither_torch_nor_numpy(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from distckpt.cli.application import application\n"
        "try: application(sys.argv[1:])\n"
        "except SystemExit as leaving: assert not leaving.code\n"
        "assert not {'torch', 'numpy', 's3fs'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, "report", str(run), "-o", str(tmp_path / "page.html")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr.count("Error")) == (0, 0), result.stderr


def test_a_damaged_checkpoint_is_shown_as_one(command: Command, run: Path, tmp_path: Path) -> None:
    (run / "step-000000000020" / "manifest.json").write_text("{}")
    shutil.rmtree(run / "lease")
    answer = json.loads(command("report", run, "-o", tmp_path / "page.html", "--json").stdout)
    assert (answer["state"], answer["checkpoints"]) == ("unknown", 2)
    assert "status damaged" in (tmp_path / "page.html").read_text()

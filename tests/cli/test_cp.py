"""`distckpt cp` copies checkpoints between places, and says what it did."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distckpt import catalog
from distckpt.storage import open_storage

Command = Callable[..., Any]


def steps(url: object) -> list[int]:
    return [folder.step for folder in catalog.scan(open_storage(str(url))) if folder.committed]


def test_a_run_is_copied_newest_first_and_once(command: Command, run: Path, tmp_path: Path) -> None:
    result = command("cp", run, tmp_path / "copy")
    assert result.exit_code == 0
    assert result.stdout.split() == [str(tmp_path / "copy" / f"step-{step:012d}") for step in (30, 20, 10)]
    assert "3 of 3 checkpoints" in result.stderr
    assert command("diff", run, tmp_path / "copy").exit_code == 0
    again = command("cp", run, tmp_path / "copy", "--json")
    answer = json.loads(again.stdout)
    assert answer.keys() == {"source", "target", "bytes", "reused_bytes", "seconds", "checkpoints"}
    assert answer["bytes"] == 0
    assert [one["action"] for one in answer["checkpoints"]] == ["present"] * 3
    assert answer["checkpoints"][0].keys() == {"step", "path", "action", "bytes", "reused_bytes", "problem"}


def test_some_of_a_run_or_one_folder_are_copied(command: Command, run: Path, tmp_path: Path) -> None:
    assert command("cp", run, tmp_path / "a", "--last", 2).exit_code == 0
    assert steps(tmp_path / "a") == [20, 30]
    assert command("cp", run, tmp_path / "b", "--step", 10).exit_code == 0
    assert steps(tmp_path / "b") == [10]
    assert command("cp", run / "step-000000000020", tmp_path / "c").exit_code == 0
    assert steps(tmp_path / "c") == [20]
    assert command("cp", run, tmp_path / "d" / "step-000000000030", "--last", 1).exit_code == 0
    assert steps(tmp_path / "d") == [30]


def test_a_pinned_checkpoint_stays_pinned(command: Command, run: Path, tmp_path: Path) -> None:
    command("pin", run, "--step", 10)
    command("cp", run, tmp_path / "copy")
    assert [folder.step for folder in catalog.scan(open_storage(tmp_path / "copy")) if folder.pinned] == [10]


def test_a_damaged_one_is_left_out_and_the_others_are_copied(command: Command, run: Path, tmp_path: Path) -> None:
    (data,) = (run / "step-000000000020").glob("*/*.safetensors")
    body = bytearray(data.read_bytes())
    body[-1] ^= 1
    data.write_bytes(body)
    result = command("cp", run, tmp_path / "copy", "--json")
    assert result.exit_code == 5
    assert [one["action"] for one in json.loads(result.stdout)["checkpoints"]] == ["copied", "damaged", "copied"]
    assert "step 20 is damaged and was left out" in result.stderr
    assert steps(tmp_path / "copy") == [10, 30]


def test_another_checkpoint_of_the_step_is_an_error_of_its_own(
    command: Command, run: Path, made_run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run / "step-000000000010", other / "step-000000000010")
    command("export", run, tmp_path / "x.safetensors", "--format", "safetensors", "--step", 10)
    assert command("import", tmp_path / "x.safetensors", tmp_path / "target").exit_code == 0
    result = command("cp", other, tmp_path / "target")
    assert result.exit_code == 6
    assert "exists already" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--step", 40], 3, "committed are 10, 20, 30"),
        (["--step", 10, "--last", 1], 2, "exclude each other"),
        (["--last", 0], 2, "--last"),
    ],
)
def test_wrong_usage_and_missing_things_are_told(
    command: Command, run: Path, tmp_path: Path, options: list[Any], code: int, said: str
) -> None:
    result = command("cp", run, tmp_path / "copy", *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert not (tmp_path / "copy").exists()


def test_nonsense_is_refused(command: Command, run: Path, tmp_path: Path) -> None:
    assert command("cp", run, run).exit_code == 2
    assert command("cp", run, tmp_path / "step-000000000030").exit_code == 2
    assert command("cp", run, tmp_path / "step-000000000031", "--step", 30).exit_code == 2
    assert command("cp", tmp_path / "nothing", tmp_path / "copy").exit_code == 3
    (tmp_path / "file").write_text("")
    assert command("cp", run, tmp_path / "file").exit_code == 4


def test_a_run_goes_to_s3_and_back(command: Command, run: Path, s3_bucket: str, tmp_path: Path) -> None:
    url = f"s3://{s3_bucket}/runs/7"
    assert command("cp", run, url).exit_code == 0
    assert command("cp", url, f"s3://{s3_bucket}/runs/8", "--last", 1).exit_code == 0
    assert command("cp", url, tmp_path / "back").exit_code == 0
    assert steps(tmp_path / "back") == [10, 20, 30]
    assert command("diff", run, tmp_path / "back").exit_code == 0
    assert command("verify", url).exit_code == 0
    before, after = (
        sorted(path.relative_to(root) for path in root.glob("step-*/**/*")) for root in (run, tmp_path / "back")
    )
    assert after == before


def test_a_directory_that_a_job_trains_in_is_not_copied_to(command: Command, run: Path, tmp_path: Path) -> None:
    import distckpt

    with distckpt.CheckpointManager(tmp_path / "busy", every=10) as manager:
        manager.restore({})
        for args in (["cp", run, tmp_path / "busy"], ["import", tmp_path / "x.safetensors", tmp_path / "busy"]):
            result = command(*args)
            assert (result.exit_code, result.stdout) == (7, "")
            assert re.search(r"belongs to another job: process \d+ on host .*\nFix: take a directory", result.stderr)
    assert command("cp", run, tmp_path / "busy").exit_code == 0

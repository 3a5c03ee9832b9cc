"""`distckpt verify` reads every byte and names what is bad."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distckpt import catalog
from distckpt.storage import open_storage

Command = Callable[..., Any]

FLIPS = 20


def files_of(run: Path) -> list[Path]:
    return sorted(file for file in run.glob("step-*/**/*") if file.is_file())


def problems(command: Command, url: object) -> dict[tuple[int, str], str]:
    """Return what verify finds, by step and file, after checking that the exit code fits."""
    result = command("verify", url, "--json")
    answer = json.loads(result.stdout)
    assert answer.keys() == {"url", "whole", "sample", "checkpoints"}
    assert (result.exit_code == 0) == answer["whole"]
    assert result.exit_code in (0, 1)
    found = {}
    for one in answer["checkpoints"]:
        assert one.keys() == {"step", "path", "state", "whole", "files", "bytes", "problems"}
        assert one["whole"] == (not one["problems"])
        found.update({(one["step"], problem["file"]): problem["problem"] for problem in one["problems"]})
    return found


def test_whole_checkpoints_are_whole(command: Command, run: Path) -> None:
    result = command("verify", run)
    assert result.exit_code == 0
    assert [line.split()[:3] for line in result.stdout.splitlines()] == [
        ["step", s, "whole"] for s in ["10", "20", "30"]
    ]
    assert "3 of 3 checkpoints whole" in result.stderr
    assert problems(command, run) == {}


def test_a_flipped_bit_anywhere_is_found_and_its_file_named(command: Command, run: Path) -> None:
    chance = random.Random(7)
    files = files_of(run)
    assert len(files) == 6
    for index in range(FLIPS):
        file = files[index % len(files)]
        step, name = int(file.relative_to(run).parts[0][5:]), "/".join(file.relative_to(run).parts[1:])
        whole = file.read_bytes()
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        assert list(problems(command, run)) == [(step, name)]
        result = command("verify", run)
        assert f"  {name} " in result.stdout
        assert "2 of 3 checkpoints whole" in result.stderr
        file.write_bytes(whole)


def test_missing_and_short_files_are_named(command: Command, run: Path) -> None:
    (first,) = (run / "step-000000000010").glob("*/*")
    (second,) = (run / "step-000000000020").glob("*/*")
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    found = problems(command, run)
    assert [step for step, _ in found] == [10, 20]
    assert found[10, f"{first.parent.name}/{first.name}"] == "is missing"
    assert "the manifest says" in found[20, f"{second.parent.name}/{second.name}"]


def test_what_was_put_aside_as_damaged_is_told_with_its_reason(command: Command, run: Path) -> None:
    storage = open_storage(run)
    data = catalog.manifest_data(storage, "step-000000000020")
    catalog.quarantine(storage, "step-000000000020", data=data, reason="rank-00000.safetensors is short")
    ((key, problem),) = problems(command, run).items()
    assert key[0] == 20
    assert key[1].startswith("damaged-")
    assert problem == "was put aside: rank-00000.safetensors is short"


def test_partial_ones_are_left_out(command: Command, run: Path) -> None:
    (run / "step-000000000020" / "manifest.json").unlink()
    result = command("verify", run)
    assert result.exit_code == 0
    assert "2 of 2 checkpoints whole" in result.stderr
    assert "1 partial left out" in result.stderr
    assert command("verify", run / "step-000000000020").exit_code == 3


def test_one_step_or_one_folder_is_verified_alone(command: Command, run: Path) -> None:
    (run / "step-000000000020" / "manifest.json").write_bytes(b"")
    for args in (["--step", 30], ["--step", 10]):
        assert command("verify", run, *args).exit_code == 0
    assert command("verify", run, "--step", 20).exit_code == 1
    assert command("verify", run / "step-000000000010").exit_code == 0
    assert list(problems(command, run / "step-000000000020")) == [(20, "manifest.json")]


def test_all_turns_together_read_every_byte_and_each_reads_a_part(command: Command, run: Path) -> None:
    (data,) = (run / "step-000000000020").glob("*/*.safetensors")
    body = bytearray(data.read_bytes())
    body[-1] ^= 1
    data.write_bytes(body)
    found, num_read = [], 0
    for turn in (1, 2, 3):
        result = command("verify", run, "--step", 20, "--sample", f"{turn}/3", "--json")
        answer = json.loads(result.stdout)
        assert answer["sample"] == f"{turn}/3"
        found.append(result.exit_code)
        num_read += answer["checkpoints"][0]["bytes"]
    assert sorted(found) == [0, 0, 1]
    assert num_read == len(body)
    data.write_bytes(bytes(body)[:-1])
    assert command("verify", run, "--step", 20, "--sample", "3/3").exit_code == 1, "sizes are looked at each time"


@pytest.mark.parametrize("sample", ["0/7", "8/7", "1", "a/b", "1/0", "-1/7"])
def test_a_sample_that_makes_no_sense_is_wrong_usage(command: Command, run: Path, sample: str) -> None:
    assert command("verify", run, "--sample", sample).exit_code == 2

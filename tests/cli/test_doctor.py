"""`distckpt doctor` tries a place, tells what it found, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from failing_storage import FailingStorage

from distckpt.cli.options import parse_size
from distckpt.diagnosis import examine
from distckpt.storage import Buffer, CountingStorage, LocalStorage, open_storage

Command = Callable[..., Any]

SMALL = ("--test-bytes", 1 << 20)
TRIED = ["list", "publish", "race", "write", "read", "clock", "delete"]


def verdicts(result: Any) -> dict[str, str]:
    answer = json.loads(result.stdout)
    assert answer.keys() == {"url", "well", "findings"}
    assert answer["well"] == (result.exit_code == 0)
    return {found["name"]: found["verdict"] for found in answer["findings"]}


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


def test_a_good_place_is_well_and_left_as_it_was(command: Command, run: Path) -> None:
    before = files(run)
    result = command("doctor", run, *SMALL, "--bytes", 1_000_000, "--json")
    assert result.exit_code == 0
    found = verdicts(result)
    assert list(found) == ["software", *TRIED, "durability", "room", "sharing", "save"]
    assert {name: verdict for name, verdict in found.items() if name in TRIED} == dict.fromkeys(TRIED, "good")
    assert found["sharing"] == "unknown"
    assert files(run) == before


def test_a_directory_that_is_not_there_is_not_there_afterwards(command: Command, tmp_path: Path) -> None:
    assert command("doctor", tmp_path / "a" / "b", *SMALL).exit_code == 0
    assert files(tmp_path) == []


def test_a_checkpoint_that_does_not_fit_is_bad(command: Command, tmp_path: Path) -> None:
    result = command("doctor", tmp_path, *SMALL, "--bytes", 10**18)
    assert result.exit_code == 1
    assert "does not fit" in result.stdout
    assert "not fit for checkpoints: room" in result.stderr


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("64MiB", 64 << 20), ("1.5 kB", 1500), ("12", 12)])
def test_sizes_are_written_as_people_do(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "5 apples", "-1GB", "GB"])
def test_what_is_no_size_is_wrong_usage(command: Command, tmp_path: Path, text: str) -> None:
    assert command("doctor", tmp_path, f"--bytes={text}").exit_code == 2


def test_a_place_that_cannot_be_written_is_bad(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = verdicts(command("doctor", tmp_path / "file" / "run", *SMALL, "--json"))
    assert "bad" in (found.get("list"), found.get("publish"))
    assert "write" not in found


def test_a_storage_that_replaces_is_found_out(tmp_path: Path) -> None:
    class Replacing(CountingStorage):
        def publish(self, name: str, data: bytes) -> None:
            self.inner.delete([name])
            self.inner.publish(name, data)

    found = {one.name: one for one in examine(Replacing(LocalStorage(tmp_path)), test_bytes=1 << 20)}
    assert found["publish"].verdict == "bad"
    assert "replaced" in found["publish"].text


def test_a_storage_that_lets_two_writers_win_is_found_out(tmp_path: Path) -> None:
    class Racing(CountingStorage):
        def publish(self, name: str, data: bytes) -> None:
            if not name.endswith("race"):
                super().publish(name, data)
            elif data == b"0":
                self.inner.put(name, [data])

    found = {one.name: one for one in examine(Racing(LocalStorage(tmp_path)), test_bytes=1 << 20)}
    assert found["race"].verdict == "bad"
    assert found["race"].facts["winners"] == 4


def test_a_storage_that_gives_back_other_bytes_is_found_out(tmp_path: Path) -> None:
    class Flipping(CountingStorage):
        def read(self, name: str, offset: int, into: memoryview) -> None:
            super().read(name, offset, into)
            into[-1] ^= 1

    found = {one.name: one.verdict for one in examine(Flipping(LocalStorage(tmp_path)), test_bytes=1 << 20)}
    assert found["read"] == "bad"


def test_a_clock_that_is_off_is_told(tmp_path: Path) -> None:
    class Late(CountingStorage):
        def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
            size = super().put(name, chunks, num_bytes=num_bytes)
            os.utime(tmp_path / name, (10**9, 10**9))
            return size

    found = {one.name: one for one in examine(Late(LocalStorage(tmp_path)), test_bytes=1 << 20)}
    assert found["clock"].verdict == "warning"
    assert found["clock"].facts["skew_s"] < -(10**8)


def test_whatever_fails_nothing_is_left_behind(tmp_path: Path) -> None:
    counted = FailingStorage(LocalStorage(tmp_path / "run"))
    list(examine(counted, test_bytes=1 << 20))
    for fail_at in range(len(counted.changes) - 4):  # the last ones delete
        storage = FailingStorage(LocalStorage(tmp_path / "run"), fail_at=fail_at)
        found = list(examine(storage, test_bytes=1 << 20))
        assert "bad" in [one.verdict for one in found], counted.changes[fail_at]
        left = [file.name for file in open_storage(tmp_path / "run").list()]
        assert left == [], counted.changes[fail_at]


def test_s3_is_well_and_tells_where_access_comes_from(command: Command, s3_bucket: str) -> None:
    result = command("doctor", f"s3://{s3_bucket}/run", *SMALL, "--json")
    found = verdicts(result)
    assert result.exit_code == 0
    assert {name: verdict for name, verdict in found.items() if name in TRIED} == dict.fromkeys(TRIED, "good")
    assert "AWS_ENDPOINT_URL" in result.stdout
    assert "AWS_ACCESS_KEY_ID" in result.stdout
    assert "testing" not in result.stdout + result.stderr, "what the credentials are is told nowhere"


def test_credentials_in_options_are_warned_of_and_not_shown(
    command: Command, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    options = json.dumps({"key": "testing", "secret": "testing-secret"})
    result = command("doctor", f"s3://{s3_bucket}/run", *SMALL, "--json", "--storage-options", options)
    assert verdicts(result)["credentials"] == "warning"
    assert "testing" not in result.stdout


def test_a_bucket_that_is_not_there_is_bad(command: Command, s3_bucket: str) -> None:
    found = verdicts(command("doctor", "s3://no-such-bucket-here/run", *SMALL, "--json"))
    assert "bad" in (found["list"], found.get("publish"))

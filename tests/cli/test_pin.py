"""`distckpt pin` keeps a checkpoint for good, and `unpin` no longer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distckpt import catalog, pins
from distckpt.errors import CheckpointNotFoundError
from distckpt.storage import open_storage

Command = Callable[..., Any]


def pinned(run: Path) -> list[int]:
    return pins.pinned_steps(open_storage(run))


def test_a_pinned_checkpoint_is_kept_by_prune(command: Command, run: Path) -> None:
    result = command("pin", run, "--step", 10)
    assert (result.exit_code, result.stdout) == (0, "step 10: pinned\n")
    assert command("prune", run, "--keep", 1, "--yes").exit_code == 0
    assert [folder.step for folder in catalog.scan(open_storage(run))] == [10, 30]
    command("unpin", run, "--step", 10)
    assert command("prune", run, "--keep", 1, "--yes").exit_code == 0
    assert [folder.step for folder in catalog.scan(open_storage(run))] == [30]


def test_of_a_run_the_newest_is_meant_and_twice_is_once(command: Command, run: Path) -> None:
    for changed in (True, False):
        answer = json.loads(command("pin", run, "--json").stdout)
        assert answer.keys() == {"url", "step", "path", "pinned", "changed", "all_pinned"}
        assert (answer["step"], answer["pinned"], answer["changed"], answer["all_pinned"]) == (30, True, changed, [30])
    for changed in (True, False):
        answer = json.loads(command("unpin", run, "--json").stdout)
        assert (answer["pinned"], answer["changed"], answer["all_pinned"]) == (False, changed, [])


def test_one_folder_is_pinned_too(command: Command, run: Path) -> None:
    assert command("pin", run / "step-000000000020").exit_code == 0
    assert pinned(run) == [20]
    assert json.loads(command("show", run, "--step", 20, "--json").stdout)["pinned"]


def test_what_is_no_checkpoint_cannot_be_pinned(command: Command, run: Path, tmp_path: Path) -> None:
    (run / "step-000000000020" / "manifest.json").unlink()
    for url, args in ((run, ["--step", 20]), (run, ["--step", 40]), (tmp_path / "nothing", [])):
        result = command("pin", url, *args)
        assert (result.exit_code, result.stdout) == (3, "")
    assert pinned(run) == []
    assert not (tmp_path / "nothing").exists()


def test_a_damaged_checkpoint_can_be_unpinned(command: Command, run: Path) -> None:
    command("pin", run, "--step", 20)
    storage = open_storage(run)
    data = catalog.manifest_data(storage, "step-000000000020")
    catalog.quarantine(storage, "step-000000000020", data=data, reason="a reason")
    assert command("unpin", run, "--step", 20).exit_code == 0
    assert pinned(run) == []


def test_a_pin_on_a_checkpoint_that_vanishes_meanwhile_is_taken_back(run: Path) -> None:
    from distckpt.storage import CountingStorage

    class Vanishing(CountingStorage):
        def publish(self, name: str, data: bytes) -> None:
            super().publish(name, data)
            self.inner.delete(["step-000000000020/manifest.json"])

    with pytest.raises(CheckpointNotFoundError):
        pins.pin(Vanishing(open_storage(run)), "step-000000000020")
    assert pinned(run) == []


def test_pins_work_on_s3(command: Command, run: Path, s3_bucket: str) -> None:
    url = f"s3://{s3_bucket}/run"
    command("cp", run, url, "--last", 1)
    assert command("pin", url).exit_code == 0
    assert "pinned in s3://" in command("pin", url).stderr
    assert json.loads(command("unpin", url, "--json").stdout)["changed"]

"""`distckpt prune` shows its plan with reasons, and deletes only with --yes, never what must stay."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distckpt import catalog
from distckpt.storage import open_storage

Command = Callable[..., Any]


def planned(command: Command, run: Path, *args: object) -> dict[int, tuple[str, str]]:
    """Return the plan: by step, the action and the reasons."""
    result = command("prune", run, *args, "--json")
    assert result.exit_code == 0
    plan = json.loads(result.stdout)["plan"]
    assert all(item.keys() == {"step", "path", "state", "bytes", "action", "reasons"} for item in plan)
    return {item["step"]: (item["action"], "; ".join(item["reasons"])) for item in plan}


def steps(run: Path) -> list[int]:
    return [folder.step for folder in catalog.scan(open_storage(run))]


def make_partial(run: Path, step: int, *, age_s: float = 0) -> Path:
    file = run / f"step-{step:012d}" / "abc" / "rank-00000.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"123")
    os.utime(file, (time.time() - age_s,) * 2)
    return file


def test_the_plan_has_a_reason_for_each_and_deletes_nothing(command: Command, run: Path) -> None:
    result = command("prune", run, "--keep", 1, "--best", 1, "--metric", "val/loss")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [[line[0], *line[4:]] for line in lines] == [
        ["10", "keep", "best", "1", "by", "val/loss"],
        ["20", "delete", "no", "rule", "keeps", "it"],
        ["30", "keep", "newest;", "last", "1"],
    ]
    assert "would delete 1 of 3" in result.stderr
    assert "nothing is deleted without --yes" in result.stderr
    assert steps(run) == [10, 20, 30]


def test_yes_deletes_what_the_plan_says(command: Command, run: Path) -> None:
    result = command("prune", run, "--keep", 1, "--best", 1, "--metric", "val/loss", "--yes")
    assert result.exit_code == 0
    assert "deleted step 20" in result.stderr
    assert steps(run) == [10, 30]
    assert not (run / "step-000000000020").exists()
    assert command("verify", run).exit_code == 0
    again = command("prune", run, "--keep", 1, "--best", 1, "--metric", "val/loss", "--yes")
    assert (again.exit_code, "nothing to delete" in again.stderr) == (0, True)


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (["--last", 2], [20, 30]),
        (["--every", 20, "--last", 1], [20, 30]),
        (["--within-s", 3600, "--keep", 1], [10, 20, 30]),
        (["--best", 1, "--metric", "val/loss", "--mode", "max", "--keep", 1], [30]),
        (["--every", 7], [10, 20, 30]),
        (["--partial"], [10, 20, 30]),
    ],
)
def test_every_rule_of_retention_is_an_option(
    command: Command, run: Path, rules: list[object], kept: list[int]
) -> None:
    result = command("prune", run, *rules, "--yes", "--json")
    assert json.loads(result.stdout)["deleted"] == (kept != [10, 20, 30])
    assert steps(run) == kept


def test_pinned_ones_stay(command: Command, run: Path) -> None:
    (run / "step-000000000010" / "pinned.json").write_text("{}")
    assert planned(command, run, "--keep", 1)[10] == ("keep", "pinned")


def test_a_partial_stays_unless_asked_for_and_superseded(command: Command, run: Path) -> None:
    make_partial(run, 15)
    make_partial(run, 40)
    make_partial(run, 50, age_s=4000)
    plan = planned(command, run, "--keep", 3)
    assert {plan[step] for step in (15, 40, 50)} == {("keep", "--partial was not given")}
    plan = planned(command, run, "--partial", "--yes")
    assert plan[10] == ("keep", "committed")
    assert plan[15] == ("delete", "partial, and step 30 is committed")
    assert plan[40][0] == "keep"
    assert plan[40][1].startswith("may be a save in flight: written to ")
    assert plan[50] == ("delete", "partial, last written to 1 h ago")
    assert steps(run) == [10, 20, 30, 40]


def test_a_damaged_one_goes_only_where_a_newer_one_is_committed(command: Command, run: Path) -> None:
    storage = open_storage(run)
    data = catalog.manifest_data(storage, "step-000000000010")
    catalog.quarantine(storage, "step-000000000010", data=data, reason="bad")
    data = catalog.manifest_data(storage, "step-000000000030")
    catalog.quarantine(storage, "step-000000000030", data=data, reason="bad")
    plan = planned(command, run, "--keep", 1, "--partial", "--yes")
    assert plan[10] == ("delete", "damaged, and step 20 is committed")
    assert plan[20] == ("keep", "newest; last 1")
    assert plan[30] == ("keep", "damaged, but no newer one is committed")
    assert steps(run) == [20, 30]


def test_what_is_damaged_is_kept_where_nothing_is_committed(command: Command, run: Path) -> None:
    for manifest in run.glob("*/manifest.json"):
        manifest.write_bytes(b"?")
    assert {action for action, _ in planned(command, run, "--keep", 1, "--partial", "--yes").values()} == {"keep"}
    assert steps(run) == [10, 20, 30]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "say what to keep"),
        (["--keep", 0], "greater than or equal"),
        (["--best", 1], "--best and --metric go together"),
        (["--metric", "val/loss"], "--best and --metric go together"),
        (["--best", 1, "--metric", "val/los"], "Fix: --metric val/loss"),
        (["--best", 1, "--metric", "val/loss", "--mode", "small"], "--mode"),
    ],
)
def test_unclear_rules_are_refused(command: Command, run: Path, args: list[object], words: str) -> None:
    result = command("prune", run, *args, "--yes")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert steps(run) == [10, 20, 30]


def test_one_checkpoints_folder_is_refused(command: Command, run: Path) -> None:
    result = command("prune", run / "step-000000000010", "--keep", 1, "--yes")
    assert result.exit_code == 2
    assert f"Fix: distckpt prune {run}" in result.stderr
    assert steps(run) == [10, 20, 30]

"""`distckpt ls` lists all that lies in a run's directory, and marks what is no good checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy

import distckpt
from distckpt import catalog, inventory
from distckpt.checksum import digest
from distckpt.manifest import serialize
from distckpt.storage import CountingStorage, open_storage

Command = Callable[..., Any]

FIELDS = {
    "branch", "step", "path", "state", "problem", "bytes", "modified", "pinned",
    "created", "world_size", "layout", "metrics", "run", "attempt", "parent", "retention",
}  # fmt: skip


def flip(file: Path, *, offset: int = 40) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def listed(command: Command, url: object) -> list[dict[str, Any]]:
    result = command("ls", url, "--json")
    assert result.exit_code == 0
    checkpoints: list[dict[str, Any]] = json.loads(result.stdout)["checkpoints"]
    return checkpoints


def spoil(run: Path) -> None:
    """Leave 10 partial, and 20 put aside as damaged; pin 30."""
    (run / "step-000000000010" / "manifest.json").unlink()
    storage = open_storage(run)
    data = catalog.manifest_data(storage, "step-000000000020")
    catalog.quarantine(storage, "step-000000000020", data=data, reason="a reason")
    (run / "step-000000000030" / "pinned.json").write_text("{}")


def test_each_checkpoint_is_a_line_with_its_facts(command: Command, run: Path) -> None:
    result = command("ls", run)
    assert result.exit_code == 0
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["step", "state", "created", "size", "ranks", "layout", "metrics"]
    assert [line.split()[:2] for line in lines] == [[step, "committed"] for step in ("10", "20", "30")]
    assert re.search(r"\d (s|min) ago .* kB .* 1 .*sharded .*val/loss 0\.1  val/top1 0\.5", lines[0])
    assert "3 committed" in result.stderr


def test_json_has_the_documented_fields(command: Command, run: Path) -> None:
    checkpoints = listed(command, run)
    assert [checkpoint["step"] for checkpoint in checkpoints] == [10, 20, 30]
    assert all(checkpoint.keys() == FIELDS for checkpoint in checkpoints)
    newest = checkpoints[-1]
    known = {"state": "committed", "problem": None, "pinned": False, "world_size": 1, "layout": "sharded"}
    assert known.items() <= newest.items()
    assert newest["path"] == str(run / "step-000000000030")
    assert newest["metrics"] == {"val/loss": 0.3, "val/top1": 0.5}
    (data,) = (run / "step-000000000030" / newest["attempt"]).iterdir()
    assert newest["bytes"] == data.stat().st_size


def test_partial_damaged_and_pinned_ones_are_marked(command: Command, run: Path) -> None:
    spoil(run)
    result = command("ls", run)
    lines = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [line[:2] for line in lines] == [["10", "partial"], ["20", "damaged"], ["30", "committed,"]]
    assert lines[2][2] == "pinned"
    assert "step 20: damaged-" in result.stderr
    assert "was put aside: a reason" in result.stderr
    facts = listed(command, run)
    assert [(one["state"], one["pinned"]) for one in facts] == [
        ("partial", False),
        ("damaged", False),
        ("committed", True),
    ]
    assert facts[0]["created"] is facts[1]["metrics"] is None


def test_a_manifest_that_is_not_whole_is_damaged(command: Command, run: Path) -> None:
    flip(run / "step-000000000020" / "manifest.json")
    assert [one["state"] for one in listed(command, run)] == ["committed", "damaged", "committed"]


def test_a_newer_format_is_marked_and_stops_nothing(command: Command, run: Path) -> None:
    file = run / "step-000000000030" / "manifest.json"
    body = file.read_text().replace('"format":1', '"format":99').rpartition(',"xxh3"')[0]
    file.write_text(f'{body},"xxh3":"{digest(body.encode())}"}}\n')
    assert [one["state"] for one in listed(command, run)] == ["committed", "committed", "newer format"]
    assert command("show", run, "--step", 30).exit_code == 5


def test_a_checkpoints_own_folder_is_one_line(command: Command, run: Path) -> None:
    spoil(run)
    states = []
    for step in (10, 20, 30):
        (one,) = listed(command, run / f"step-{step:012d}")
        assert (one["step"], one["path"]) == (step, str(run / f"step-{step:012d}"))
        states.append((one["state"], one["pinned"]))
    assert states == [("partial", False), ("damaged", False), ("committed", True)]


def test_a_checkpoint_in_a_folder_of_any_name_is_found(command: Command, run: Path, tmp_path: Path) -> None:
    shutil.move(run / "step-000000000020", tmp_path / "best")
    (one,) = listed(command, tmp_path / "best")
    assert (one["step"], one["state"]) == (20, "committed")


def test_numbers_that_json_lacks_are_strings(command: Command, tmp_path: Path) -> None:
    distckpt.save(tmp_path / "one", {"x": 1}, metrics={"loss": float("nan"), "top": float("-inf")})
    (one,) = listed(command, tmp_path / "one")
    assert one["metrics"] == {"loss": "nan", "top": "-inf"}


@pytest.mark.parametrize("verb", ["ls", "show", "verify", "prune"])
def test_a_directory_without_checkpoints_is_one_clear_error(command: Command, tmp_path: Path, verb: str) -> None:
    more = ["--keep", 1] if verb == "prune" else []
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        result = command(verb, tmp_path / name, "--json", *more)
        assert (result.exit_code, result.stdout) == (3, "")
        assert f"no checkpoint in '{tmp_path / name}': it is empty, or not there" in result.stderr
        assert "\nFix: give a run's directory" in result.stderr
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    result = command(verb, tmp_path / "empty", *more)
    assert result.exit_code == 3
    assert "its 1 files are none of a checkpoint's" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["ls", "{file}"], 4, "Not a directory"),
        (["ls", "s4://bucket/run"], 2, "did you mean 's3'"),
        (["ls", "{run}", "--storage-options", "{}"], 0, ""),
        (["ls", "{run}", "--storage-options", '{"key": 1}'], 2, "a local path, which takes none"),
        (["ls", "{run}", "--storage-options", "key"], 2, "no JSON"),
        (["ls", "{run}", "--storage-options", "[1]"], 2, "no JSON object"),
        (["ls"], 2, "URL"),
        (["list", "{run}"], 2, "No such command"),
        (["show", "{run}", "--step", "7"], 3, "of step 7 there is none; committed are 10, 20, 30"),
        (["show", "{run}", "--step", "-1"], 2, "--step"),
        (["verify", "{run}", "--step", "7"], 3, "none of that step"),
        (["diff", "{run}", "{run}/nowhere"], 3, "no checkpoint in"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_an_exit_code(
    command: Command, run: Path, args: list[str], code: int, words: str
) -> None:
    file = run / "file"
    file.touch()
    result = command(*(arg.replace("{run}", str(run)).replace("{file}", str(file)) for arg in args))
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_what_retention_would_do_stands_beside_each_with_its_reason(command: Command, run: Path) -> None:
    command("pin", run, "--step", 10)
    result = command("ls", run, "--keep", 1)
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["step", "state", "retention"]
    assert re.search(r"^10 +committed, pinned +keep: pinned ", lines[1].strip())
    assert re.search(r"^20 +committed +delete: no rule keeps it ", lines[2].strip())
    assert re.search(r"^30 +committed +keep: newest; last 1 ", lines[3].strip())
    answer = json.loads(command("ls", run, "--keep", 1, "--json").stdout)["checkpoints"]
    assert [one["retention"]["action"] for one in answer] == ["keep", "delete", "keep"]
    assert [one["retention"] for one in listed(command, run)] == [None] * 3
    assert [folder.step for folder in catalog.scan(open_storage(run))] == [10, 20, 30], "and nothing is deleted"


def branch(run: Path, *, step: int, of: int | None, created: float) -> None:
    """Add a checkpoint that went on from another one."""
    parent = None if of is None else catalog.read_manifest(open_storage(run), f"step-{of:012d}")
    manifest = catalog.read_manifest(open_storage(run), "step-000000000030")
    lineage = None if parent is None else {"step": parent.step, "attempt": parent.attempt}
    made = replace(manifest, step=step, attempt=f"a{step}", parent=lineage, created=created)
    folder = run / f"step-{step:012d}"
    folder.mkdir()
    (folder / "manifest.json").write_bytes(serialize(made))


def test_the_tree_shows_which_checkpoint_each_went_on_from(command: Command, run: Path) -> None:
    branch(run, step=21, of=20, created=1e9)
    branch(run, step=22, of=21, created=1e9 + 1)
    branch(run, step=40, of=30, created=4e9)
    branch(run, step=50, of=None, created=4e9)
    lines = command("ls", run, "--tree").stdout.splitlines()[1:]
    drawn = [line.partition("committed")[0].rstrip() for line in lines]
    assert drawn == ["10", "20", "├─ 21", "│  22", "30", "40", "50"]
    (run / "step-000000000020" / "manifest.json").unlink()
    drawn = [line.split("  ")[0].rstrip() for line in command("ls", run, "--tree").stdout.splitlines()[1:]]
    assert "30 (from 20, which is gone)" in drawn


@pytest.fixture
def branched_run(run: Path) -> Path:
    """Give the run with two branches of checkpoint 20, and one of a branch."""
    for directory, at, branch, steps in (
        (run, 20, "wide", (25, 30)),
        (run, 20, "deep", (22,)),
        (run / "branches/wide", 25, "wider", (27,)),
    ):
        with distckpt.CheckpointManager(directory, at=at, branch=branch, keep=9, rng=False) as manager:
            manager.restore({"epoch": 0}, only=["epoch"])
            for step in steps:
                manager.save(step, {"epoch": step})
    return run


def test_the_tree_shows_branches_beside_the_run_that_they_went_off_from(command: Command, branched_run: Path) -> None:
    result = command("ls", branched_run, "--tree")
    drawn = [line.partition("committed")[0].rstrip() for line in result.stdout.splitlines()[1:]]
    assert drawn == ["10", "20", "├─ 22 (deep)", "├─ 25 (wide)", "│  ├─ 27 (wide/wider)", "│  30", "30"]
    assert "branch wide went off from step 20" in result.stderr
    answer = json.loads(command("ls", branched_run, "--tree", "--json").stdout)
    found = [(one["branch"], one["step"], Path(one["path"]).is_dir()) for one in answer["checkpoints"]]
    assert sorted(found, key=str) == sorted(
        [
            *((None, step, True) for step in (10, 20, 30)),
            *(("wide", step, True) for step in (25, 30)),
            ("deep", 22, True),
            ("wide/wider", 27, True),
        ],
        key=str,
    )


def test_without_the_tree_branches_are_only_named(command: Command, branched_run: Path) -> None:
    result = command("ls", branched_run)
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == ["10", "20", "30"]
    assert f"branch deep went off from step 20: distckpt ls {branched_run} --tree" in result.stderr
    answer = json.loads(command("ls", branched_run, "--json").stdout)
    assert answer["branches"] == [
        {"name": name, "path": str(branched_run / "branches" / name), "step": 20} for name in ("deep", "wide")
    ]


def test_every_command_works_on_a_branch(command: Command, branched_run: Path, tmp_path: Path) -> None:
    branch = branched_run / "branches/wide"
    assert [one["step"] for one in listed(command, branch)] == [25, 30]
    assert command("verify", branch).exit_code == 0
    assert command("show", branch, "--step", 25).exit_code == 0
    assert command("diff", branch / "step-000000000025", branch).exit_code == 1
    assert command("pin", branch, "--step", 25).exit_code == 0
    assert command("cp", branch, tmp_path / "copy").exit_code == 0
    assert [one["step"] for one in listed(command, tmp_path / "copy")] == [25, 30]


def test_what_a_branch_went_off_from_stays_with_its_reason(command: Command, branched_run: Path) -> None:
    plan = json.loads(command("prune", branched_run, "--keep", 1, "--yes", "--json").stdout)["plan"]
    assert [(one["step"], one["action"], one["reasons"]) for one in plan] == [
        (10, "delete", ["no rule keeps it"]),
        (20, "keep", ["deep, wide went off from it"]),
        (30, "keep", ["newest", "last 1"]),
    ]
    retention = {
        (one["branch"], one["step"]): one["retention"]["action"]
        for one in json.loads(command("ls", branched_run, "--tree", "--keep", 1, "--json").stdout)["checkpoints"]
    }
    assert retention[None, 20] == retention["wide", 25] == retention["wide", 30] == retention["deep", 22] == "keep"


def test_a_manifest_that_contradicts_itself_is_left_to_verify(command: Command, run: Path) -> None:
    """Its digest is right, so no accident did that; a list looks no deeper, whoever reads or prunes does."""
    manifest = catalog.read_manifest(open_storage(run), "step-000000000030")
    body = json.loads(serialize(manifest))
    del body["xxh3"]
    body["objects"]["epoch"]["trees"] = []
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()[:-1]
    (run / "step-000000000030" / "manifest.json").write_bytes(text + f',"xxh3":"{digest(text)}"}}\n'.encode())
    assert listed(command, run)[-1]["state"] == "committed"
    assert command("verify", run).exit_code == 1
    assert command("show", run, "--step", 30).exit_code == 5


def test_requests_on_s3_grow_by_one_for_each_checkpoint(run: Path, s3_bucket: str, command: Command) -> None:
    url = f"s3://{s3_bucket}/run"
    counts = []
    for last in (1, 3):
        command("cp", run, url, "--last", last)
        storage = CountingStorage(open_storage(url))
        assert len(inventory.take(storage, brief=True)) == last
        verbs = ("list", "read", "read_all")
        counts.append(sum(storage.counted(verb).num_calls for verb in verbs))
    assert counts[1] - counts[0] == 2


def test_the_command_asks_the_server_once_for_each_checkpoint(
    run: Path, s3_bucket: str, proxied: FaultProxy, command: Command
) -> None:
    url, counts = f"s3://{s3_bucket}/run", []
    manifest = catalog.read_manifest(open_storage(run), "step-000000000030")
    storage = open_storage(url)
    for step in range(1, 31):
        body = serialize(replace(manifest, step=step, attempt=f"a{step}"))
        storage.publish(f"step-{step:012d}/manifest.json", body)
        if step in (10, 30):
            proxied.reset()
            result = command("ls", url, "--tree", "--json")
            assert len(json.loads(result.stdout)["checkpoints"]) == step
            counts.append(len(proxied.seen))
    assert counts[1] - counts[0] == 20
    assert counts[0] <= 10 + 6


def test_how_the_latest_job_ended_is_told(command: Command, run: Path) -> None:
    outcome = json.loads(command("ls", run, "--json").stdout)["outcome"]
    assert outcome.keys() == {"state", "host", "pid", "since", "renewed", "step", "time", "reason"}
    assert (outcome["state"], outcome["step"], outcome["reason"]) == ("complete", 30, None)
    assert outcome["since"] <= outcome["time"] <= outcome["renewed"]
    assert re.search(r"the latest job \(process \d+ on .*\) ended .* at step 30: complete", command("ls", run).stderr)


def test_a_run_that_has_no_checkpoint_yet_tells_how_its_job_stands(command: Command, run: Path) -> None:
    for folder in run.glob("step-*"):
        shutil.rmtree(folder)
    listed = command("ls", run, "--json")
    assert listed.exit_code == 0
    answer = json.loads(listed.stdout)
    assert (answer["checkpoints"], answer["outcome"]["state"]) == ([], "complete")
    shown = command("ls", run)
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert "no checkpoint; 0 B in all" in shown.stderr
    shutil.rmtree(run / "lease")
    assert command("ls", run).exit_code == 3


def test_of_a_directory_where_no_job_has_saved_no_outcome_is_told(command: Command, run: Path) -> None:
    shutil.rmtree(run / "lease")
    assert json.loads(command("ls", run, "--json").stdout)["outcome"] is None
    assert "the latest job" not in command("ls", run).stderr

"""`distckpt torture` kills a job again and again, comes back each time, and finds what is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from distckpt.memorytier import MemoryTier
from distckpt.torture.journal import Event, Journal, Line, judge, read

FIELDS = {
    "url", "seed", "ranks", "layout", "kills", "kills_in_save", "acknowledged", "lost", "wrong", "failed", "damaged",
    "most_abandoned", "left_over", "from_memory", "seconds", "kept", "fine",
}  # fmt: skip


def torture(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "distckpt.cli", "torture", *(str(arg) for arg in args), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def facts(process: subprocess.Popen[str]) -> dict[str, Any]:
    said, talk = process.communicate(timeout=280)
    assert said, talk
    found: dict[str, Any] = json.loads(said)
    return found


@pytest.mark.parametrize(
    ("layout", "memory"), [("sharded", ["--memory-tier"]), pytest.param("full", [], marks=pytest.mark.slow)]
)
def test_a_job_that_is_killed_comes_back_to_what_it_was_told_is_safe(
    tmp_path: Path, layout: str, memory: list[str]
) -> None:
    process = torture(tmp_path, "--kills", 10, "--megabytes", 0.5, "--seed", 3, "--layout", layout, *memory)
    found = facts(process)
    assert process.returncode == 0, found
    assert found.keys() == FIELDS
    assert (found["kills"], found["lost"], found["wrong"], found["failed"], found["damaged"]) == (10, [], [], [], [])
    assert found["acknowledged"] > 0
    assert found["left_over"] <= found["kills_in_save"]
    assert bool(found["from_memory"]) == bool(memory)
    assert not MemoryTier(found["url"]).path.exists()
    assert list(tmp_path.iterdir()) == [], "it leaves nothing"


def test_checkpoints_that_somebody_deletes_meanwhile_are_missed(tmp_path: Path) -> None:
    process = torture(tmp_path, "--kills", 6, "--megabytes", 0.1)
    while process.poll() is None:
        for manifest in tmp_path.glob("torture-*/step-*/manifest.json"):
            manifest.unlink(missing_ok=True)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
    found = facts(process)
    assert process.returncode == 1
    assert found["lost"]
    assert not found["fine"]
    assert Path(found["url"]).is_dir(), "it is left for a look"
    assert "journals and logs are in" in found["failed"][-1]


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("layout", ["sharded", "full"])
@pytest.mark.parametrize("place", ["local", "s3", "memory"])
def test_nothing_is_lost_in_a_long_run(request: pytest.FixtureRequest, tmp_path: Path, place: str, layout: str) -> None:
    url = f"s3://{request.getfixturevalue('s3_bucket')}/torture" if place == "s3" else tmp_path
    memory = ["--memory-tier"] if place == "memory" else []
    process = torture(url, "--kills", 30 if place == "s3" else 100, "--layout", layout, *memory)
    said, _ = process.communicate(timeout=5300)
    found = json.loads(said)
    print(found)
    assert process.returncode == 0, found
    assert found["kills_in_save"] >= found["kills"] / 2
    assert found["most_abandoned"] <= 2, "that of the kill, and one that was being deleted or might still have come"
    assert found["left_over"] <= 1


# The judgement.


def line(leg: int, event: Event, step: int, digest: str = "", *, rank: int = 0) -> Line:
    return Line(leg=leg, rank=rank, event=event, step=step, digest=digest, moment=0.0)


FIRST = [
    line(1, "resumed", 0, "z"),
    line(1, "saving", 3, "a"),
    line(1, "saved", 3),
    line(1, "saving", 6, "b"),
    line(1, "saved", 6),
    line(1, "saving", 9, "c"),
]


@pytest.mark.parametrize(
    ("resumed", "lost"),
    [((9, "c"), ()), ((6, "b"), ()), ((3, "a"), (6,)), ((0, "z"), (3, 6))],
)
def test_what_was_acknowledged_and_not_come_back_to_is_lost(resumed: tuple[int, str], lost: tuple[int, ...]) -> None:
    verdict = judge([*FIRST, line(2, "resumed", *resumed)], leg=2, num_ranks=1)
    assert (verdict.step, verdict.lost, verdict.wrong) == (resumed[0], lost, ())


def test_a_state_that_was_not_saved_there_is_wrong() -> None:
    verdict = judge([*FIRST, line(2, "resumed", 6, "a")], leg=2, num_ranks=1)
    assert verdict.wrong == ("rank 0 resumed step 6 with a state that it never saved there",)
    verdict = judge([*FIRST, line(2, "resumed", 7, "b")], leg=2, num_ranks=1)
    assert verdict.wrong == ("rank 0 resumed step 7 with a state that it never saved there",)


def test_going_on_to_another_state_than_before_is_wrong() -> None:
    again = [line(2, "resumed", 6, "b"), line(2, "saving", 9, "d")]
    assert judge([*FIRST, *again], leg=2, num_ranks=1).wrong == (
        "rank 0 came to step 9 again with another state than before",
    )


def test_ranks_that_come_back_to_different_steps_are_wrong() -> None:
    others = [line(1, "saving", 3, "A", rank=1), line(1, "saving", 6, "B", rank=1)]
    back = [line(2, "resumed", 6, "b"), line(2, "resumed", 3, "A", rank=1)]
    verdict = judge([*FIRST, *others, *back], leg=2, num_ranks=2)
    assert verdict.wrong == ("rank 1 resumed step 3, rank 0 step 6",)


def test_a_rank_that_never_came_back_is_a_start_without_a_step() -> None:
    assert judge([*FIRST, line(2, "resumed", 6, "b")], leg=2, num_ranks=2).step is None


def test_a_journal_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    assert read(tmp_path, 0) == []
    journal = Journal(tmp_path, leg=1, rank=0)
    journal.write("saving", 3, "a")
    journal.write("saved", 3)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes() + b'{"leg": 1, "ra')
    assert [(one.event, one.step, one.digest) for one in read(tmp_path, 0)] == [("saving", 3, "a"), ("saved", 3, "")]

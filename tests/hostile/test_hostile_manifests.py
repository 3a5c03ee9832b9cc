"""A checkpoint made to harm is refused with an error of ours, or is harmless: nothing outside it is touched."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from guard import Guard
from manifest_cases import STEP, Case, Ground, all_cases, read_body

MOST_SECONDS = 20.0  # for one action, on a busy machine; the slowest takes 2
GROWTH_BYTES = 64 << 20
GROWTH_FACTOR = 25  # a JSON list of nothing takes 3 bytes, an empty list in memory 64
SAMPLED = 100

CASES = all_cases()
# Each run does the same sample and the cases that found something; `-m slow` does all.
_FOUND = {
    *("two chunks on one place and none on another", "a quarter twice and one not at all"),
    *("one segment of 8 GiB in a file full of holes", "4,000 tensors in the bytes of one"),
    *("a terabyte in a file that is not there", "a NumPy scalar of code", "an optimizer without a state"),
}
_CHOSEN = {case.name for case in random.Random(4).sample(CASES, SAMPLED)} | _FOUND


def parameters() -> list[Any]:
    return [pytest.param(c, id=c.name[:80], marks=[] if c.name in _CHOSEN else [pytest.mark.slow]) for c in CASES]


def test_there_are_hundreds_of_cases_each_with_its_own_name() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert len(names) >= 500


def problems(case: Case, found: dict[str, dict[str, Any]], contents: dict[str, str], num_bytes: int) -> list[str]:
    """Return everything that is not as it must be."""
    wrong = []
    for action, result in found.items():
        where = f"{action}: "
        if not result["typed"]:
            wrong.append(f"{where}untyped {result['error']}")
        if result["events"]:
            wrong.append(f"{where}did {result['events'][:3]}")
        if result["seconds"] > MOST_SECONDS:
            wrong.append(f"{where}took {result['seconds']:.1f} s")
        if result["grown_bytes"] > GROWTH_BYTES + GROWTH_FACTOR * num_bytes:
            wrong.append(f"{where}took {result['grown_bytes']:,} bytes for {num_bytes:,}")
        loaded = result.get("content")
        if loaded is None:
            continue
        expected = contents["20"] if result.get("step") == 20 else contents["30"]
        if case.verdict == "refused" and expected == contents["30"]:
            wrong.append(f"{where}loaded it")
        elif (case.verdict == "same" or result.get("step") == 20) and loaded != expected:
            wrong.append(f"{where}loaded something else")
    return wrong


@pytest.mark.parametrize("case", parameters())
def test_a_hostile_manifest_does_no_harm(tmp_path: Path, guard: Guard, case: Case) -> None:
    root = tmp_path / "run"
    shutil.copytree(guard.ground, root)
    outside = {path.name for path in tmp_path.iterdir()}
    case.spoil(Ground(root=root, body=read_body(root / STEP / "manifest.json")))
    num_bytes = sum(path.lstat().st_blocks * 512 for path in root.rglob("*") if not path.is_symlink())
    found = guard.open(root)
    assert not problems(case, found, guard.contents, num_bytes)
    assert {path.name for path in tmp_path.iterdir()} == outside


def test_the_guard_notices_what_it_must(guard: Guard, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(guard.ground, root)
    found = guard.open(root)
    assert all(result["error"] is None for result in found.values())
    assert found["load"]["content"] == found["restore"]["content"] == guard.contents["30"] != guard.contents["20"]
    watched = guard.open(root, ("misbehave",))["misbehave"]
    for event in ("open", "os.listdir", "import", "subprocess.Popen", "os.system", "socket", "compile", "exec"):
        assert [line for line in watched["events"] if line.startswith(event)], event
    assert watched["grown_bytes"] > 100 << 20
    assert not watched["typed"]

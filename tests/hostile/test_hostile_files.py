"""A file of another tool that is made to harm runs no code, takes no more memory than it may, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign_cases import Foreign, all_foreign
from guard import Guard

MOST_SECONDS = 10.0  # on a busy machine; the slowest takes half a second
GROWTH_BYTES = 96 << 20
GROWTH_FACTOR = 8

CASES = all_foreign()


def test_there_is_a_hundred_of_them_each_with_its_own_name() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert len(names) >= 200


@pytest.fixture(scope="module")
def foreign_guard(guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Guard:
    """Let the child import what reading these formats imports, before that is an event."""
    for case in [case for case in CASES if case.loads]:
        root = tmp_path_factory.mktemp("warm")
        case.make(root)
        guard.warm(root, (f"file:{case.path}",))
        (root / case.path).touch()
    return guard


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_file_does_no_harm(tmp_path: Path, foreign_guard: Guard, case: Foreign) -> None:
    root = tmp_path / "run"
    root.mkdir()
    case.make(root)
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    num_bytes = sum(path.lstat().st_size for path in root.rglob("*"))
    [found] = foreign_guard.open(root, (f"file:{case.path}",)).values()
    assert found["typed"], found["error"]
    assert (found["error"] is None) == case.loads, found["error"]
    assert found["events"] == []
    assert found["seconds"] < MOST_SECONDS
    assert found["grown_bytes"] < GROWTH_BYTES + GROWTH_FACTOR * num_bytes
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == before

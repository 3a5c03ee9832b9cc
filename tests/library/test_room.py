"""Room for a save: who shares a file system, what comes there, and what is said where it does not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distckpt import CheckpointManager, PerRank, room
from distckpt.errors import StorageFullError
from distckpt.failure import from_wire, numbered, to_wire
from distckpt.retention import Retention
from distckpt.room import Standing
from distckpt.state import flatten
from distckpt.storage import CountingStorage, LocalStorage, Room, open_storage, room_of

STATE_BYTES = 8 * (6 * 4 + 6)


class SmallStorage:
    """A storage that says what it is told to say of its room."""

    def __init__(self, inner: LocalStorage, *num_bytes: int, place: str = "here/1") -> None:
        self.inner = inner
        self.answers = list(num_bytes)
        self.place = place

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def room(self) -> Room:
        left = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return Room(folder=str(self.inner.root), place=self.place, num_bytes=left, takes_files=True)


def state() -> dict[str, Any]:
    return {"model": nn.Linear(4, 6, dtype=torch.float64)}


def test_local_storage_says_what_its_file_system_has_left(tmp_path: Path) -> None:
    found = LocalStorage(tmp_path / "not/yet/there").room()
    assert found is not None
    facts = os.statvfs(tmp_path)
    assert 0 < found.num_bytes <= facts.f_blocks * facts.f_frsize
    assert found.folder == str(tmp_path)
    assert found.takes_files
    same = LocalStorage(tmp_path).room()
    assert same is not None
    assert same.place == found.place
    assert room_of(CountingStorage(LocalStorage(tmp_path))) is not None


def test_another_file_system_is_another_place(tmp_path: Path) -> None:
    shared_memory = LocalStorage("/dev/shm/none").room()
    here = LocalStorage(tmp_path).room()
    assert shared_memory is not None
    assert here is not None
    assert shared_memory.place != here.place


def test_object_stores_do_not_say() -> None:
    assert room_of(open_storage("memory://nowhere")) is None


@pytest.mark.parametrize(("layout", "expected"), [("sharded", [120, 120]), ("full", [240, 0])])
def test_what_all_hold_is_shared_among_those_who_write(tmp_path: Path, layout: Any, expected: list[int]) -> None:
    storage = SmallStorage(LocalStorage(tmp_path), 10**6)
    told = [
        room.told(storage, flatten(state(), rng=False), layout=layout, rank=rank, world_size=2)  # type: ignore[arg-type]
        for rank in (0, 1)
    ]
    assert [standing.needed_bytes for standing in told if standing is not None] == expected
    assert sum(expected) == STATE_BYTES


@pytest.mark.parametrize("layout", ["sharded", "full"])
def test_what_is_a_ranks_own_counts_for_each(tmp_path: Path, layout: Any) -> None:
    storage = SmallStorage(LocalStorage(tmp_path), 10**6)
    flat = flatten({"own": PerRank(torch.zeros(10))}, rng=False)
    for rank in (0, 1):
        told = room.told(storage, flat, layout=layout, rank=rank, world_size=2)  # type: ignore[arg-type]
        assert told is not None
        assert told.needed_bytes == 40


Fact = Standing | None
facts_of_ranks = st.lists(
    st.none() | st.builds(Standing, st.sampled_from("ab"), st.integers(0, 100), st.integers(0, 100)), min_size=1
)


def refusal(facts: Sequence[Fact], layout: Any, storage: LocalStorage) -> StorageFullError | None:
    try:
        room.judge(facts, layout=layout, step=5, storage=storage)
    except StorageFullError as error:
        return error
    return None


@given(facts=facts_of_ranks)
def test_a_sharded_save_is_refused_just_where_a_file_system_cannot_take_what_its_ranks_write(facts: list[Fact]) -> None:
    error = refusal(facts, "sharded", LocalStorage("/nowhere"))
    known = [fact for fact in facts if fact is not None]
    too_full = {
        place
        for place in "ab"
        if (there := [fact for fact in known if fact.place == place])
        and sum(fact.needed_bytes for fact in there) > min(fact.free_bytes for fact in there)
    }
    assert (error is not None) == bool(too_full)
    if error is not None:
        [place] = {fact.place for rank in error.ranks if (fact := facts[rank]) is not None}
        assert place in too_full
        assert error.ranks == [rank for rank, fact in enumerate(facts) if fact is not None and fact.place == place]
        assert error.needed_bytes > error.free_bytes


@given(facts=facts_of_ranks)
def test_a_full_save_is_refused_just_where_rank_0_cannot_take_what_all_have(facts: list[Fact]) -> None:
    error = refusal(facts, "full", LocalStorage("/nowhere"))
    if facts[0] is None:
        assert error is None
        return
    needed = sum(fact.needed_bytes for fact in facts if fact is not None)
    assert (error is not None) == (needed > facts[0].free_bytes)
    if error is not None:
        assert (error.needed_bytes, error.free_bytes, error.ranks) == (needed, facts[0].free_bytes, [0])


def test_the_refusal_says_what_is_needed_what_is_free_and_where(tmp_path: Path) -> None:
    error = refusal(
        [Standing("a", 5, 7), Standing("a", 1000, 8), Standing("b", 9, 9)], "sharded", LocalStorage(tmp_path)
    )
    assert error is not None
    said, fix = str(error).split("\nFix: ")
    assert said == (
        f"save of step 5 not begun: no room: ranks 0-1 would write 1,005 bytes there, 7 are free, in {str(tmp_path)!r}"
    )
    assert fix.startswith("free at least 998 bytes there (df -h /")
    assert f"distckpt prune {tmp_path}" in fix
    twin = from_wire(json.loads(json.dumps(to_wire(error))))
    assert (str(twin), twin.facts) == (str(error), error.facts)
    assert isinstance(twin, StorageFullError)
    assert twin.errno == error.errno == 28


@pytest.mark.parametrize(("ranks", "text"), [([3], "rank 3"), ([0, 1, 2, 5, 7, 8], "ranks 0-2, 5, 7-8")])
def test_ranks_are_told_in_ranges(ranks: list[int], text: str) -> None:
    assert numbered("rank", ranks) == text


def test_a_save_that_does_not_fit_is_not_begun_and_the_next_one_works(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run", background=False, rng=False) as ckpt:
        ckpt.save(1, state())
        inner = ckpt._home.storage
        ckpt._home.storage = ckpt._saver.storage = SmallStorage(inner, STATE_BYTES - 1)  # type: ignore[assignment,arg-type]
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(
            StorageFullError, match=f"would write {STATE_BYTES} bytes there, {STATE_BYTES - 1} are free"
        ):
            ckpt.save(2, state())
        assert sorted(tmp_path.rglob("*")) == before
        ckpt._home.storage = ckpt._saver.storage = SmallStorage(inner, STATE_BYTES)  # type: ignore[assignment,arg-type]
        ckpt.save(3, state())
        assert [one.step for one in ckpt.checkpoints] == [1, 3]


def test_room_that_is_just_being_made_is_waited_for(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run", keep=Retention(last=1), background=False, rng=False) as ckpt:
        ckpt.save(1, state())
        storage = SmallStorage(ckpt._home.storage, 0, STATE_BYTES)  # type: ignore[arg-type]
        ckpt._home.storage = ckpt._saver.storage = storage  # type: ignore[assignment]
        ckpt.save(2, state())
        assert storage.answers == [STATE_BYTES]

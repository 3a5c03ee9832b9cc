from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import ceilings, states
from benchmarks.ceilings import ALIGNMENT_BYTES, PIECE_BYTES, MemoryCopy, RawBytes, RawRead, write_state


@pytest.fixture(scope="module", params=states.FULL)
def state(request: pytest.FixtureRequest) -> states.State:
    return states.make(request.param, "tiny")


def test_a_state_has_what_its_objects_have(state: states.State) -> None:
    for key, each in state.objects.items():
        tensors = each.state_dict() if hasattr(each, "state_dict") else each
        named = {name for name in state.tensors() if name.startswith(f"{key}.")}
        assert named
        if key == "model":
            assert named == {f"model.{name}" for name in tensors}
    assert state.num_bytes == sum(tensor.nbytes for tensor in state.tensors().values())


def test_an_optimizer_has_its_tensors_before_anything_is_measured(state: states.State) -> None:
    if "optimizer" in state.objects:
        assert any(name.startswith("optimizer.state.") for name in state.tensors())


def test_training_changes_a_state(state: states.State) -> None:
    before = state.digest()
    state.train()
    assert (state.digest() == before) == (state.name == "small")


@pytest.mark.parametrize("hashed", [False, True])
def test_scrambling_is_found_out_and_a_raw_read_brings_all_back(
    state: states.State, hashed: bool, tmp_path: Path
) -> None:
    before = state.digest()
    write_state(state, tmp_path / "raw")
    state.scramble()
    assert state.digest() != before
    RawRead(state, hashed=hashed).read(tmp_path / "raw")
    assert state.digest() == before


def test_a_hashed_raw_read_hashes_every_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = states.make("resnet50", "tiny")
    write_state(state, tmp_path / "raw")
    hashed: list[int] = []

    class Counting:
        def update(self, data: memoryview) -> None:
            hashed.append(len(data))

        def digest(self) -> None:
            pass

    monkeypatch.setattr(ceilings.xxhash, "xxh3_128", Counting)
    RawRead(state, hashed=True).read(tmp_path / "raw")
    assert sum(hashed) == state.num_bytes


def test_ranks_that_begin_elsewhere_read_the_same(state: states.State, tmp_path: Path) -> None:
    before = state.digest()
    write_state(state, tmp_path / "raw")
    for part in range(3):
        state.scramble()
        RawRead(state, part=part, num_parts=3).read(tmp_path / "raw")
        assert state.digest() == before


def test_a_raw_read_fills_the_tensors_that_a_state_has_now(tmp_path: Path) -> None:
    state = states.make("small", "tiny")
    before = state.digest()
    write_state(state, tmp_path / "raw")
    reader = RawRead(state)
    tensors = state.objects["tensors"]
    tensors.update({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    reader.read(tmp_path / "raw")
    assert state.digest() == before


def test_a_state_is_the_same_when_it_is_made_again() -> None:
    assert states.make("small", "tiny").digest() == states.make("small", "tiny").digest()


def test_small_tensors_are_as_many_as_were_asked_for() -> None:
    assert len(states.small_tensors(7).tensors()) == 7


def test_an_unknown_state_is_named() -> None:
    with pytest.raises(ValueError, match="no state 'resnet1'"):
        states.make("resnet1", "tiny")


def test_a_raw_read_stops_at_a_file_that_is_too_short(tmp_path: Path) -> None:
    state = states.make("small", "tiny")
    (tmp_path / "raw").write_bytes(bytes(state.num_bytes - 1))
    with pytest.raises(EOFError):
        RawRead(state).read(tmp_path / "raw")


@pytest.mark.parametrize("num_bytes", [1, ALIGNMENT_BYTES, PIECE_BYTES + 7])
@pytest.mark.parametrize("method", ["write_buffered", "write_reserved", "write_direct"])
def test_raw_writes_write_the_same_bytes(tmp_path: Path, num_bytes: int, method: str) -> None:
    raw = RawBytes(num_bytes)
    raw.write_buffered(tmp_path / "expected")
    try:
        getattr(raw, method)(tmp_path / "found")
    except OSError as error:
        pytest.skip(f"this file system has no direct writes: {error}")
    assert (tmp_path / "found").stat().st_size == num_bytes
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_memory_copy_copies_everything() -> None:
    tensors = [torch.arange(7, dtype=torch.int64), torch.tensor(2.0), torch.ones(3, 5, dtype=torch.bfloat16)]
    copy = MemoryCopy(tensors)
    copy.copy(num_times=2)
    assert all(torch.equal(a, b) for a, b in zip(copy._to, tensors, strict=True))

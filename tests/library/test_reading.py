"""Reading: straight into tensors, each segment once and checked, whatever the tensors look like."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import distckpt
from distckpt import CheckpointManager, nodecopy, sharedmemory
from distckpt.datafiles import SEGMENT_BYTES, Reader, write
from distckpt.errors import CheckpointDamagedError, StateMismatchError, UsageError
from distckpt.hostmemory import HostMemory
from distckpt.manifest import Segment
from distckpt.nodecopy import NodeCopy, Part
from distckpt.readtasks import Range, Task, split
from distckpt.shards import bounce, boxes
from distckpt.storage import CountingStorage, LocalStorage

NAME = "attempt/rank-00000.safetensors"
SIZES = [4096, SEGMENT_BYTES, SEGMENT_BYTES, 1000]


@pytest.fixture
def stored(tmp_path: Path) -> tuple[CountingStorage, Any, bytes]:
    data = os.urandom(sum(SIZES))
    parts, begin = [], 0
    for size in SIZES:
        parts.append(memoryview(data)[begin : begin + size])
        begin += size
    storage = CountingStorage(LocalStorage(tmp_path))
    return storage, write(storage, "one", NAME, rank=0, parts=parts, num_bytes=len(data)), data


def reader_of(stored: tuple[CountingStorage, Any, bytes]) -> Reader:
    storage, file, _ = stored
    return Reader(storage, "one", [file], path="one", step=1)


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 10)],
        [(4096, 4096 + 2 * SEGMENT_BYTES)],
        [(100, 200), (300, 5000), (5000, 5001), (SEGMENT_BYTES, SEGMENT_BYTES + 9000)],
        [(0, 100), (50, 150), (50, 60)],
        [(sum(SIZES) - 7, sum(SIZES))],
        [(5, 5)],
        [],
    ],
    ids=str,
)
def test_ranges_are_filled(stored: tuple[CountingStorage, Any, bytes], spans: list[tuple[int, int]]):
    targets = [bytearray(end - begin) for begin, end in spans]
    ranges = [Range(begin=begin, into=memoryview(t)) for (begin, _), t in zip(spans, targets, strict=True)]
    reader_of(stored).fill({0: ranges[::-1]})
    assert [bytes(t) for t in targets] == [stored[2][begin:end] for begin, end in spans]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    spans=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=6),
    most=st.integers(1, 30),
)
def test_a_task_in_parts_has_each_segment_once_and_all_that_is_wanted_of_it(sizes, spans, most):
    segments = [Segment(num_bytes=size, digest="0" * 32) for size in sizes]
    ranges = [Range(begin=begin, into=memoryview(bytearray(size))) for begin, size in sorted(spans)]
    whole = Task(index=3, number=5, begin=10, segments=segments, ranges=ranges)
    parts = list(split(whole, most))
    assert [segment for part in parts for segment in part.segments] == segments
    assert [part.number for part in parts] == [5 + sum(len(p.segments) for p in parts[:n]) for n in range(len(parts))]
    place = whole.begin
    for part in parts:
        assert part.begin == place
        assert part.num_bytes <= most or len(part.segments) == 1
        place += part.num_bytes
        assert part.ranges == [r for r in ranges if r.begin < place and r.end > part.begin]


def test_each_segment_is_read_once_and_the_rest_only_when_asked(stored: tuple[CountingStorage, Any, bytes]):
    storage, reader = stored[0], reader_of(stored)
    reader.fill({0: [Range(begin=4096 + 5, into=memoryview(bytearray(10)))]})
    first = storage.counted("read").num_bytes
    assert SEGMENT_BYTES <= first < sum(SIZES)
    reader.check_rest([0])
    assert storage.counted("read").num_bytes == sum(SIZES)
    reader.check_rest([0])
    assert storage.counted("read").num_bytes == sum(SIZES)


@pytest.mark.parametrize("place", [0, 5000, 4096 + SEGMENT_BYTES, sum(SIZES) - 1])
def test_a_wrong_byte_is_found_wherever_it_is_read(stored: tuple[CountingStorage, Any, bytes], place: int):
    path = stored[0].inner.root / "one" / NAME  # type: ignore[attr-defined]
    data = bytearray(stored[2])
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match="wrong bytes"):
        reader_of(stored).fill({0: [Range(begin=place, into=memoryview(bytearray(1)))]})
    with pytest.raises(CheckpointDamagedError, match="wrong bytes"):
        reader_of(stored).check({0: [(place, place + 1)]})
    with pytest.raises(CheckpointDamagedError, match="wrong bytes"):
        reader_of(stored).check_rest([0])


def test_a_range_behind_the_end_is_refused(stored: tuple[CountingStorage, Any, bytes]):
    with pytest.raises(CheckpointDamagedError, match="shorter than its tensors"):
        reader_of(stored).fill({0: [Range(begin=sum(SIZES) - 1, into=memoryview(bytearray(2)))]})


def targets() -> dict[str, torch.Tensor]:
    return {
        "large": torch.zeros(300_000),
        "turned": torch.zeros(400, 300).T,
        "strided": torch.zeros(100_000)[::2],
        "small": torch.zeros(3),
        "scalar": torch.tensor(0.0),
        "small turned": torch.zeros(3, 4).T,
        "bytes": torch.zeros(5, dtype=torch.uint8),
        "negated": torch._neg_view(torch.zeros(4)),
    }


def values() -> dict[str, torch.Tensor]:
    return {name: torch.rand(t.shape).mul(100).to(t.dtype) for name, t in targets().items()}


@pytest.mark.parametrize("whose", ["a restart's", "a later one"])
def test_what_is_restored_lies_in_the_tensors_that_were_there(tmp_path: Path, whose: str):
    saved = values()
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        ckpt.save(1, {"t": saved})
    there = targets()
    same = dict(there)
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        if whose == "a later one":
            ckpt.restore({"t": targets()})
        assert ckpt.restore({"t": there}) == 1
    for name, tensor in there.items():
        assert tensor is same[name]
        assert torch.equal(tensor, saved[name]), name


@pytest.mark.parametrize("tied", ["in both", "in the checkpoint", "nowhere"])
@pytest.mark.parametrize("shapes", [[(3,), (4,), (3,)], [(3, 4), (), (3, 4)]], ids=str)
def test_a_dict_of_plain_tensors_is_restored_where_it_lies(tmp_path: Path, shapes: list[tuple[int, ...]], tied: str):
    saved = {f"{number}": torch.rand(shape) for number, shape in enumerate(shapes)}
    there = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    saved["last"] = saved["0"] if tied != "nowhere" else torch.rand(shapes[0])
    there["last"] = there["0"] if tied == "in both" else torch.zeros(shapes[0])
    same = dict(there)
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        ckpt.save(1, {"row": saved})
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        assert ckpt.restore({"row": there}) == 1
    for name, tensor in there.items():
        assert tensor is same[name]
        assert torch.equal(tensor, saved[name]), name


def test_small_tensors_of_odd_strides_between_others_are_filled(tmp_path: Path):
    wide = torch.zeros(4, 6)
    there = {"a": torch.zeros(3), "b": wide[:, ::2], "c": wide[:, 1], "d": torch.zeros(2, 2)}
    saved = {name: torch.rand(tensor.shape) for name, tensor in there.items()}
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        ckpt.save(1, saved)
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        assert ckpt.restore(there) == 1
    assert all(torch.equal(tensor, saved[name]) for name, tensor in there.items())


def trained(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300))
    optimizer = torch.optim.AdamW(model.parameters(), lr=seed)
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def content(state: dict[str, Any]) -> list[torch.Tensor]:
    moments = [each for of in state["optimizer"].state.values() for each in of.values()]
    return [t.detach().clone() for t in (*state["model"].state_dict().values(), *moments)]


def test_optimizer_state_is_read_in_place_or_made(tmp_path: Path):
    saved = trained(1)
    distckpt.save(tmp_path / "one", saved)
    there, fresh = trained(2), {"model": nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300))}
    fresh["optimizer"] = torch.optim.AdamW(fresh["model"].parameters())  # type: ignore[assignment]
    moment = next(iter(there["optimizer"].state.values()))["exp_avg"]
    for state in (there, fresh):
        distckpt.load(tmp_path / "one", state)
        assert all(map(torch.equal, content(state), content(saved)))
        assert state["optimizer"].param_groups[0]["lr"] == 1
    assert next(iter(there["optimizer"].state.values()))["exp_avg"] is moment


def test_a_modules_tensor_that_memory_does_not_tell_is_given_beside_those_that_are_read_in_place(tmp_path: Path):
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        made = nn.Linear(300, 300)
        made.register_buffer("turned", torch.randn(300, dtype=torch.complex64).conj())
        return made

    saved, there = model(1), model(2)
    assert there.turned.is_conj()
    places = [tensor.data_ptr() for tensor in there.state_dict().values()]
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        ckpt.save(1, {"model": saved})
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        assert ckpt.restore({"model": there}) == 1
    assert [tensor.data_ptr() for tensor in there.state_dict().values()] == places
    assert all(map(torch.equal, there.state_dict().values(), saved.state_dict().values()))
    assert there.turned.is_conj()


def test_a_module_with_loading_code_of_its_own_is_given_the_tensors(tmp_path: Path):
    class Doubling(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[f"{prefix}weight"] = self.weight.detach() * 2
            destination[f"{prefix}bias"] = self.bias.detach()

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
            with torch.no_grad():
                self.weight.copy_(state_dict[f"{prefix}weight"] / 2)
                self.bias.copy_(state_dict[f"{prefix}bias"])

    one, other = Doubling(3, 3), Doubling(3, 3)
    distckpt.save(tmp_path / "one", {"model": one})
    distckpt.load(tmp_path / "one", {"model": other})
    assert torch.equal(one.weight, other.weight)


def damaged(folder: Path) -> None:
    [file] = folder.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-10] ^= 4
    file.write_bytes(data)


def test_a_load_that_meets_damage_leaves_the_state_as_it_was(tmp_path: Path):
    distckpt.save(tmp_path / "one", trained(1))
    damaged(tmp_path / "one")
    state = trained(2)
    before = content(state)
    with pytest.raises(CheckpointDamagedError) as caught:
        distckpt.load(tmp_path / "one", state)
    assert all(map(torch.equal, content(state), before))
    assert not hasattr(caught.value, "__notes__")


def test_a_restart_passes_over_damage_to_the_older_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        ckpt.save(1, trained(1))
        ckpt.save(2, trained(2))
    damaged(tmp_path / "step-000000000002")
    state = trained(3)
    with caplog.at_level(logging.WARNING), CheckpointManager(tmp_path, signals=()) as ckpt:
        assert ckpt.restore(state) == 1
        ckpt.save(3, state)
    assert "damaged checkpoint" in caplog.text
    assert all(map(torch.equal, content(state), content(trained(1))))


def test_a_restart_without_a_good_one_says_that_the_state_is_torn_and_does_not_save_it(tmp_path: Path):
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        ckpt.save(1, trained(1))
    damaged(tmp_path / "step-000000000001")
    state = trained(2)
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        with pytest.raises(CheckpointDamagedError) as caught:
            ckpt.restore(state)
        assert "holds parts of what was read" in caught.value.__notes__[0]
        with pytest.raises(UsageError, match="not saved"):
            ckpt.save(2, state)
        with pytest.raises(UsageError, match="not saved"):
            ckpt.step(2, state, stop=True)


def test_a_restart_that_does_not_fit_changes_nothing(tmp_path: Path):
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        ckpt.save(1, trained(1))
    state = {**trained(2), "more": torch.ones(1)}
    before = content(state)
    with CheckpointManager(tmp_path, signals=()) as ckpt:
        with pytest.raises(StateMismatchError):
            ckpt.restore(state)
        assert all(map(torch.equal, content(state), before))
        ckpt.save(2, state)


@pytest.mark.skipif(sharedmemory.place() is None, reason="no shared memory")
def test_a_node_brings_each_byte_once_and_leaves_no_file(stored: tuple[CountingStorage, Any, bytes]):
    storage, file, data = stored
    spans = {0: [(0, file.num_bytes)]}
    copies = [
        NodeCopy([file], folder="one", part=Part(token="t" * 16, number=number, num_ranks=3), otherwise=storage)
        for number in range(3)
    ]
    before = set(sharedmemory.SHARED_MEMORY.iterdir())
    for copy in copies:
        copy.fetch(reader_of(stored), spans)
    assert storage.counted("read").num_bytes == file.num_bytes
    for copy in copies:
        copy.forget_names()
    assert set(sharedmemory.SHARED_MEMORY.iterdir()) == before
    for copy in copies:
        into = memoryview(bytearray(file.num_bytes))
        Reader(copy, "one", [file], path="one", step=1).fill({0: [Range(begin=0, into=into)]})
        assert bytes(into) == data
        copy.close()


def test_no_room_in_shared_memory_is_noticed():
    assert not sharedmemory.has_room(1 << 60)
    assert sharedmemory.has_room(1)


def parts(places: list[Any]) -> list[tuple[str, int, int] | None]:
    found = json.loads(json.dumps(nodecopy.teams(places)))  # as it comes to the other ranks
    if found is None:
        return [None] * len(places)
    mine = [nodecopy.part_of(found, rank) for rank in range(len(places))]
    return [None if part is None else (part.token, part.number, part.num_ranks) for part in mine]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([None, "a", "b", "c", "d"]), max_size=24))
def test_ranks_that_share_a_memory_and_want_the_same_divide_the_work(places):
    found = parts(places)
    for rank, (place, part) in enumerate(zip(places, found, strict=True)):
        team = [other for other in range(len(places)) if places[other] == place]
        if place is None or len(team) == 1:
            assert part is None
            continue
        assert part is not None
        assert part[1:] == (team.index(rank), len(team))
        assert [other for other in range(len(places)) if (found[other] or ("",))[0] == part[0]] == team


def test_what_tells_the_ranks_of_equal_nodes_who_shares_is_of_constant_size():
    sizes = {
        num_nodes: len(json.dumps(nodecopy.teams([f"node-{rank // 8}" for rank in range(8 * num_nodes)])))
        for num_nodes in (2, 2048)
    }
    assert sizes[2048] <= sizes[2] + 8


def far_state(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "empty": torch.empty(0, 3),
        "scalar": made(1).double()[0],
        "flags": made(1001) > 0,
        "half": made(5, 7, dtype=torch.bfloat16),
        "turned": made(300, 40).T.contiguous().T,
        "large": made(700, 300),
        "larger than a half": made(1500, 700),
        "larger and turned": made(900, 800).T.contiguous().T,
        **{f"small {index}": made(index) for index in range(200)},
    }


@pytest.mark.parametrize("size", [0, 40_000, 1 << 20, 64 << 20], ids=["no room", "little room", "more", "all at once"])
def test_what_lies_on_a_gpu_is_read_by_halves(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = {"x": far_state(0), "model": nn.Linear(50, 60)}
    distckpt.save(tmp_path / "one", state)
    made: list[int] = []

    class Memory(HostMemory):
        def __init__(self, num_bytes: int, *, pinned: bool) -> None:
            assert pinned
            made.append(num_bytes)
            super().__init__(num_bytes)
            self.view[:] = bytes([0xEE]) * len(self.view)

    monkeypatch.setattr(boxes, "_is_far", lambda target: True)
    monkeypatch.setattr(boxes, "HALF_BYTES", size)
    monkeypatch.setattr(bounce, "HALF_BYTES", size)
    monkeypatch.setattr(boxes, "PIECE_BYTES", 30_000)
    monkeypatch.setattr(boxes, "FAR_SMALL_BYTES", 3_000)
    monkeypatch.setattr(bounce, "HostMemory", Memory)
    other = {"x": far_state(1), "model": nn.Linear(50, 60)}
    distckpt.load(tmp_path / "one", other)
    for name, tensor in state["x"].items():
        assert torch.equal(other["x"][name], tensor), name
    assert torch.equal(other["model"].weight, state["model"].weight)
    assert len(made) == {0: 0, 64 << 20: 1}.get(size, 2)
    assert all(num_bytes <= size for num_bytes in made)
    assert sum(made) <= 64 * 300 + sum(tensor.nbytes for tensor in state["x"].values()) + 20_000


def test_a_buffer_is_not_taken_again_before_what_it_held_is_copied(monkeypatch: pytest.MonkeyPatch):
    waited: list[int] = []

    class Event:
        def __init__(self, number: int) -> None:
            self._number = number

        def synchronize(self) -> None:
            waited.append(self._number)

    numbers = iter(range(100))
    monkeypatch.setattr(bounce, "_recorded", lambda device: Event(next(numbers)))
    monkeypatch.setattr(bounce, "HALF_BYTES", 1 << 12)
    made = bounce.BounceBuffers(10 << 12)
    places = []
    for turn in range(4):
        room = made.taken([1000], torch.float32)
        assert room is not None
        assert made.taken([1000], torch.float32) is None
        places.append(room.data_ptr())
        assert waited == list(range(turn - 1))
        made.turn([torch.device("cpu")])
    assert places[0] == places[2] != places[1] == places[3]

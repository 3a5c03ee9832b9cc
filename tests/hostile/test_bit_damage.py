"""A flipped bit or other damage anywhere in the newest checkpoint sends a restore to the older one, content exact."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import CheckpointManager
from distckpt.checksum import digest
from distckpt.names import MANIFEST

FLIPS, OTHERS = 100, 60  # in each run; those of a long run are in the marks below
SHAPES = {"weights": (300, 70), "bias": (70,), "small": (3, 5, 7)}
NEWEST, OLDER = "step-000000000030", "step-000000000020"

Damage = Callable[[Path, random.Random], str]


def state(step: int) -> dict[str, Any]:
    """Return a state that tells in each number of which step it is."""
    tensors = {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape) * 1.25 + step
        for name, shape in SHAPES.items()
    }
    return {**tensors, "count": step, "history": [step, step / 3, f"step {step}", b"\0" * 40]}


def content(found: dict[str, Any]) -> str:
    tensors = "".join(digest(found[name].numpy().tobytes()) for name in SHAPES)
    return f"{tensors} {found['count']} {found['history']}"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write checkpoints 10, 20 and 30."""
    directory = tmp_path_factory.mktemp("original")
    with CheckpointManager(directory, keep=10, background=False, rng=False, signals=()) as manager:
        for step in (10, 20, 30):
            manager.save(step, state(step))
    return directory


def data_file(folder: Path) -> Path:
    [path] = folder.rglob("*.safetensors")
    return path


def any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def flip(folder: Path, rng: random.Random) -> str:
    path = any_file(folder, rng)
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} of {path.name}"


def truncate(folder: Path, rng: random.Random) -> str:
    path = any_file(folder, rng)
    keep = rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:keep])
    return f"{path.name} cut to {keep} bytes"


def extend(folder: Path, rng: random.Random) -> str:
    path = any_file(folder, rng)
    more = rng.randbytes(rng.randrange(1, 9000))
    path.write_bytes(path.read_bytes() + more)
    return f"{len(more)} bytes behind {path.name}"


def blank(folder: Path, rng: random.Random) -> str:
    """Zero a block that was not zero before."""
    path = any_file(folder, rng)
    data = bytearray(path.read_bytes())
    size = rng.choice([1, 64, 512, 4096])
    while True:
        place = rng.randrange(len(data)) // size * size
        if any(data[place : place + size]):
            break
    data[place : place + size] = bytes(len(data[place : place + size]))
    path.write_bytes(data)
    return f"{size} zeros at {place} of {path.name}"


def garble(folder: Path, rng: random.Random) -> str:
    path = any_file(folder, rng)
    data = bytearray(path.read_bytes())
    place, size = rng.randrange(len(data)), rng.randrange(1, 5000)
    noise = rng.randbytes(len(data[place : place + size]))
    data[place : place + size] = noise if noise != data[place : place + size] else bytes(x ^ 1 for x in noise)
    path.write_bytes(data)
    return f"noise at {place} of {path.name}"


def shift(folder: Path, rng: random.Random) -> str:
    """Drop a byte, and add one at the end: the size is right."""
    path = any_file(folder, rng)
    data = path.read_bytes()
    for place in rng.sample(range(len(data) - 1), 50):
        moved = data[:place] + data[place + 1 :] + data[-1:]
        if moved != data:
            path.write_bytes(moved)
            return f"{path.name} shifted from {place} on"
    raise AssertionError("all bytes are the same")


def swap_blocks(folder: Path, rng: random.Random) -> str:
    path = data_file(folder)
    data = bytearray(path.read_bytes())
    while True:
        one, other = (rng.randrange(len(data) // 512) * 512 for _ in range(2))
        first, second = data[one : one + 512], data[other : other + 512]
        if first != second:
            break
    data[one : one + 512], data[other : other + 512] = second, first
    path.write_bytes(data)
    return f"blocks {one} and {other} swapped"


def swap_files(folder: Path, rng: random.Random) -> str:
    """Put the older checkpoint's data file, which has the same size, in the place of this one's, and the other way."""
    mine, theirs = data_file(folder), data_file(folder.parent / "step-000000000010")
    assert mine.stat().st_size == theirs.stat().st_size
    first, second = mine.read_bytes(), theirs.read_bytes()
    mine.write_bytes(second)
    theirs.write_bytes(first)
    return "data files swapped"


def foreign(folder: Path, rng: random.Random) -> str:
    path = data_file(folder)
    path.write_bytes(rng.randbytes(path.stat().st_size))
    return "a foreign data file of the same size"


def remove(folder: Path, rng: random.Random) -> str:
    path = data_file(folder)
    path.unlink()
    return f"{path.name} missing"


def misplace(folder: Path, rng: random.Random) -> str:
    """Leave a file there under another name only."""
    path = data_file(folder)
    path.rename(path.with_name(f"rank-{rng.randrange(1, 9):05d}.safetensors"))
    return f"{path.name} under another name"


def other_manifest(folder: Path, rng: random.Random) -> str:
    shutil.copy(folder.parent / OLDER / MANIFEST, folder / MANIFEST)
    return "the older one's manifest"


def hole(folder: Path, rng: random.Random) -> str:
    """Cut the file, and let the file system fill it up to its old size."""
    path = data_file(folder)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(rng.randrange(size - 5000))
        file.truncate(size)
    return "a hole up to the end"


OTHER_KINDS: tuple[Damage, ...] = (
    *(truncate, extend, blank, garble, shift, swap_blocks, swap_files),
    *(foreign, remove, misplace, other_manifest, hole),
)


def damages(num_flips: int, num_others: int) -> Iterator[Damage]:
    yield from [flip] * num_flips
    for index in range(num_others):
        yield OTHER_KINDS[index % len(OTHER_KINDS)]


@pytest.mark.parametrize(
    ("num_flips", "num_others"),
    [(FLIPS, OTHERS), pytest.param(2000, 500, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_restore_takes_the_newest_whole_one_after_any_damage(
    tmp_path: Path, original: Path, num_flips: int, num_others: int
) -> None:
    for number, damage in enumerate(damages(num_flips, num_others)):
        directory = tmp_path / "run"
        shutil.copytree(original, directory)
        what = f"damage {number}: {damage(directory / NEWEST, random.Random(number))}"
        found = state(0)
        with CheckpointManager(directory, rng=False, signals=()) as manager:
            assert manager.restore(found) == 20, what
            assert [one.step for one in manager.checkpoints] == [10, 20], what
        assert content(found) == content(state(20)), what
        shutil.rmtree(directory)


def test_what_is_whole_comes_back_whole(tmp_path: Path, original: Path) -> None:
    """So that the test above does not pass because nothing restores."""
    directory = tmp_path / "run"
    shutil.copytree(original, directory)
    twin = data_file(directory / NEWEST)
    shutil.copy(twin, twin.with_name("rank-00001.safetensors"))  # a file that nobody names does no harm
    found = state(0)
    with CheckpointManager(directory, rng=False, signals=()) as manager:
        assert manager.restore(found) == 30
    assert content(found) == content(state(30))

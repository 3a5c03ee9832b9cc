"""Reading ahead brings the newest checkpoint to memory, and never decides or breaks anything."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import distckpt
from distckpt import names, readahead
from distckpt.datafiles import write
from distckpt.errors import StorageError
from distckpt.manifest import Manifest, serialize
from distckpt.memorytier import MemoryTier
from distckpt.storage import LocalStorage, OpenFile

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TRAIN = Path(__file__).parents[2] / "train.py"
SIZES = [300_001, 0, 70_000, 5]  # of the ranks' files; one wrote nothing


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


def checkpoint(directory: Path, step: int) -> list[Path]:
    """Write a checkpoint of files that hold no tensor, and return these."""
    storage, folder, attempt = LocalStorage(directory), names.step_name(step), names.new_attempt()
    files = [
        write(storage, folder, names.rank_file(attempt, rank), rank=rank, parts=[memoryview(bytes(n))], num_bytes=n)
        for rank, n in enumerate(SIZES)
        if n
    ]
    manifest = Manifest(
        **{"step": step, "run": "r", "attempt": attempt, "layout": "sharded", "world_size": 4, "created": 1.0},
        **{"writer": {}, "files": tuple(files), "tensors": {}, "objects": {}},
    )
    storage.publish(f"{folder}/{names.MANIFEST}", serialize(manifest))
    return [directory / folder / file.name for file in files]


class Noting(LocalStorage):
    """Local storage that notes which bytes of which file are touched."""

    touched: list[tuple[str, int, int]]

    @contextmanager
    def reading(self, name: str) -> Iterator[OpenFile]:
        with super().reading(name) as file:
            yield _NotingFile(file, name, self.touched)


class _NotingFile:
    def __init__(self, inner: OpenFile, name: str, touched: list[tuple[str, int, int]]) -> None:
        self._inner, self._name, self._touched = inner, name, touched
        self.read = inner.read

    def seen(self, begin: int, num_bytes: int) -> AbstractContextManager[memoryview | None]:
        self._touched.append((self._name, begin, begin + num_bytes))
        return self._inner.seen(begin, num_bytes)


def noted(directory: Path) -> tuple[readahead.Prefetch, list[tuple[str, int, int]]]:
    storage = Noting(directory)
    storage.touched = []
    ahead = readahead.Prefetch(storage)
    ahead.wait(60)
    return ahead, storage.touched


def test_as_a_context_it_keeps_the_collector_off_as_long_as_it_lasts(tmp_path: Path) -> None:
    before = gc.get_freeze_count()
    try:
        with distckpt.prefetch(tmp_path) as ahead:
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
        ahead.wait(60)
    finally:
        gc.unfreeze()


def test_what_the_nodes_memory_keeps_is_not_read_ahead(tmp_path: Path) -> None:
    [first, *others] = checkpoint(tmp_path, 1)
    tier = MemoryTier(str(tmp_path))
    with tier.copying(first.parent.name, rank=0, num_bytes=first.stat().st_size) as copy:
        copy(0, memoryview(first.read_bytes()))
    storage = Noting(tmp_path)
    for memory_tier, files in ((True, others), (False, [first, *others])):
        storage.touched = []
        readahead.Prefetch(storage, memory_tier=memory_tier).wait(60)
        assert {name for name, _, _ in storage.touched} == {str(file.relative_to(tmp_path)) for file in files}
    tier.leave(in_good_order=True)


def test_all_of_the_newest_checkpoint_is_read_and_nothing_of_an_older_one(tmp_path):
    checkpoint(tmp_path, 1)
    newest = checkpoint(tmp_path, 2)
    ahead, touched = noted(tmp_path)
    assert (ahead.error, ahead.num_bytes) == (None, sum(SIZES))
    assert {tmp_path / name for name, _, _ in touched} == set(newest)


def test_what_a_killed_save_has_left_beside_it_is_not_read(tmp_path):
    stray = checkpoint(tmp_path, 2)[0].parent.parent / names.rank_file(names.new_attempt(), 0)
    stray.parent.mkdir()
    stray.write_bytes(bytes(1000))
    assert noted(tmp_path)[0].num_bytes == sum(SIZES)


def test_the_ranks_of_a_node_read_each_byte_once_between_them(tmp_path, monkeypatch):
    checkpoint(tmp_path, 2)
    parts: list[tuple[str, int, int]] = []
    for rank in range(3):
        for name, value in zip(RANKS, (rank, 3, rank, 3), strict=True):
            monkeypatch.setenv(name, str(value))
        ahead, touched = noted(tmp_path)
        assert abs(ahead.num_bytes - sum(SIZES) / 3) <= 1
        parts += touched
    end: dict[str, int] = {}
    for name, first, last in sorted(parts):
        assert end.get(name, 0) == first
        end[name] = last
    assert sorted(end.values()) == sorted(size for size in SIZES if size)


def test_a_node_of_several_reads_only_what_its_own_ranks_wrote(tmp_path, monkeypatch):
    files = checkpoint(tmp_path, 2)
    for name, value in zip(RANKS, (2, 4, 0, 2), strict=True):
        monkeypatch.setenv(name, str(value))
    _, touched = noted(tmp_path)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    touched += noted(tmp_path)[1]
    assert {tmp_path / name for name, _, _ in touched} == set(files[1:])


def test_no_more_is_read_than_there_is_room_for(tmp_path, monkeypatch):
    checkpoint(tmp_path, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**9))  # so many share what is left of the memory
    monkeypatch.setenv("WORLD_SIZE", str(10**9))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert noted(tmp_path)[0].num_bytes <= 1000


def test_a_directory_that_is_not_there_or_empty_is_no_error(tmp_path):
    assert distckpt.prefetch(tmp_path / "none").wait(60) == 0
    assert distckpt.prefetch(tmp_path).wait(60) == 0
    assert not (tmp_path / "none").exists()


def test_what_goes_wrong_is_kept_and_raises_nothing(tmp_path):
    files = checkpoint(tmp_path, 2)
    (files[0].parent.parent / names.MANIFEST).write_bytes(b"no manifest")
    broken = distckpt.prefetch(tmp_path)
    assert (broken.wait(60), type(broken.error).__name__) == (0, "CheckpointDamagedError")
    nowhere = distckpt.prefetch("nosuchscheme://bucket/run")
    assert nowhere.wait(60) == 0
    assert nowhere.error is not None


def test_a_file_that_vanishes_meanwhile_ends_the_reading(tmp_path):
    class Vanishing(LocalStorage):
        @contextmanager
        def reading(self, name: str) -> Iterator[OpenFile]:
            raise StorageError(path=name, action="read", cause="it is gone")
            yield

    checkpoint(tmp_path, 2)
    ahead = readahead.Prefetch(Vanishing(tmp_path))
    assert ahead.wait(60) == 0
    assert isinstance(ahead.error, StorageError)


def test_the_command_line_is_read_and_the_reading_begun_before_torch_is_imported(tmp_path):
    checkpoint(tmp_path, 2)
    code = f"""
import runpy, sys
from distckpt import prefetch, trainer
runpy.run_path({str(TRAIN)!r}, run_name="imported")
trainer.show_messages()
config = trainer.parse_config(["--checkpoint.directory", {str(tmp_path)!r}])
assert prefetch(config.checkpoint.directory).wait(60) == {sum(SIZES)}
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_it_spares_the_collector_is_given_back_when_the_process_ends(tmp_path: Path):
    lines = [
        "import atexit, gc",
        "atexit.register(lambda: print('frozen at the end:', gc.get_freeze_count()))",
        "import distckpt",
        f"with distckpt.prefetch({str(tmp_path)!r}):",
        "    import json.tool",
        "print('frozen:', gc.get_freeze_count() > 0)",
    ]
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["frozen: True", "frozen at the end: 0"]

"""An open file gives the same bytes by reading and by sight, and no memory that is not there."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from distckpt.storage import LocalStorage, StepwiseStorage, mapping
from distckpt.storage.mapping import LocalFile, copy

DATA = os.urandom(3 * mmap.PAGESIZE + 100)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[LocalFile]:
    (tmp_path / "file").write_bytes(DATA)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    opened = LocalFile(fd, "file")
    yield opened
    opened.close()
    os.close(fd)


@pytest.mark.parametrize(("begin", "size"), [(0, 10), (5, 5000), (mmap.PAGESIZE, mmap.PAGESIZE), (0, len(DATA))])
def test_both_ways_give_the_same_bytes(file: LocalFile, begin: int, size: int):
    into = [bytearray(size // 2), bytearray(0), bytearray(size - size // 2)]
    file.read(begin, [memoryview(each) for each in into])
    assert b"".join(into) == DATA[begin : begin + size]
    with file.seen(begin, size) as seen:
        assert seen is None or bytes(seen) == DATA[begin : begin + size]


def test_what_is_seen_again_is_still_there(file: LocalFile):
    for _ in range(3):
        with file.seen(100, 9000) as seen:
            assert seen is None or bytes(seen) == DATA[100:9100]


def test_nothing_is_seen_behind_the_end(file: LocalFile):
    with file.seen(len(DATA) - 5, 6) as seen:
        assert seen is None
    with pytest.raises(EOFError, match="more are needed"):
        file.read(len(DATA) - 5, [memoryview(bytearray(6))])


def test_a_file_that_was_cut_since_it_was_opened_is_not_seen_but_read(file: LocalFile, tmp_path: Path):
    os.truncate(tmp_path / "file", 10)
    with file.seen(2 * mmap.PAGESIZE, mmap.PAGESIZE) as seen:
        assert seen is None
    with pytest.raises(EOFError):
        file.read(2 * mmap.PAGESIZE, [memoryview(bytearray(1))])


def test_files_of_other_machines_are_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mapping, "_OWN", set())
    storage = LocalStorage(tmp_path)
    storage.put("file", [DATA])
    assert isinstance(storage, StepwiseStorage)
    with storage.reading("file") as file, file.seen(0, 10) as seen:
        assert seen is None


def test_copying_copies():
    target, source = bytearray(10), bytearray(b"0123456789")
    copy(memoryview(target)[2:5], memoryview(source)[5:8])
    copy(memoryview(target)[0:0], memoryview(source)[0:0])
    assert target == b"\0\x00567\0\0\0\0\0"


def test_an_empty_file_can_be_opened(tmp_path: Path):
    (tmp_path / "file").touch()
    with LocalStorage(tmp_path).reading("file") as file, file.seen(0, 0) as seen:
        assert seen is None

"""Writes past the page cache put the same bytes into the file, whatever does not fit."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distckpt.errors import StorageError
from distckpt.storage import LocalStorage, direct


def aligned(num_bytes: int) -> memoryview:
    memory = mmap.mmap(-1, max(num_bytes, 1))
    memory.write(os.urandom(num_bytes))
    return memoryview(memory)[:num_bytes]


def written(path: Path, chunks: list[memoryview]) -> bytes:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        *_, total = direct.DirectWriter("").write(fd, chunks, num_bytes=sum(map(len, chunks)))
        assert not direct.is_direct(fd)
    finally:
        os.close(fd)
    assert total == sum(map(len, chunks))
    return path.read_bytes()


@pytest.mark.parametrize(
    "sizes",
    [[4096], [8192, 4096, 100], [4096, 5000, 4096, 3], [1, 4096], [0, 4096, 0], [1 << 20] * 9, [4095, 1, 4096]],
    ids=str,
)
def test_the_file_holds_the_chunks(tmp_path: Path, sizes: list[int]):
    chunks = [aligned(size) for size in sizes]
    assert written(tmp_path / "file", chunks) == b"".join(chunks)


def test_memory_that_is_not_aligned_is_written_too(tmp_path: Path):
    memory = aligned(64 << 10)
    chunks = [memory[:8192], memory[8193 : 8193 + 8192], memory[16384:32768]]
    assert written(tmp_path / "file", chunks) == b"".join(chunks)


def test_many_chunks_take_few_calls_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, sizes = os.pwritev, []

    def counted(fd: int, views: list[memoryview], offset: int) -> int:
        sizes.append(sum(map(len, views)))
        return real(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", counted)
    memory = aligned(200 << 20)
    chunks = [memory[begin : begin + (1 << 20)] for begin in range(0, len(memory), 1 << 20)]
    assert written(tmp_path / "file", chunks) == bytes(memory)
    assert sum(sizes) == len(memory)
    assert len(sizes) <= 24
    assert sizes[-1] <= direct.LEAST_WRITE_BYTES
    assert max(sizes) == direct.WRITE_BYTES


@pytest.mark.parametrize("is_one_memory", [True, False])
def test_only_memory_that_is_there_anyway_waits_without_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_one_memory: bool
):
    real, num_taken, num_written, most_waiting = os.pwritev, 0, 0, 0
    piece_bytes, num_pieces = 4 << 20, 60
    whole = aligned(piece_bytes * num_pieces) if is_one_memory else None

    def slow(fd: int, views: list[memoryview], offset: int) -> int:
        nonlocal num_written
        time.sleep(0.02)
        count = real(fd, views, offset)
        num_written += count
        return count

    def pieces() -> Iterator[memoryview]:
        nonlocal num_taken, most_waiting
        for begin in range(0, piece_bytes * num_pieces, piece_bytes):
            yield aligned(piece_bytes) if whole is None else whole[begin : begin + piece_bytes]
            num_taken += piece_bytes
            most_waiting = max(most_waiting, num_taken - num_written)

    monkeypatch.setattr(os, "pwritev", slow)
    with (tmp_path / "file").open("wb") as file:
        list(direct.DirectWriter("").write(file.fileno(), pieces(), num_bytes=piece_bytes * num_pieces))
    limit = (direct.MOST_PENDING + 1) * direct.WRITE_BYTES
    assert num_written == piece_bytes * num_pieces
    assert most_waiting > limit if is_one_memory else most_waiting <= limit


def test_a_call_that_takes_less_than_it_was_given_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.pwritev

    def short(fd: int, views: list[memoryview], offset: int) -> int:
        return real(fd, [views[0][: max(4096, len(views[0]) // 2 // 4096 * 4096)]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    memory = aligned(20 << 20)
    chunks = [memory[begin : begin + (1 << 20)] for begin in range(0, len(memory), 1 << 20)]
    assert written(tmp_path / "file", chunks) == bytes(memory)


def test_a_write_that_fails_on_a_thread_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.pwritev

    def failing(fd: int, views: list[memoryview], offset: int) -> int:
        if offset == direct.LEAST_WRITE_BYTES:
            raise OSError(5, "Input/output error")
        return real(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", failing)
    memory = aligned(64 << 20)
    with pytest.raises(OSError, match="Input/output error"):
        written(tmp_path / "file", [memory[begin : begin + (4 << 20)] for begin in range(0, len(memory), 4 << 20)])


def test_the_probe_leaves_nothing_behind_and_answers(tmp_path: Path):
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert direct.is_worth_it(fd) in (True, False)
    finally:
        os.close(fd)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def going_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
    monkeypatch.setattr(direct, "LEAST_BYTES", 1)
    monkeypatch.setattr(direct, "is_worth_it", lambda _fd: True)
    return LocalStorage(tmp_path / "run")


def test_a_storage_that_goes_direct_puts_the_same_file(going_direct: LocalStorage):
    chunks = [aligned(8192), aligned(4096), aligned(777)]
    assert going_direct.put("a/file", iter(chunks), num_bytes=8192 + 4096 + 777) == 13065
    assert (going_direct.root / "a/file").read_bytes() == b"".join(chunks)


def test_chunks_that_fail_leave_no_file(going_direct: LocalStorage):
    def chunks() -> Iterator[memoryview]:
        yield aligned(8192)
        raise RuntimeError("the GPU is gone")

    with pytest.raises(RuntimeError, match="the GPU is gone"):
        going_direct.put("a/file", chunks(), num_bytes=16384)
    assert going_direct.list() == []


def test_a_full_disk_says_so(going_direct: LocalStorage, monkeypatch: pytest.MonkeyPatch):
    def full(_fd: int, _data: list[memoryview], _offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StorageError, match="No space left"):
        going_direct.put("a/file", [aligned(8192)], num_bytes=8192)
    assert going_direct.list() == []


def test_a_file_system_that_refuses_at_the_write_is_written_through_the_cache(
    going_direct: LocalStorage, monkeypatch: pytest.MonkeyPatch
):
    real, refused = os.pwritev, []

    def refusing(fd: int, data: list[memoryview], offset: int) -> int:
        if direct.is_direct(fd):
            refused.append(offset)
            raise OSError(22, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwritev", refusing)
    chunks = [aligned(8192), aligned(4096)]
    going_direct.put("a/file", chunks, num_bytes=12288)
    assert refused
    assert (going_direct.root / "a/file").read_bytes() == b"".join(chunks)


def test_small_files_do_not_go_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(direct, "is_worth_it", lambda _fd: pytest.fail("probed for a small file"))
    LocalStorage(tmp_path).put("file", [b"x"], num_bytes=1)

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from benchmarks import disk
from benchmarks.kernel import counters, is_cold, most_memory_bytes, reset_most_memory
from benchmarks.load import LoadError, check

NUM_BYTES = 8 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(NUM_BYTES))
    disk.make_durable(tmp_path)
    return path


def num_read(path: Path) -> int:
    before = counters()
    path.read_bytes()
    return (counters() - before).read_bytes


def skip_without_device(path: Path) -> None:
    disk.forget(path)
    if num_read(path) == 0:
        pytest.skip("no device below: the page cache is the file system here")


def test_a_read_of_what_was_forgotten_comes_from_the_device(file: Path) -> None:
    skip_without_device(file)
    disk.forget(file.parent)
    assert is_cold(num_read(file), NUM_BYTES)
    assert not is_cold(num_read(file), NUM_BYTES)


def test_what_is_mapped_is_not_forgotten_and_the_proof_fails(file: Path) -> None:
    import mmap

    skip_without_device(file)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) >= 0
        disk.forget(file)
        with pytest.raises(LoadError, match=r"not cold: of 8\.4 MB the device delivered 0\.0"):
            check("cold", num_read=num_read(file), num_bytes=NUM_BYTES)


def test_warming_brings_a_file_into_the_cache(file: Path) -> None:
    disk.forget(file)
    disk.warm(file.parent)
    assert num_read(file) == 0
    check("warm", num_read=0, num_bytes=NUM_BYTES)


def test_a_lazy_load_is_not_cold() -> None:
    assert is_cold(981, 1000)
    assert not is_cold(979, 1000)


def test_written_bytes_are_counted(tmp_path: Path) -> None:
    before = counters()
    (tmp_path / "file").write_bytes(bytes(NUM_BYTES))
    disk.make_durable(tmp_path)
    found = (counters() - before).written_bytes
    if found == 0:
        pytest.skip("no device below")
    assert NUM_BYTES <= found <= NUM_BYTES * 1.1


def test_bytes_on_the_wire_are_counted_at_both_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        served, _ = server.accept()
        with client, served:
            before = counters()
            client.sendall(bytes(1000))
            assert len(served.recv(1000, socket.MSG_WAITALL)) == 1000
            served.sendall(b"seen")  # its answer acknowledges what came
            assert client.recv(4, socket.MSG_WAITALL) == b"seen"
            assert 2004 <= (counters() - before).wire_bytes <= 2008


def test_the_most_memory_is_seen_after_it_is_gone() -> None:
    reset_most_memory()
    before = most_memory_bytes()
    held = bytearray(os.urandom(1)) * (64 << 20)
    assert len(held)
    del held
    assert most_memory_bytes() - before >= 60 << 20
    reset_most_memory()
    assert most_memory_bytes() - before < 60 << 20

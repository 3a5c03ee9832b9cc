"""Storages round a storage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from failing_storage import FailingStorage

from distckpt.storage import CountingStorage, LocalStorage, Storage, VerbCount, withdraw


def test_counting_storage_counts_calls_and_bytes(tmp_path: Path) -> None:
    storage = CountingStorage(LocalStorage(tmp_path))
    floats: Any = memoryview(bytearray(24)).cast("d")
    assert storage.put("a/f", [b"12", floats]) == 26
    storage.sync(["a/f"])
    storage.publish("m.json", b"{}")
    storage.read("a/f", 1, memoryview(bytearray(5)))
    assert storage.read_all("m.json", limit_bytes=10) == b"{}"
    assert len(storage.list()) == 2
    storage.delete(["a/f"])
    withdraw(storage, "m.json", b"{}")
    assert storage.list() == []
    with pytest.raises(FileNotFoundError):
        storage.read("a/f", 0, memoryview(bytearray(7)))
    assert storage.counted("put") == VerbCount(num_calls=1, num_bytes=26)
    assert storage.counted("publish") == VerbCount(num_calls=1, num_bytes=2)
    assert storage.counted("read") == VerbCount(num_calls=2, num_bytes=12)
    assert storage.counted("read_all") == VerbCount(num_calls=1, num_bytes=2)
    assert [storage.counted(verb).num_calls for verb in ("sync", "list", "delete", "never")] == [1, 2, 2, 0]
    assert (storage.url, storage.capabilities) == (storage.inner.url, storage.inner.capabilities)


def test_counting_storage_misses_nothing_that_threads_do(tmp_path: Path) -> None:
    storage = CountingStorage(LocalStorage(tmp_path))
    storage.put("f", [bytes(100)])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: storage.read("f", 0, memoryview(bytearray(100))), range(200)))
    assert storage.counted("read") == VerbCount(num_calls=200, num_bytes=20_000)


def use(storage: Storage) -> None:
    storage.put("s/a/f", [b"1", b"2"])
    storage.sync(["s/a/f"])
    storage.publish("s/m.json", b"{}")
    storage.delete(["s/m.json", "s/a/f"])


def test_failing_storage_fails_at_each_change_once(tmp_path: Path) -> None:
    counted = FailingStorage(LocalStorage(tmp_path / "count"))
    use(counted)
    assert counted.changes == [
        "put a chunk of s/a/f",
        "put a chunk of s/a/f",
        "finish s/a/f",
        "sync",
        "publish s/m.json",
        "answer that s/m.json is published",
        "delete s/m.json",
        "delete s/a/f",
    ]
    for fail_at in range(len(counted.changes)):
        storage = FailingStorage(LocalStorage(tmp_path / f"fail-{fail_at}"), fail_at=fail_at)
        with pytest.raises(OSError, match="made by a test"):
            use(storage)
        assert storage.changes == counted.changes[: fail_at + 1]
        left = [info.name for info in storage.list()]
        assert (
            left == [[], [], [], ["s/a/f"], ["s/a/f"], ["s/a/f", "s/m.json"], ["s/a/f", "s/m.json"], ["s/a/f"]][fail_at]
        )

"""A file that was not finished is gone on with: on disk by what is right of it, on S3 by what the server has got."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from fault_proxy import Fault, FaultProxy
from places import IMPATIENT, Place

from distckpt.errors import StorageError
from distckpt.storage import ContinuingStorage, KeepsUploads, LocalStorage, Storage, open_storage
from distckpt.storage.parts import LEAST_PART, part_size

SIZE = 5 * LEAST_PART + 1000
DATA = random.Random(1).randbytes(SIZE)


class StopError(Exception):
    """What ends a write in the middle."""


def until(end: int, *, begin: int = 0) -> Iterator[memoryview]:
    """Yield the file up to a byte, and then fail; at its very end, succeed."""
    for first in range(begin, end, 1 << 20):
        yield memoryview(DATA)[first : min(first + (1 << 20), end)]
    if end < SIZE:
        raise StopError


def continuing(place: Place) -> tuple[Storage, ContinuingStorage]:
    storage = place.open()
    assert isinstance(storage, ContinuingStorage)
    return storage, storage


def content(storage: Storage, name: str) -> bytes:
    into = bytearray(SIZE)
    storage.read(name, 0, memoryview(into))
    return bytes(into)


def test_what_was_done_is_kept_and_the_rest_makes_the_file(place: Place) -> None:
    storage, unfinished = continuing(place)
    assert unfinished.begun("a/file", num_bytes=SIZE).num_bytes == 0
    with pytest.raises(StopError):
        unfinished.put_rest("a/file", until(3 * LEAST_PART), begin=0, num_bytes=SIZE)
    storage, unfinished = continuing(place)
    found = unfinished.begun("a/file", num_bytes=SIZE)
    if place.kind == "local":
        assert (found.num_bytes, found.is_sure) == (SIZE, False), "its room is reserved"
    else:
        with pytest.raises(FileNotFoundError):
            content(storage, "a/file")
        assert found.is_sure
        assert found.num_bytes % LEAST_PART == 0
    begin = {"local": 3 * LEAST_PART, "memory": 0}.get(place.kind, found.num_bytes)
    assert unfinished.put_rest("a/file", until(SIZE, begin=begin), begin=begin, num_bytes=SIZE) == SIZE - begin
    assert content(storage, "a/file") == DATA
    if isinstance(storage, KeepsUploads):
        assert not storage.uploads(older_than_s=-3600)


def test_a_file_of_another_size_is_of_no_use(place: Place) -> None:
    _, unfinished = continuing(place)
    with pytest.raises(StopError):
        unfinished.put_rest("a/file", until(3 * LEAST_PART), begin=0, num_bytes=SIZE)
    other = 400 << 20 if place.kind != "local" else LEAST_PART
    assert part_size(other) != part_size(SIZE) or place.kind == "local"
    assert unfinished.begun("a/file", num_bytes=other).num_bytes == 0


def test_a_small_file_is_just_written(place: Place) -> None:
    storage, unfinished = continuing(place)
    assert unfinished.put_rest("a/small", [b"abc", b"de"], begin=0, num_bytes=5) == 5
    assert storage.read_all("a/small", limit_bytes=10) == b"abcde"


def test_a_local_file_is_never_followed_through_a_link(tmp_path: object) -> None:
    storage = LocalStorage(f"{tmp_path}")
    (storage.root / "target").write_bytes(b"precious")
    (storage.root / "link").symlink_to(storage.root / "target")
    with pytest.raises(StorageError):
        storage.put_rest("link", [b"x"], begin=1, num_bytes=2)
    assert (storage.root / "target").read_bytes() == b"precious"


@pytest.fixture
def far(s3_bucket: str, proxy: FaultProxy) -> Storage:
    options = {**IMPATIENT, "endpoint_url": proxy.endpoint, "engine": "s3fs"}
    return open_storage(f"s3://{s3_bucket}/run", storage_options=options)


def test_only_parts_that_the_server_lacks_are_sent(far: Storage, proxy: FaultProxy) -> None:
    assert isinstance(far, ContinuingStorage)
    proxy.fail(Fault(action="answer", method="PUT", where="partNumber=4", times=99, status=400, code="Refused"))
    with pytest.raises(StorageError):
        far.put_rest("file", until(SIZE), begin=0, num_bytes=SIZE)
    proxy.reset()
    begin = far.begun("file", num_bytes=SIZE).num_bytes
    assert begin == 3 * LEAST_PART, "parts after the gap are sent again"
    proxy.reset()
    far.put_rest("file", until(SIZE, begin=begin), begin=begin, num_bytes=SIZE)
    assert SIZE - begin <= proxy.num_uploaded() < SIZE - begin + 10_000
    assert content(far, "file") == DATA


def test_an_upload_that_has_ended_meanwhile_is_an_error_and_not_a_hole(far: Storage) -> None:
    assert isinstance(far, ContinuingStorage)
    assert isinstance(far, KeepsUploads)
    with pytest.raises(StopError):
        far.put_rest("file", until(4 * LEAST_PART), begin=0, num_bytes=SIZE)
    begin = far.begun("file", num_bytes=SIZE).num_bytes
    far.abort_uploads(far.uploads(older_than_s=-3600))
    if begin:
        with pytest.raises(StorageError, match="ended the unfinished upload"):
            far.put_rest("file", until(SIZE, begin=begin), begin=begin, num_bytes=SIZE)
    assert far.list() == []

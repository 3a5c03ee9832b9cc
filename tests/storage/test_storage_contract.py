"""The contract of `Storage`, on each kind of storage."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import Place

from distckpt.errors import StorageError
from distckpt.storage import Buffer, Storage, read_scattered, withdraw
from distckpt.storage.parts import USUAL_PART

LIMIT = 1 << 20
_numbers = itertools.count()


def pattern(num_bytes: int) -> bytes:
    """Return bytes that repeat nowhere, the same for the same number."""
    return random.Random(num_bytes).randbytes(num_bytes)


def content(storage: Storage, name: str, num_bytes: int) -> bytes:
    into = bytearray(num_bytes)
    storage.read(name, 0, memoryview(into))
    return bytes(into)


def names_in(storage: Storage, folder: str = "") -> list[str]:
    return [info.name for info in storage.list(folder)]


# --- put and read ---

chunk_lists = st.lists(
    st.tuples(st.binary(max_size=2000), st.sampled_from([bytes, bytearray, memoryview, "odd slice", "floats"])),
    max_size=8,
)


def as_buffer(data: bytes, kind: Any) -> Buffer:
    if kind == "odd slice":
        return memoryview(b"x" + data + b"yz")[1:-2]
    buffer: Any = memoryview(data[: len(data) // 8 * 8]).cast("d") if kind == "floats" else kind(data)
    return cast(Buffer, buffer)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=chunk_lists)
def test_put_writes_exactly_the_chunks(storage: Storage, parts: list[tuple[bytes, Any]]) -> None:
    chunks = [as_buffer(data, kind) for data, kind in parts]
    whole = b"".join(bytes(chunk) for chunk in chunks)
    name = f"many/file-{next(_numbers)}"
    assert storage.put(name, iter(chunks)) == len(whole)
    assert storage.read_all(name, limit_bytes=LIMIT) == whole
    assert content(storage, name, len(whole)) == whole


@pytest.mark.parametrize("num_bytes", [USUAL_PART - 1, USUAL_PART, 2 * USUAL_PART + 5])
def test_files_around_the_size_of_an_upload_part_are_exact(storage: Storage, num_bytes: int) -> None:
    data = memoryview(pattern(num_bytes))
    cuts = [0, 3, 1 << 20, (1 << 20) + 7, num_bytes]
    assert storage.put("a/big", [data[start:end] for start, end in itertools.pairwise(cuts)]) == num_bytes
    assert content(storage, "a/big", num_bytes) == data
    assert storage.list() == storage.list("a")
    assert storage.list()[0].num_bytes == num_bytes


def test_reads_fill_what_they_are_given_from_any_offset(storage: Storage) -> None:
    data = pattern(1000)
    storage.put("f", [data])
    for offset, num_bytes in [(0, 1), (1, 998), (999, 1), (250, 500)]:
        into = bytearray(b"#" * (num_bytes + 2))
        storage.read("f", offset, memoryview(into)[1:-1])
        assert into == b"#" + data[offset : offset + num_bytes] + b"#"
    floats: Any = memoryview(bytearray(80)).cast("d", shape=[2, 5])
    storage.read("f", 8, floats)
    assert floats.tobytes() == data[8:88]


def test_scattered_reads_fill_several_buffers_in_order(storage: Storage) -> None:
    data = pattern(1000)
    storage.put("f", [data])
    buffers = [bytearray(size) for size in (3, 0, 500, 1, 90)]
    read_scattered(storage, "f", 7, [memoryview(buffer) for buffer in buffers])
    assert b"".join(buffers) == data[7 : 7 + 594]
    with pytest.raises(EOFError):
        read_scattered(storage, "f", 500, [memoryview(bytearray(400)), memoryview(bytearray(101))])
    with pytest.raises(FileNotFoundError):
        read_scattered(storage, "missing", 0, [memoryview(bytearray(4)), memoryview(bytearray(1))])


@pytest.mark.parametrize(("offset", "num_bytes"), [(0, 101), (99, 2), (100, 1), (5000, 10)])
def test_read_past_the_end_is_an_eof_error(storage: Storage, offset: int, num_bytes: int) -> None:
    storage.put("f", [pattern(100)])
    with pytest.raises(EOFError, match="/f'"):
        storage.read("f", offset, memoryview(bytearray(num_bytes)))


def test_read_past_the_end_of_an_empty_file_is_an_eof_error(storage: Storage) -> None:
    storage.put("f", [])
    with pytest.raises(EOFError):
        storage.read("f", 0, memoryview(bytearray(1)))


def test_an_empty_read_asks_nothing(storage: Storage) -> None:
    storage.read("not/there", 10, memoryview(b""))


def test_missing_files_are_file_not_found(place: Place, storage: Storage) -> None:
    for name in ["missing", "a/missing"]:
        with pytest.raises(FileNotFoundError, match=name) as caught:
            storage.read(name, 0, memoryview(bytearray(1)))
        assert not isinstance(caught.value, StorageError)
        with pytest.raises(FileNotFoundError, match=name):
            storage.read_all(name, limit_bytes=10)


def test_read_all_refuses_what_is_larger_than_its_limit(storage: Storage) -> None:
    storage.put("f", [b"12345"])
    assert storage.read_all("f", limit_bytes=5) == b"12345"
    with pytest.raises(StorageError, match="larger than 4 bytes"):
        storage.read_all("f", limit_bytes=4)


# --- puts that fail ---


@pytest.mark.parametrize("num_written", [0, 10, USUAL_PART + 10])
@pytest.mark.parametrize("error", [RuntimeError("the GPU is gone"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_put_that_fails_leaves_nothing(place: Place, storage: Storage, num_written: int, error: BaseException) -> None:
    def chunks() -> Iterator[bytes]:
        yield bytes(num_written)
        raise error

    with pytest.raises(type(error)) as caught:
        storage.put("a/f", chunks())
    assert caught.value is error
    if place.kind in ("s3", "obstore"):
        gc.collect()  # an upload that was only forgotten would be completed here
    assert names_in(storage) == []
    with pytest.raises(FileNotFoundError):
        storage.read_all("a/f", limit_bytes=LIMIT)


def test_an_os_error_of_the_chunks_stays_what_it_is(storage: Storage) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"1"
        raise FileNotFoundError("another file")

    with pytest.raises(FileNotFoundError, match="another file"):
        storage.put("f", chunks())


# --- publish ---


@pytest.mark.parametrize("data", [b"", b"{}", pattern(200_000)], ids=len)
def test_published_file_is_whole(storage: Storage, data: bytes) -> None:
    storage.publish("step-1/manifest.json", data)
    assert storage.read_all("step-1/manifest.json", limit_bytes=LIMIT) == data
    assert names_in(storage) == ["step-1/manifest.json"]


def test_publish_of_the_same_content_succeeds_again(place: Place) -> None:
    place.open().publish("m.json", b"same")
    place.open().publish("m.json", b"same")
    assert names_in(place.open()) == ["m.json"]


@pytest.mark.parametrize("other", [b"other", b"sam", b"same and more", b""])
def test_publish_refuses_a_name_that_has_other_content(storage: Storage, other: bytes) -> None:
    storage.publish("m.json", b"same")
    with pytest.raises(FileExistsError, match=r"m\.json") as caught:
        storage.publish("m.json", other)
    assert not isinstance(caught.value, StorageError)
    assert storage.read_all("m.json", limit_bytes=LIMIT) == b"same"
    assert names_in(storage) == ["m.json"]


def test_publish_refuses_the_name_of_an_empty_file(storage: Storage) -> None:
    storage.put("m.json", [])
    with pytest.raises(FileExistsError):
        storage.publish("m.json", b"{}")


def test_one_of_many_racing_publishers_wins(place: Place) -> None:
    storages = [place.open() for _ in range(8)]
    if not storages[0].capabilities.exclusive_publish:
        pytest.skip(f"{place.kind} does not promise it")
    start = threading.Barrier(len(storages))

    def race(writer: int, name: str) -> bool:
        start.wait(30)
        try:
            storages[writer].publish(name, b"writer %d" % writer)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(len(storages)) as pool:
        for name in ["step-1/m.json", "step-2/m.json", "step-3/m.json"]:
            won = list(pool.map(race, range(len(storages)), [name] * len(storages)))
            assert sum(won) == 1
            assert storages[0].read_all(name, limit_bytes=LIMIT) == b"writer %d" % won.index(True)
    assert names_in(storages[0]) == ["step-1/m.json", "step-2/m.json", "step-3/m.json"]


def test_readers_see_nothing_or_all_of_a_published_file(place: Place) -> None:
    data = pattern(1_000_000)
    writer, reader = place.open(), place.open()
    names = [f"step-{number}/m.json" for number in range(8)]

    def follow() -> None:
        for name in names:
            while True:
                try:
                    assert reader.read_all(name, limit_bytes=LIMIT) == data
                    break
                except FileNotFoundError:
                    time.sleep(0.001)

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow)
        for name in names:
            writer.publish(name, data)
        following.result(30)


# --- list ---


def test_nothing_is_listed_where_nothing_is(storage: Storage) -> None:
    assert storage.list() == []
    assert storage.list("step-1") == []


def test_list_gives_every_file_with_size_and_time(storage: Storage) -> None:
    before = time.time() - 5
    for name in ["b", "a/x", "a/b/y", "ab/z", "a.txt"]:
        storage.put(name, [name.encode() * 10])
    listed = storage.list()
    assert [info.name for info in listed] == ["a.txt", "a/b/y", "a/x", "ab/z", "b"]
    assert [info.num_bytes for info in listed] == [50, 50, 30, 40, 10]
    assert all(before <= info.modified <= time.time() + 5 for info in listed)
    assert names_in(storage, "a") == ["a/b/y", "a/x"]
    assert names_in(storage, "a/b") == ["a/b/y"]


def test_files_with_names_that_are_not_plain_are_not_listed(place: Place, storage: Storage) -> None:
    for name in ["a/notes (1).txt", ".hidden/f", "a/.nfs0001", "a/ok"]:
        place.plant(name, b"somebody's")
    assert names_in(storage) == ["a/ok"]


def test_list_sees_what_another_client_wrote_and_deleted(place: Place) -> None:
    mine, other = place.open(), place.open()
    mine.put("step-1/f", [b"1"])
    assert names_in(mine) == names_in(other) == ["step-1/f"]
    other.put("step-2/f", [b"2"])
    other.publish("step-2/m.json", b"2")
    assert names_in(mine) == ["step-1/f", "step-2/f", "step-2/m.json"]
    assert mine.read_all("step-2/m.json", limit_bytes=LIMIT) == b"2"
    other.delete(["step-2/m.json", "step-1/f"])
    assert names_in(mine) == ["step-2/f"]
    with pytest.raises(FileNotFoundError):
        mine.read_all("step-2/m.json", limit_bytes=LIMIT)


def test_files_that_vanish_while_listing_do_not_disturb_it(place: Place) -> None:
    mine, other = place.open(), place.open()
    mine.put("keep/f", [b"1"])
    is_done = threading.Event()

    def churn() -> None:
        for number in range(20):
            names = [f"go-{number}/{letter}/f" for letter in "abc"]
            for name in names:
                other.put(name, [b"1"])
            other.delete(names)
        is_done.set()

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        while not is_done.is_set() and not churning.done():
            assert "keep/f" in names_in(mine)
        churning.result(60)
    assert names_in(mine) == ["keep/f"]


# --- delete ---


def test_deleted_files_are_gone_and_missing_ones_no_error(storage: Storage) -> None:
    names = [f"step-1/a/f-{number}" for number in range(12)]
    for name in ["step-1/m.json", *names, "step-2/a/f"]:
        storage.put(name, [b"1"])
    storage.delete(["step-1/m.json", *names[:6], "step-1/a/missing", "no/such/folder", *names[6:]])
    assert names_in(storage) == ["step-2/a/f"]
    storage.delete(names)
    storage.delete([])


def test_a_folder_can_be_used_again_after_its_files_were_deleted(storage: Storage) -> None:
    for _ in range(2):
        storage.put("step-1/a/f", [b"1"])
        storage.publish("step-1/m.json", b"1")
        storage.delete(["step-1/m.json", "step-1/a/f"])
        assert storage.list() == []


def test_a_withdrawn_file_is_gone_and_its_name_can_be_published_again(storage: Storage) -> None:
    withdraw(storage, "step-1/m.json", b"1")
    storage.put("step-1/a/f", [b"1"])
    for data in (b"1", b"2"):
        storage.publish("step-1/m.json", data)
        assert storage.read_all("step-1/m.json", limit_bytes=1) == data
        withdraw(storage, "step-1/m.json", data)
        assert names_in(storage) == ["step-1/a/f"]


@pytest.mark.parametrize("meant", [b"another", b"", b"longer than what is there"])
def test_a_file_with_other_content_is_not_withdrawn(storage: Storage, meant: bytes) -> None:
    storage.publish("step-1/m.json", b"content")
    withdraw(storage, "step-1/m.json", meant)
    assert storage.read_all("step-1/m.json", limit_bytes=7) == b"content"
    assert names_in(storage) == ["step-1/m.json"]


# --- names, facts, processes ---


@pytest.mark.parametrize(
    "name", ["../f", "a/../../f", "/etc/passwd", "a//f", "", ".", "a/.", "a\0b", "s3://b/f", "x" * 2000]
)
def test_names_that_could_leave_the_root_are_refused(storage: Storage, name: str) -> None:
    storage.put("a/f", [b"1"])
    verbs: list[Callable[[], object]] = [
        lambda: storage.put(name, [b"1"]),
        lambda: storage.publish(name, b"1"),
        lambda: storage.read(name, 0, memoryview(bytearray(1))),
        lambda: storage.read_all(name, limit_bytes=10),
        lambda: storage.sync([name]),
        lambda: storage.delete(["a/f", name]),
    ]
    if name:
        verbs.append(lambda: storage.list(name))
    for verb in verbs:
        with pytest.raises(ValueError, match="not a plain relative name"):
            verb()
    assert names_in(storage) == ["a/f"]  # delete checks all names before the first one goes


def test_what_was_put_can_be_synced(storage: Storage) -> None:
    storage.put("step-1/a/f", [b"1"])
    storage.sync(["step-1/a/f"])
    storage.sync([])


def test_url_and_capabilities_ask_the_storage_nothing(place: Place, storage: Storage) -> None:
    assert storage.url == place.url
    assert storage.capabilities.exclusive_publish == (place.kind != "memory")
    assert storage.capabilities.survives_power_loss == (place.kind != "memory")
    assert place.url in repr(storage)


def test_many_threads_can_use_one_storage(storage: Storage) -> None:
    def work(number: int) -> bytes:
        data = pattern(50_000 + number)
        storage.put(f"a/f-{number}", [data])
        storage.sync([f"a/f-{number}"])
        return content(storage, f"a/f-{number}", len(data))

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(work, range(12)))
    assert results == [pattern(50_000 + number) for number in range(12)]


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")  # that is what is tested
def test_a_storage_works_on_in_a_forked_child(place: Place, storage: Storage) -> None:
    if place.kind == "memory":
        pytest.skip("memory is not shared between processes")
    storage.put("before", [b"1"])
    child = os.fork()
    if child == 0:
        try:
            assert storage.read_all("before", limit_bytes=10) == b"1"
            storage.put("child", [b"2"])
            storage.publish("child.json", b"3")
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert names_in(storage) == ["before", "child", "child.json"]


def test_a_storage_can_be_sent_to_another_process(place: Place, storage: Storage) -> None:
    if place.kind == "memory":
        pytest.skip("memory is not shared between processes")
    storage.put("before", [b"1"])
    script = "import pickle, sys; s = pickle.load(sys.stdin.buffer); s.put('child', [b'2']); print(len(s.list()))"
    result = subprocess.run(
        [sys.executable, "-c", script], check=False, input=pickle.dumps(storage), capture_output=True, timeout=60
    )
    assert (result.returncode, result.stdout.strip()) == (0, b"2"), result.stderr.decode()
    assert names_in(storage) == ["before", "child"]

"""What S3 adds to the contract: uploads that fail, answers that are lost, servers that misbehave or are not there."""

from __future__ import annotations

import errno
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import s3fs
from fault_proxy import Fault, FaultProxy

from distckpt.errors import StorageError
from distckpt.storage import KeepsUploads, LocalStorage, ObjectStorage, Storage, UnfinishedUpload, open_storage
from distckpt.storage.downloads import REQUEST_BYTES
from distckpt.storage.parts import AT_ONCE, GRAIN, LEAST_PART, USUAL_PART, part_size

LIMIT = 1 << 20


@pytest.fixture
def storage(proxy: FaultProxy, proxy_filesystem: s3fs.S3FileSystem, s3_bucket: str) -> Storage:
    return ObjectStorage(proxy_filesystem, f"{s3_bucket}/run", f"s3://{s3_bucket}/run")


# --- uploads that fail ---


def three_parts_then(error: BaseException | None, until: Callable[[], bool] = lambda: True) -> Iterator[bytes]:
    for _ in range(3):
        yield bytes(USUAL_PART)
    deadline = time.monotonic() + 30
    while not until() and time.monotonic() < deadline:
        time.sleep(0.01)
    if error is not None:
        raise error


def has_parts(proxy: FaultProxy, *, num_arrived: int, num_stored: int) -> bool:
    """Say whether so many parts have come as far as the proxy, and so many as far as the server."""
    arrived = [seen for seen in proxy.seen if seen.method == "PUT" and "partNumber=" in seen.target]
    return len(arrived) == num_arrived and sum(seen.status == 200 for seen in arrived) == num_stored


@pytest.fixture(params=["s3fs", "obstore"])
def uploading(request: pytest.FixtureRequest, proxy_filesystem: s3fs.S3FileSystem, s3_bucket: str) -> Storage:
    """Give a storage behind the proxy, with each engine that uploads."""
    pytest.importorskip(request.param)
    return ObjectStorage(proxy_filesystem, f"{s3_bucket}/run", f"s3://{s3_bucket}/run", engine=request.param)


@pytest.mark.parametrize("error", [RuntimeError("chunks"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_interrupted_upload_is_aborted_on_the_server(
    uploading: Storage, s3_filesystem: s3fs.S3FileSystem, proxy: FaultProxy, s3_bucket: str, error: BaseException
) -> None:
    all_stored = partial(has_parts, proxy, num_arrived=3, num_stored=3)
    with pytest.raises(type(error)) as caught:
        uploading.put("a/f", three_parts_then(error, all_stored))
    assert caught.value is error
    gc.collect()
    assert all_stored()
    assert proxy.count("DELETE", "uploadId=") == 1
    assert s3_filesystem.list_multipart_uploads(s3_bucket) == []
    assert s3_filesystem.find(s3_bucket) == []


def test_a_part_that_arrives_after_its_upload_was_aborted_leaves_nothing(
    uploading: Storage, s3_filesystem: s3fs.S3FileSystem, proxy: FaultProxy, s3_bucket: str
) -> None:
    aborted, arrived = threading.Event(), threading.Event()
    proxy.fail(
        Fault(action="call", method="PUT", where="partNumber=3", first=lambda: aborted.wait(30), then=arrived.set)
    )
    proxy.fail(Fault(action="call", method="DELETE", where="uploadId=", then=aborted.set))
    with pytest.raises(KeyboardInterrupt):
        uploading.put(
            "a/f", three_parts_then(KeyboardInterrupt(), lambda: has_parts(proxy, num_arrived=3, num_stored=2))
        )
    assert arrived.wait(30)
    assert proxy.count("DELETE", "uploadId=") == 1
    assert s3_filesystem.list_multipart_uploads(s3_bucket) == []
    assert s3_filesystem.find(s3_bucket) == []


def test_an_abort_that_the_server_fails_at_is_sent_again(
    uploading: Storage, s3_filesystem: s3fs.S3FileSystem, proxy: FaultProxy, s3_bucket: str
) -> None:
    """moto's server fails so, with a 500, where a part of the upload arrives in the same moment."""
    proxy.fail(Fault(action="answer", method="DELETE", where="uploadId=", status=500, code="InternalError"))
    with pytest.raises(KeyboardInterrupt):
        uploading.put(
            "a/f", three_parts_then(KeyboardInterrupt(), lambda: has_parts(proxy, num_arrived=3, num_stored=3))
        )
    assert proxy.count("DELETE", "uploadId=") == 2
    assert s3_filesystem.list_multipart_uploads(s3_bucket) == []


@pytest.mark.parametrize("where", ["partNumber=2", "uploads"])
def test_upload_that_the_server_refuses_halfway_leaves_nothing(
    storage: Storage, s3_filesystem: s3fs.S3FileSystem, proxy: FaultProxy, s3_bucket: str, where: str
) -> None:
    method = "POST" if where == "uploads" else "PUT"
    proxy.fail(Fault(method=method, where=where, action="answer", times=100, status=403, code="AccessDenied"))
    with pytest.raises(
        StorageError,
        match=r"could not write 's3://.*/run/a/f': made to fail \(AccessDenied\), which no .*\nFix: grant",
    ):
        storage.put("a/f", three_parts_then(None))
    gc.collect()
    assert s3_filesystem.list_multipart_uploads(s3_bucket) == []
    assert s3_filesystem.find(s3_bucket) == []


def test_upload_that_cannot_be_completed_leaves_nothing(
    storage: Storage, s3_filesystem: s3fs.S3FileSystem, proxy: FaultProxy, s3_bucket: str
) -> None:
    proxy.fail(Fault(method="POST", where="uploadId=", action="answer", times=100, status=500, code="InternalError"))
    with pytest.raises(StorageError, match="InternalError") as caught:
        storage.put("a/f", three_parts_then(None))
    assert isinstance(caught.value.errno, int)
    gc.collect()
    assert s3_filesystem.list_multipart_uploads(s3_bucket) == []
    assert s3_filesystem.find(s3_bucket) == []


@pytest.mark.parametrize(
    ("method", "where"),
    [("PUT", "partNumber=2"), ("POST", "uploadId="), ("PUT", "run/small")],
    ids=["part", "end", "put"],
)
def test_upload_goes_on_after_a_lost_answer_or_a_busy_server(
    storage: Storage, proxy: FaultProxy, method: str, where: str
) -> None:
    data = b"small" if "small" in where else bytes(2 * USUAL_PART) + b"end"
    name = "small" if "small" in where else "a/f"
    proxy.fail(Fault(method=method, where=where, action="lose-answer"))
    proxy.fail(Fault(method=method, where=where, action="answer", status=503, code="SlowDown"))
    assert storage.put(name, [data]) == len(data)
    into = bytearray(len(data))
    storage.read(name, 0, memoryview(into))
    assert into == data


def test_small_files_are_one_put_and_large_ones_equal_parts(storage: Storage, proxy: FaultProxy) -> None:
    storage.put("small", [b"1", b"2"])
    assert [seen.method for seen in proxy.seen] == ["PUT"]
    proxy.seen.clear()
    storage.put("large", [bytes(USUAL_PART + 3)] * 2)
    sizes = [int(seen.headers["content-length"]) for seen in proxy.seen if "partNumber=" in seen.target]
    assert sorted(sizes) == [6, USUAL_PART, USUAL_PART]


def test_parts_are_equal_small_enough_to_travel_together_and_at_most_ten_thousand() -> None:
    for num_bytes in [20 << 20, 1 << 30, 100 << 30, 5 << 40]:
        size = part_size(num_bytes)
        assert {part_size(num_bytes, number) for number in (0, 1, 9_999)} == {size}
        assert -(-num_bytes // size) <= 10_000
        assert size % GRAIN == 0
    assert part_size(20 << 20) == LEAST_PART
    assert part_size(100 << 30) == USUAL_PART


def test_parts_of_a_large_file_come_in_full_rounds() -> None:
    for num_bytes in [200_000_000, 1_024_000_000, 5_000_000_001, 60 << 30]:
        size = part_size(num_bytes)
        num_left_over = -(-num_bytes // size) % AT_ONCE
        assert num_left_over == 0 or num_left_over > AT_ONCE * 0.6
        assert size <= USUAL_PART


def test_ten_thousand_parts_are_enough_for_files_of_unknown_size() -> None:
    sizes = [part_size(None, number) for number in range(10_000)]
    assert sizes[0] == USUAL_PART
    assert sizes == sorted(sizes)
    assert sum(sizes) > 500 << 30


# --- publish ---


def test_publish_is_one_conditional_put(storage: Storage, proxy: FaultProxy) -> None:
    storage.publish("first.json", b"{}")
    proxy.seen.clear()
    storage.publish("m.json", b"{}")
    puts = [seen for seen in proxy.seen if seen.method == "PUT"]
    assert len(puts) == 1
    assert puts[0].headers["if-none-match"] == "*"
    assert puts[0].headers["content-md5"] == "mZFLkyvTelC5g8XnyQrpOw=="


def test_the_first_publish_is_sent_twice_to_see_whether_the_server_minds(storage: Storage, proxy: FaultProxy) -> None:
    storage.publish("m.json", b"{}")
    assert [seen.headers["if-none-match"] for seen in proxy.seen if seen.method == "PUT"] == ["*", "*"]
    assert storage.capabilities.exclusive_publish


def test_publish_whose_answer_is_lost_succeeds(storage: Storage, proxy: FaultProxy) -> None:
    proxy.fail(Fault(method="PUT", action="lose-answer"))
    storage.publish("m.json", b"mine")
    assert storage.read_all("m.json", limit_bytes=LIMIT) == b"mine"
    assert proxy.count("PUT") == 2  # the client tried again, and was told that the name exists


def test_publish_whose_every_answer_is_lost_succeeds(storage: Storage, proxy: FaultProxy) -> None:
    proxy.fail(Fault(method="PUT", action="lose-answer", times=100))
    storage.publish("m.json", b"mine")
    assert storage.read_all("m.json", limit_bytes=LIMIT) == b"mine"


def race_after_the_look(storage: Storage, proxy: FaultProxy, other: bytes) -> None:
    """Let another writer's object appear between the look for an existing one and the PUT."""
    storage.put("m.json", [other])
    proxy.fail(Fault(method="GET", where="run/m.json", action="answer", status=404, code="NoSuchKey"))


@pytest.mark.parametrize(("status", "code"), [(412, "PreconditionFailed"), (409, "ConditionalRequestConflict")])
def test_a_conflict_is_told_whatever_the_server_calls_it(
    storage: Storage, proxy: FaultProxy, status: int, code: str
) -> None:
    """Some servers answer 412 without saying which condition failed; s3fs then raises OSError(22, None)."""
    race_after_the_look(storage, proxy, b"other")
    proxy.fail(Fault(method="PUT", action="answer", status=status, code=code))
    with pytest.raises(FileExistsError, match="exists with other content"):
        storage.publish("m.json", b"mine")
    assert storage.read_all("m.json", limit_bytes=LIMIT) == b"other"


def test_the_server_itself_refuses_a_name_that_appears_after_the_look(storage: Storage, proxy: FaultProxy) -> None:
    race_after_the_look(storage, proxy, b"other")
    with pytest.raises(FileExistsError):
        storage.publish("m.json", b"mine")
    assert storage.read_all("m.json", limit_bytes=LIMIT) == b"other"


def test_publish_tries_again_after_a_conflict_with_nobody(storage: Storage, proxy: FaultProxy) -> None:
    proxy.fail(Fault(method="PUT", action="answer", status=409, code="ConditionalRequestConflict"))
    storage.publish("m.json", b"mine")
    assert storage.read_all("m.json", limit_bytes=LIMIT) == b"mine"


def test_publish_that_fails_leaves_nothing_and_says_why(storage: Storage, proxy: FaultProxy) -> None:
    proxy.fail(Fault(method="PUT", action="answer", times=100, status=403, code="AccessDenied"))
    with pytest.raises(
        StorageError, match=r"could not publish 's3://.*/run/m\.json': made to fail \(AccessDenied\)"
    ) as caught:
        storage.publish("m.json", b"mine")
    assert caught.value.errno == errno.EACCES
    assert storage.list() == []


def test_a_server_without_conditional_puts_is_noticed_and_told(
    storage: Storage, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    assert storage.capabilities.exclusive_publish
    proxy.fail(
        Fault(method="PUT", action="answer", times=100, status=501, code="NotImplemented", only_conditional=True)
    )
    with caplog.at_level(logging.WARNING, "distckpt"):
        storage.publish("m.json", b"mine")
        with pytest.raises(FileExistsError):
            storage.publish("m.json", b"other")
        storage.publish("n.json", b"more")
    assert not storage.capabilities.exclusive_publish
    assert len([record for record in caplog.records if "create-only" in record.message]) == 1
    assert storage.read_all("m.json", limit_bytes=LIMIT) == b"mine"


@pytest.mark.usefixtures("lax_server")
def test_a_server_that_ignores_the_condition_is_noticed_and_still_keeps_what_is_there(
    storage: Storage, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.fail(Fault(method="PUT", action="ignore-condition", times=100))
    with caplog.at_level(logging.WARNING, "distckpt"):
        storage.publish("m.json", b"mine")
        with pytest.raises(FileExistsError):
            storage.publish("m.json", b"other")
        storage.publish("n.json", b"more")
    assert not storage.capabilities.exclusive_publish
    assert len([record for record in caplog.records if "ignores the condition" in record.message]) == 1
    assert storage.read_all("m.json", limit_bytes=LIMIT) == b"mine"


@pytest.mark.usefixtures("lax_server")
def test_a_writer_that_was_overwritten_on_a_server_without_conditions_is_told(
    storage: Storage, proxy: FaultProxy, s3_filesystem: s3fs.S3FileSystem, s3_bucket: str
) -> None:
    proxy.fail(Fault(method="PUT", action="ignore-condition", times=100))
    storage.publish("m.json", b"first")
    proxy.reset()

    def overwrite() -> None:
        s3_filesystem.pipe_file(f"{s3_bucket}/run/n.json", b"other")

    proxy.fail(Fault(method="PUT", where="n.json", action="call", then=overwrite))
    with pytest.raises(FileExistsError):
        storage.publish("n.json", b"mine")
    assert storage.read_all("n.json", limit_bytes=LIMIT) == b"other"


# --- uploads that were killed ---


def test_unfinished_uploads_of_this_prefix_are_found_by_age_and_aborted(
    storage: ObjectStorage, s3_filesystem: s3fs.S3FileSystem, s3_bucket: str
) -> None:
    ids = {}
    for key in ["run/a/f", "run/b", "run-2/a/f", "other"]:
        ids[key] = s3_filesystem.call_s3("create_multipart_upload", Bucket=s3_bucket, Key=key)["UploadId"]
    for number in (1, 2):
        part = {"UploadId": ids["run/a/f"], "PartNumber": number, "Body": bytes(1000)}
        s3_filesystem.call_s3("upload_part", Bucket=s3_bucket, Key="run/a/f", **part)
    found = storage.uploads(older_than_s=0, sized=True)  # moto says that they began in 2010
    assert storage.uploads(older_than_s=time.time() - found[0].started + 100) == []
    assert sorted((each.name, each.id, each.num_bytes) for each in found) == [
        ("a/f", ids["run/a/f"], 2000),
        ("b", ids["run/b"], 0),
    ]
    assert {each.num_bytes for each in storage.uploads(older_than_s=0)} == {None}
    assert storage.abort_uploads(found) == 2
    assert storage.abort_uploads(found) == 2  # what is gone is no error
    left = s3_filesystem.list_multipart_uploads(s3_bucket)
    assert sorted(each["Key"] for each in left) == ["other", "run-2/a/f"]
    with pytest.raises(ValueError, match="not a plain relative name"):
        storage.abort_uploads([UnfinishedUpload(name="../other", id=ids["other"], started=0.0)])


def test_only_storages_that_can_have_unfinished_uploads_show_them(storage: Storage, tmp_path: Path) -> None:
    assert isinstance(storage, KeepsUploads)
    assert not isinstance(LocalStorage(tmp_path), KeepsUploads)
    assert open_storage("memory://run").uploads(older_than_s=0) == []  # type: ignore[attr-defined]


# --- read, list, delete ---


def test_truncated_answers_are_asked_for_again(storage: Storage, proxy: FaultProxy) -> None:
    storage.put("f", [bytes(range(200))])
    proxy.fail(Fault(method="GET", where="run/f", action="truncate"))
    into = bytearray(100)
    storage.read("f", 50, memoryview(into))
    assert into == bytes(range(50, 150))
    proxy.fail(Fault(method="GET", where="run/f", action="truncate"))
    assert storage.read_all("f", limit_bytes=LIMIT) == bytes(range(200))


def replaced(proxy: FaultProxy, s3_filesystem: s3fs.S3FileSystem, path: str, data: bytes) -> Callable[[], None]:
    """Return what replaces an object once a part of it was read."""

    def replace() -> None:
        deadline = time.monotonic() + 30
        while not any(seen.status for seen in proxy.seen if seen.method == "GET") and time.monotonic() < deadline:
            time.sleep(0.01)
        s3_filesystem.pipe_file(path, data)

    return replace


def test_ranges_of_an_object_that_is_replaced_meanwhile_are_never_mixed(
    storage: Storage, proxy: FaultProxy, s3_filesystem: s3fs.S3FileSystem, s3_bucket: str
) -> None:
    data = b"1" * 2 * REQUEST_BYTES
    storage.put("f", [data])
    replace = replaced(proxy, s3_filesystem, f"{s3_bucket}/run/f", b"2" * len(data))
    proxy.fail(Fault(method="GET", where="run/f", action="call", skip=1, first=replace))
    with pytest.raises(StorageError, match="replaced while it was read"):
        storage.read("f", 0, memoryview(bytearray(len(data))))


def test_the_rest_of_an_object_that_is_replaced_meanwhile_is_not_taken(
    storage: Storage, proxy: FaultProxy, s3_filesystem: s3fs.S3FileSystem, s3_bucket: str
) -> None:
    storage.put("f", [b"1" * 1000])

    def replace() -> None:
        s3_filesystem.pipe_file(f"{s3_bucket}/run/f", b"2" * 1000)

    proxy.fail(Fault(method="GET", where="run/f", action="truncate", then=replace))
    with pytest.raises(StorageError, match="PreconditionFailed"):
        storage.read("f", 0, memoryview(bytearray(1000)))


def test_answers_that_are_always_truncated_are_an_error(storage: Storage, proxy: FaultProxy) -> None:
    storage.put("f", [bytes(200)])
    proxy.fail(Fault(method="GET", where="run/f", action="truncate", times=100))
    with pytest.raises(StorageError, match="could not read"):
        storage.read("f", 0, memoryview(bytearray(100)))


@pytest.mark.usefixtures("lax_server")
def test_a_server_that_ignores_byte_ranges_is_told(storage: Storage, proxy: FaultProxy) -> None:
    storage.put("f", [bytes(200)])
    proxy.fail(Fault(method="GET", where="run/f", action="ignore-range", times=100))
    with pytest.raises(StorageError, match="ignores byte ranges"):
        storage.read("f", 50, memoryview(bytearray(100)))


def test_a_folder_whose_name_another_one_begins_with_is_not_mixed_up(
    storage: Storage, s3_filesystem: s3fs.S3FileSystem, s3_bucket: str
) -> None:
    storage.put("step-1/f", [b"1"])
    s3_filesystem.pipe_file(f"{s3_bucket}/run-2/step-1/f", b"other run")
    s3_filesystem.pipe_file(f"{s3_bucket}/run", b"an object called like the prefix")
    s3_filesystem.touch(f"{s3_bucket}/run/step-1/")  # a marker, as consoles make them for folders
    assert [info.name for info in storage.list()] == ["step-1/f"]
    assert storage.list("step") == []


def test_nothing_is_deleted_after_a_file_that_cannot_be(storage: Storage, proxy: FaultProxy) -> None:
    for name in ["s/m.json", "s/a/f", "s/b/f"]:
        storage.put(name, [b"1"])
    proxy.fail(Fault(method="DELETE", where="run/s/a/f", action="answer", times=100, status=403, code="AccessDenied"))
    with pytest.raises(StorageError, match=r"could not delete 's3://.*/run/s/a/f'"):
        storage.delete(["s/m.json", "s/a/f", "s/b/f"])
    assert [info.name for info in storage.list()] == ["s/a/f", "s/b/f"]
    proxy.fail(
        Fault(method="DELETE", where="run/s/m.json", action="answer", times=100, status=403, code="AccessDenied")
    )
    with pytest.raises(StorageError):
        storage.delete(["s/m.json", "s/b/f"])
    assert [info.name for info in storage.list()] == ["s/a/f", "s/b/f"]


def test_the_first_file_of_a_folder_is_deleted_before_the_others(storage: Storage, proxy: FaultProxy) -> None:
    names = ["s/m.json", *[f"s/f-{number}" for number in range(10)]]
    for name in names:
        storage.put(name, [b"1"])
    storage.delete(names)
    deleted = [seen.target.partition("/run/")[2].partition("?")[0] for seen in proxy.seen if seen.method == "DELETE"]
    assert deleted[0] == "s/m.json"
    assert sorted(deleted) == sorted(names)

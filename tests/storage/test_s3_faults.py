"""Every kind of fault at every request of every verb: it is mended, and nothing is left on the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import s3fs
from fault_proxy import Fault, FaultProxy
from places import filesystem
from s3_server import S3Server

from distckpt.storage import ObjectStorage, Storage
from distckpt.storage.parts import LEAST_PART

LIMIT = 1 << 20
READ_TIMEOUT_S = 1
SMALL = b"small"
LARGE = bytes(range(256)) * (LEAST_PART // 128) + b"end"  # three parts

FAULTS: dict[str, Callable[[], Fault]] = {
    "503": lambda: Fault(action="answer", status=503, code="SlowDown"),
    "500": lambda: Fault(action="answer", status=500, code="InternalError"),
    "expired": lambda: Fault(action="answer", status=400, code="ExpiredToken"),
    "error in 200": lambda: Fault(action="answer", status=200, code="InternalError"),
    "request cut": lambda: Fault(action="cut-request"),
    "answer lost": lambda: Fault(action="lose-answer"),
    "answer cut": lambda: Fault(action="truncate"),
    "answer late": lambda: Fault(action="delay", delay_s=READ_TIMEOUT_S * 1.5),
    "answer slow": lambda: Fault(action="trickle", delay_s=0.2),
}


@pytest.fixture(scope="module")
def hasty_filesystem(session_proxy: FaultProxy, s3_server: S3Server) -> s3fs.S3FileSystem:
    """Give a filesystem that goes through the proxy, and does not wait long for an answer."""
    return filesystem(s3_server, through=session_proxy.endpoint, read_timeout=READ_TIMEOUT_S)


@pytest.fixture(params=["s3fs", "obstore"])
def make_storage(
    request: pytest.FixtureRequest, proxy: FaultProxy, hasty_filesystem: s3fs.S3FileSystem, s3_bucket: str
) -> Callable[[], Storage]:
    """Give what makes a fresh storage, which knows nothing yet of the server."""
    if request.param == "obstore":
        pytest.importorskip("obstore")
    url = f"s3://{s3_bucket}/run"
    return lambda: ObjectStorage(hasty_filesystem, f"{s3_bucket}/run", url, engine=request.param)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One verb: what is there before, the call, and what is there after, by name."""

    before: dict[str, bytes]
    act: Callable[[Storage], None]
    after: dict[str, bytes]


def chunks_of(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    for begin in range(0, len(view), 1 << 20):
        yield view[begin : begin + (1 << 20)]


def read_large(storage: Storage) -> None:
    into = bytearray(len(LARGE))
    storage.read("a/large", 0, memoryview(into))
    assert into == LARGE


def read_all(storage: Storage) -> None:
    assert storage.read_all("a/small", limit_bytes=LIMIT) == SMALL


def list_all(storage: Storage) -> None:
    assert [info.name for info in storage.list()] == ["a/other", "a/small"]


CASES = {
    "put small": Case(before={}, act=lambda s: s.put("a/small", [SMALL]) and None, after={"a/small": SMALL}),
    "put large": Case(
        before={},
        act=lambda s: s.put("a/large", chunks_of(LARGE), num_bytes=len(LARGE)) and None,
        after={"a/large": LARGE},
    ),
    "publish": Case(before={}, act=lambda s: s.publish("m.json", b"{}"), after={"m.json": b"{}"}),
    "read": Case(before={"a/large": LARGE}, act=read_large, after={"a/large": LARGE}),
    "read_all": Case(before={"a/small": SMALL}, act=read_all, after={"a/small": SMALL}),
    "list": Case(before={"a/small": SMALL, "a/other": b"1"}, act=list_all, after={"a/small": SMALL, "a/other": b"1"}),
    "delete": Case(
        before={"a/small": SMALL, "a/other": b"1", "b/stays": b"2"},
        act=lambda s: s.delete(["a/small", "a/other"]),
        after={"b/stays": b"2"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", CASES)
def test_one_fault_at_any_request_is_mended_and_leaves_nothing(
    make_storage: Callable[[], Storage],
    s3_filesystem: s3fs.S3FileSystem,
    proxy: FaultProxy,
    s3_bucket: str,
    verb: str,
    fault: str,
) -> None:
    case = CASES[verb]
    counts: list[int] = []
    fail_at = -2  # at first nothing fails, and requests are counted: on a busy machine one may be made twice
    while len(counts) < 2 or fail_at < min(counts):
        if objects := s3_filesystem.find(s3_bucket):
            s3_filesystem.rm(objects)
        for name, data in case.before.items():
            s3_filesystem.pipe_file(f"{s3_bucket}/run/{name}", data)
        proxy.reset()
        made = FAULTS[fault]()
        if fail_at >= 0:
            made.skip = fail_at
            proxy.fail(made)
        case.act(make_storage())
        if fail_at >= 0:
            assert made.times == 0, f"nothing failed at request {fail_at}"
        else:
            counts.append(len(proxy.seen))
            assert counts[-1] > 0
        found = {path.removeprefix(f"{s3_bucket}/run/"): path for path in s3_filesystem.find(s3_bucket)}
        assert found.keys() == case.after.keys(), f"fault at request {fail_at}"
        for name, data in case.after.items():
            assert s3_filesystem.cat_file(found[name]) == data, f"fault at request {fail_at}"
        assert s3_filesystem.list_multipart_uploads(s3_bucket) == [], f"fault at request {fail_at}"
        fail_at += 1

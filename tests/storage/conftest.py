"""Fixtures: a fresh place of each kind of storage, and a proxy that misbehaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from fault_proxy import FaultProxy
from fsspec.implementations.memory import MemoryFileSystem
from places import Place, filesystem
from s3_server import S3Server

from distckpt.storage import ObjectStorage, Storage


@pytest.fixture(params=["local", "memory", "s3", "obstore"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Give a fresh place of each kind in turn."""
    if request.param == "local":
        root = tmp_path / "runs" / "run"

        def plant(name: str, data: bytes) -> None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)

        yield Place(kind="local", url=str(root), plant=plant)
    elif request.param == "memory":
        fs = MemoryFileSystem()
        yield Place(kind="memory", url="memory://runs/run", plant=lambda name, data: fs.pipe(f"/runs/run/{name}", data))
        fs.store.clear()
        fs.pseudo_dirs[:] = [""]
    else:
        if request.param == "obstore":
            pytest.importorskip("obstore")
        server: S3Server = request.getfixturevalue("s3_server")
        bucket: str = request.getfixturevalue("s3_bucket")
        yield Place(
            kind=request.param,
            url=f"s3://{bucket}/runs/run",
            options={"engine": "s3fs" if request.param == "s3" else "obstore"},
            plant=lambda name, data: server.put_object(bucket, f"runs/run/{name}", data),
        )


@pytest.fixture
def storage(place: Place, request: pytest.FixtureRequest) -> Storage:
    """Give one client of the place."""
    if place.options is None:
        return place.open()
    fs = request.getfixturevalue("storage_filesystem")
    return ObjectStorage(fs, place.url.removeprefix("s3://"), place.url, **place.options)


@pytest.fixture
def lax_server(s3_server: S3Server) -> None:
    """Skip the test where a server checks signatures: it would notice that a header, or the key, is another one."""
    if not s3_server.is_moto:
        pytest.skip("this server checks signatures")


@pytest.fixture(scope="session")
def s3_filesystem(s3_server: S3Server) -> s3fs.S3FileSystem:
    """Give a filesystem to look past the storages; one for all, because making one takes longer than most tests."""
    return filesystem(s3_server)


@pytest.fixture(scope="session")
def storage_filesystem(s3_server: S3Server) -> s3fs.S3FileSystem:
    """Give a filesystem for storages alone, which set it up as they need it."""
    return filesystem(s3_server)


@pytest.fixture(scope="session")
def session_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """Run one proxy for all tests."""
    with FaultProxy(s3_server.endpoint) as running:
        yield running


@pytest.fixture(scope="session")
def proxy_filesystem(session_proxy: FaultProxy, s3_server: S3Server) -> s3fs.S3FileSystem:
    """Give a filesystem that goes through the proxy, and tries everything twice."""
    return filesystem(s3_server, through=session_proxy.endpoint)


@pytest.fixture
def proxy(session_proxy: FaultProxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """Put a proxy that can misbehave between AWS clients and the server; it starts without a fault."""
    session_proxy.reset()
    monkeypatch.setenv("AWS_ENDPOINT_URL", session_proxy.endpoint)
    return session_proxy

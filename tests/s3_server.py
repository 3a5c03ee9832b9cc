"""A real S3 server process (moto's) on 127.0.0.1, and fixtures that point AWS clients at it.

The top conftest.py imports the fixtures; nobody else does, for each import would start a server of its own.
"""

from __future__ import annotations

import itertools
import re
import secrets
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

START_LIMIT_S = 60.0
STOP_LIMIT_S = 10.0
_ADDRESS = re.compile(r"Running on (https?://127\.0\.0\.1:\d+)")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running server; `endpoint` is its URL, `log` the file that holds what it prints."""

    endpoint: str
    log: Path

    def make_bucket(self) -> str:
        """Make a bucket that nobody else uses and return its name."""
        bucket = f"bucket-{next(_numbers)}-{secrets.token_hex(4)}"
        self._put(bucket, b"")
        return bucket

    def put_object(self, bucket: str, key: str, data: bytes) -> None:
        """Write an object past any S3 client."""
        self._put(f"{bucket}/{urllib.parse.quote(key)}", data)

    def _put(self, path: str, data: bytes) -> None:
        url = f"{self.endpoint}/{path}"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # through no proxy
        with direct.open(
            urllib.request.Request(url, data, {"Content-Type": "application/octet-stream"}, method="PUT"), timeout=30
        ):
            pass


@contextmanager
def running_s3_server(folder: Path, *options: str) -> Iterator[S3Server]:
    """Start moto's server on a free port, wait until it listens, and end it by its own process id."""
    log = folder / "s3-server.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0", *options]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield S3Server(endpoint=_awaited_endpoint(process, log), log=log)
    finally:
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_LIMIT_S)


def _awaited_endpoint(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        if (address := _ADDRESS.search(log.read_text(errors="replace"))) is not None:
            return address[1]
        time.sleep(0.05)
    state = "did not listen" if process.poll() is None else f"ended with code {process.returncode}"
    raise RuntimeError(f"moto's server {state}:\n{log.read_text(errors='replace')}")


def point_aws_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let AWS clients of this process, and of its children, use `endpoint` and nothing that this machine knows."""
    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1,localhost")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run one server for all tests that ask for it."""
    with running_s3_server(tmp_path_factory.mktemp("s3-server")) as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a bucket for one test, with the environment that leads to it, and return its name."""
    point_aws_at(s3_server.endpoint, monkeypatch)
    return s3_server.make_bucket()

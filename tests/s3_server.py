"""A real S3 server process (moto's) on 127.0.0.1, and fixtures that point AWS clients at it.

Or another server, which is there already: `benchmarks/ceph.sh start`, `source .ceph/env.sh`, and
`python -m pytest --s3-endpoint $AWS_ENDPOINT_URL tests/storage`.
The top conftest.py imports the fixtures; nobody else does, for each import would start a server of its own.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.config import Config

START_LIMIT_S = 60.0
STOP_LIMIT_S = 10.0
_ADDRESS = re.compile(r"Running on (https?://127\.0\.0\.1:\d+)")
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)  # no slots: the client is kept
class S3Server:
    """A running server.

    Attributes:
        endpoint: Its URL.
        key: Who may do everything there.
        secret: What proves it; moto's server does not care.
        is_moto: Whether it is moto's, which was started for the tests.
    """

    endpoint: str
    key: str = "testing"
    secret: str = "testing-secret"
    is_moto: bool = True

    @cached_property
    def client(self) -> Any:
        """botocore's client, past every filesystem."""
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            verify=False,
            config=Config(proxies={}, request_checksum_calculation="when_required"),
        )

    def close(self) -> None:
        """Close the client's connections."""
        if "client" in self.__dict__:
            self.client.close()

    def make_bucket(self) -> str:
        """Make a bucket that nobody else uses and return its name."""
        bucket = f"bucket-{next(_numbers)}-{secrets.token_hex(4)}"
        self.client.create_bucket(Bucket=bucket)
        return bucket

    def put_object(self, bucket: str, key: str, data: bytes) -> None:
        """Write an object."""
        self.client.put_object(Bucket=bucket, Key=key, Body=data)


@contextmanager
def running_s3_server(folder: Path, *options: str) -> Iterator[S3Server]:
    """Start moto's server on a free port, wait until it listens, and end it by its own process id."""
    log = folder / "s3-server.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0", *options]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        with closing(S3Server(endpoint=_awaited_endpoint(process, log))) as server:
            yield server
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


def point_aws_at(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let AWS clients of this process, and of its children, use this server and nothing that this machine knows."""
    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1,localhost")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[S3Server]:
    """Run one server for all tests that ask for it, or give the one that the command line names."""
    given = pytestconfig.getoption("--s3-endpoint")
    if given is not None:
        key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        with closing(S3Server(endpoint=given, key=key, secret=secret, is_moto=False)) as server:
            yield server
        return
    with running_s3_server(tmp_path_factory.mktemp("s3-server")) as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a bucket for one test, with the environment that leads to it, and return its name."""
    point_aws_at(s3_server, monkeypatch)
    return s3_server.make_bucket()

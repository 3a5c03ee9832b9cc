"""A server that throttles gets fewer requests at once, until it is content."""

from __future__ import annotations

import s3fs
from fault_proxy import Fault, FaultProxy
from places import filesystem
from s3_server import S3Server

from distckpt.storage.connection import Connection
from distckpt.storage.requests import MOST_REQUESTS, Requests


def test_requests_at_once_fall_when_the_server_throttles_and_recover(
    proxy: FaultProxy, s3_filesystem: s3fs.S3FileSystem, s3_bucket: str, s3_server: S3Server
) -> None:
    s3_filesystem.pipe_file(f"{s3_bucket}/f", b"1")
    requests = Requests(Connection(filesystem(s3_server, through=proxy.endpoint)))
    requests.call("head_object", Bucket=s3_bucket, Key="f")
    assert requests.window.limit == MOST_REQUESTS
    limits = []
    for _ in range(2):
        proxy.fail(Fault(method="HEAD", action="answer", status=503, code="SlowDown"))
        requests.call("head_object", Bucket=s3_bucket, Key="f")
        limits.append(requests.window.limit)
    assert MOST_REQUESTS > limits[0] > limits[1] >= 1
    for _ in range(MOST_REQUESTS**2):
        if requests.window.limit == MOST_REQUESTS:
            break
        requests.call("head_object", Bucket=s3_bucket, Key="f")
    assert requests.window.limit == MOST_REQUESTS

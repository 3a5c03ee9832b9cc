"""Uploads to S3: a small file in one request, a large one in parts, several on their way at once.

Invariant: an upload that fails, or is interrupted, is aborted; the object becomes visible by the last request alone.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from distckpt.storage.budget import UPLOAD_BUDGET
from distckpt.storage.clients import Upload
from distckpt.storage.contract import Buffer
from distckpt.storage.failures import server_code
from distckpt.storage.jobs import CANCEL_LIMIT_S, Job
from distckpt.storage.parts import Part, cut
from distckpt.storage.requests import Requests

FINAL_TRIES = 4  # of cleaning up after a failure, which the caller waits to hear of
GONE = {"NoSuchUpload", "NoSuchKey", "404"}

logger = logging.getLogger("distckpt")


def upload(requests: Requests, path: str, chunks: Iterable[Buffer], num_bytes: int | None) -> int:
    """Write an object from `chunks`, whose memory is sent without being copied, and return its size in bytes."""
    parts = cut(chunks, num_bytes)
    first = next(parts)
    second = next(parts, None)
    bucket, key = place(requests, path)
    if second is None:
        requests.run(requests.patiently(functools.partial(_put_small, requests, bucket, key, first)))
        return first.num_bytes
    multipart = _Multipart(requests, bucket, key)
    try:
        return multipart.send(itertools.chain([first, second], parts))
    except BaseException:
        multipart.abandon()
        raise


async def _put_small(requests: Requests, bucket: str, key: str, part: Part) -> None:
    await requests.once("put_object", Bucket=bucket, Key=key, Body=await _body(requests, part))


class _Multipart:
    """One upload in parts."""

    def __init__(self, requests: Requests, bucket: str, key: str) -> None:
        self._requests = requests
        self._path = f"{bucket}/{key}"
        self._where = {"Bucket": bucket, "Key": key}
        self._id: str | None = None
        self._jobs: list[Job[dict[str, Any]]] = []
        self._open: list[Job[dict[str, Any]]] = []
        self._num_begins = 0
        self._num_ends = 0

    def send(self, parts: Iterable[Part]) -> int:
        """Send all parts and make the object visible."""
        self._id = self._requests.run(self._requests.patiently(self._begin))
        num_bytes = 0
        for number, part in enumerate(parts, start=1):
            UPLOAD_BUDGET.take(part.num_bytes)
            give = functools.partial(UPLOAD_BUDGET.give, part.num_bytes)
            work = self._requests.patiently(functools.partial(self._send, number, part))
            self._jobs.append(self._requests.begin(work, on_end=give))
            num_bytes += part.num_bytes
            self._open = [job for job in [*self._open, self._jobs[-1]] if not job.has_succeeded]
            for job in self._open:
                if job.has_ended:
                    job.result()  # raises
        done = [{"PartNumber": number, "ETag": job.result()["ETag"]} for number, job in enumerate(self._jobs, start=1)]
        self._requests.run(self._requests.patiently(functools.partial(self._end, done, num_bytes)))
        if self._num_begins > 1:
            self._abort_others()
        return num_bytes

    def abandon(self) -> None:
        """End what is on its way and abort the upload; what cannot be reached is left to `uploads`."""
        for job in self._jobs:
            job.cancel()
        for job in self._jobs:
            job.wait(CANCEL_LIMIT_S)
        if self._id is not None:
            with suppress(Exception):
                unfinished_one = Upload(path=self._path, id=self._id, started=0.0)
                abort(self._requests, unfinished_one, most_tries=FINAL_TRIES)
        if self._num_begins > 1 or (self._num_begins and self._id is None):
            self._abort_others()

    async def _begin(self) -> str:
        self._num_begins += 1
        answer = await self._requests.once("create_multipart_upload", **self._where)
        return str(answer["UploadId"])

    async def _send(self, number: int, part: Part) -> dict[str, Any]:
        return await self._requests.once(
            "upload_part", **self._where, UploadId=self._id, PartNumber=number, Body=await _body(self._requests, part)
        )

    async def _end(self, done: list[dict[str, Any]], num_bytes: int) -> None:
        self._num_ends += 1
        try:
            await self._requests.once(
                "complete_multipart_upload", **self._where, UploadId=self._id, MultipartUpload={"Parts": done}
            )
        except Exception as error:
            # The server has forgotten the upload if an earlier try got through and only its answer was lost.
            if self._num_ends == 1 or server_code(error) not in GONE or not await self._is_there(num_bytes):
                raise

    async def _is_there(self, num_bytes: int) -> bool:
        answer = await self._requests.once("head_object", **self._where)
        return int(answer["ContentLength"]) == num_bytes

    def _abort_others(self) -> None:
        """Abort what tries of `_begin` may have begun whose answers were lost."""
        with suppress(Exception):
            bucket, key = self._where.values()
            for found in unfinished(self._requests, bucket, key, most_tries=FINAL_TRIES):
                if found.path == self._path and found.id != self._id:
                    abort(self._requests, found, most_tries=FINAL_TRIES)


def unfinished(requests: Requests, bucket: str, prefix: str, *, most_tries: int | None = None) -> Iterator[Upload]:
    """Yield the unfinished uploads of keys that begin with `prefix`."""
    marker: dict[str, Any] = {}
    while True:
        answer = requests.call("list_multipart_uploads", most_tries=most_tries, Bucket=bucket, Prefix=prefix, **marker)
        for found in answer.get("Uploads", []):
            started = found.get("Initiated")
            yield Upload(
                path=f"{bucket}/{found['Key']}",
                id=found["UploadId"],
                started=started.timestamp() if started is not None else 0.0,
            )
        following = {
            "KeyMarker": answer.get("NextKeyMarker"),
            "UploadIdMarker": answer.get("NextUploadIdMarker"),
        }
        following = {name: value for name, value in following.items() if value}
        if not answer.get("IsTruncated") or not following or following == marker:
            return
        marker = following


def abort(requests: Requests, found: Upload, *, most_tries: int | None = None) -> None:
    """Abort an unfinished upload; one that is gone is no error."""
    bucket, key = place(requests, found.path)
    try:
        requests.call("abort_multipart_upload", most_tries=most_tries, Bucket=bucket, Key=key, UploadId=found.id)
    except Exception as error:
        if server_code(error) not in GONE:
            raise


def place(requests: Requests, path: str) -> tuple[str, str]:
    """Return bucket and key of a path."""
    bucket, key, _ = requests.filesystem().split_path(path)
    return str(bucket), str(key)


async def _body(requests: Requests, part: Part) -> Any:
    from distckpt.storage.bodies import PartBody

    await requests.ready()
    return PartBody(part) if requests.streams_bodies else part.joined()

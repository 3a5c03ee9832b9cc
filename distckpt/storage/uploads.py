"""Uploads to S3: a small file in one request, a large one in parts, several on their way at once.

Invariant: an upload that fails, or is interrupted, is aborted, unless it is to be gone on with; the object becomes
visible by the last request alone.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distckpt.storage.budget import UPLOAD_BUDGET
from distckpt.storage.clients import Upload
from distckpt.storage.contract import Buffer
from distckpt.storage.failures import server_code
from distckpt.storage.jobs import CANCEL_LIMIT_S, Job
from distckpt.storage.parts import Part, cut, part_size
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PartBegun:
    """A part that the server has: its number, size and tag."""

    number: int
    num_bytes: int
    tag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsBegun:
    """The first parts of an unfinished upload, without a gap; none, and no `upload`, if there is none of use."""

    upload: Upload | None = None
    parts: tuple[PartBegun, ...] = ()


def parts_begun(requests: Requests, path: str, num_bytes: int) -> PartsBegun:
    """Return the unfinished upload of an object of `num_bytes` of which the server has most.

    Parts of another size than this object's are of no use: some servers demand that all are of one.
    """
    bucket, key = place(requests, path)
    best = PartsBegun()
    if num_bytes <= part_size(num_bytes):
        return best
    for found in unfinished(requests, bucket, key):
        if found.path == f"{bucket}/{key}":
            parts = tuple(_gapless(_parts_of(requests, found), part_size(num_bytes), num_bytes))
            if len(parts) > len(best.parts):
                best = PartsBegun(upload=found, parts=parts)
    return best


def upload_rest(requests: Requests, path: str, chunks: Iterable[Buffer], begin: int, num_bytes: int) -> int:
    """Write an object from byte `begin` on, and return how many bytes that were; a failed upload is left for later."""
    if num_bytes <= part_size(num_bytes):
        return upload(requests, path, chunks, num_bytes)
    bucket, key = place(requests, path)
    multipart = _Multipart(requests, bucket, key)
    if begin:
        known = parts_begun(requests, path, num_bytes)
        parts = [part for part in known.parts if part.number * part_size(num_bytes) <= begin]
        if known.upload is None or sum(part.num_bytes for part in parts) != begin:
            raise OSError(errno.ESTALE, "somebody has ended the unfinished upload meanwhile")
        multipart.resume(known.upload.id, parts)
    try:
        num_sent = multipart.send(cut(chunks, num_bytes))
    except BaseException:
        multipart.let_go()
        raise
    multipart.abort_others()
    return num_sent


def _parts_of(requests: Requests, found: Upload) -> Iterator[PartBegun]:
    bucket, key = place(requests, found.path)
    marker: dict[str, Any] = {}
    while True:
        try:
            answer = requests.call("list_parts", Bucket=bucket, Key=key, UploadId=found.id, **marker)
        except Exception as error:
            if server_code(error) in GONE:
                return
            raise
        for part in answer.get("Parts", []):
            yield PartBegun(number=int(part["PartNumber"]), num_bytes=int(part["Size"]), tag=str(part["ETag"]))
        if not answer.get("IsTruncated") or not answer.get("NextPartNumberMarker"):
            return
        marker = {"PartNumberMarker": answer["NextPartNumberMarker"]}


def _gapless(parts: Iterable[PartBegun], size: int, num_bytes: int) -> Iterator[PartBegun]:
    """Yield the parts from the first one on, up to a gap, or one of another size; never the last one of the object."""
    for number, part in enumerate(sorted(parts, key=lambda part: part.number), start=1):
        if part.number != number or part.num_bytes != size or number * size >= num_bytes:
            return
        yield part


async def _put_small(requests: Requests, bucket: str, key: str, part: Part) -> None:
    await requests.once("put_object", Bucket=bucket, Key=key, Body=await _body(requests, part))


class _Multipart:
    """One upload in parts."""

    def __init__(self, requests: Requests, bucket: str, key: str) -> None:
        self._requests = requests
        self._path = f"{bucket}/{key}"
        self._where = {"Bucket": bucket, "Key": key}
        self._id: str | None = None
        self._resumed: list[PartBegun] = []
        self._jobs: list[Job[dict[str, Any]]] = []
        self._open: list[Job[dict[str, Any]]] = []
        self._num_begins = 0
        self._num_ends = 0

    def resume(self, upload_id: str, parts: list[PartBegun]) -> None:
        """Go on with an upload of which the server has the first parts."""
        self._id, self._resumed = upload_id, parts

    def send(self, parts: Iterable[Part]) -> int:
        """Send all parts that the server does not have, and make the object visible."""
        if self._id is None:
            self._id = self._requests.run(self._requests.patiently(self._begin))
        num_bytes, num_before = 0, len(self._resumed)
        for number, part in enumerate(parts, start=num_before + 1):
            UPLOAD_BUDGET.take(part.num_bytes)
            give = functools.partial(UPLOAD_BUDGET.give, part.num_bytes)
            work = self._requests.patiently(functools.partial(self._send, number, part))
            self._jobs.append(self._requests.begin(work, on_end=give))
            num_bytes += part.num_bytes
            self._open = [job for job in [*self._open, self._jobs[-1]] if not job.has_succeeded]
            for job in self._open:
                if job.has_ended:
                    job.result()  # raises
        done = [{"PartNumber": part.number, "ETag": part.tag} for part in self._resumed]
        for number, job in enumerate(self._jobs, start=num_before + 1):
            done.append({"PartNumber": number, "ETag": job.result()["ETag"]})
        size = num_bytes + sum(part.num_bytes for part in self._resumed)
        self._requests.run(self._requests.patiently(functools.partial(self._end, done, size)))
        if self._num_begins > 1:
            self.abort_others()
        return num_bytes

    def let_go(self) -> None:
        """End what is on its way, and leave what the server has."""
        for job in self._jobs:
            job.cancel()
        for job in self._jobs:
            job.wait(CANCEL_LIMIT_S)

    def abandon(self) -> None:
        """End what is on its way and abort the upload; what cannot be reached is left to `uploads`."""
        self.let_go()
        if self._id is not None:
            with suppress(Exception):
                unfinished_one = Upload(path=self._path, id=self._id, started=0.0)
                abort(self._requests, unfinished_one, most_tries=FINAL_TRIES)
        if self._num_begins > 1 or (self._num_begins and self._id is None):
            self.abort_others()

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

    def abort_others(self) -> None:
        """Abort other uploads to this place, such as those that were begun and whose answers were lost."""
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

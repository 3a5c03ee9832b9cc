"""`S3Client`: the objects of an S3 server, through s3fs's own client."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from distckpt.storage import downloads, uploads
from distckpt.storage.clients import RACE_CODES, RANGE_CODES, Upload
from distckpt.storage.connection import Connection
from distckpt.storage.contract import Buffer
from distckpt.storage.failures import server_code, server_status
from distckpt.storage.obstores import FastUploads
from distckpt.storage.requests import Requests
from distckpt.storage.retries import BrokenAnswerError

NUM_READERS = 12  # each may hold one request's bytes beside what it reads into

_ERROR = re.compile(rb"\s*(<\?xml[^>]*\?>)?\s*<Error>")
_NO_CONDITIONS = {"NotImplemented", "501"}
_NOT_THERE = {"404", "412", "NoSuchKey", "PreconditionFailed"}  # none, or another one than the one that was meant
_REFUSALS = {409, 412}  # of a condition
WITHDRAW_TRIES = 3
PROOFS = 3

logger = logging.getLogger("distckpt")


class S3Client:
    """Objects of S3, or of a server that speaks its protocol.

    A server that refuses conditional PUTs, or ignores them, is found out at the first `create`.
    """

    is_outside = True
    read_bytes = 8 << 20
    num_readers = NUM_READERS

    def __init__(self, connection: Connection, *, url: str, engine: str | None = None) -> None:
        self._requests = Requests(connection)
        self._fast = FastUploads(self._requests, is_wanted=engine != "s3fs", is_needed=engine == "obstore")
        self._url = url
        self.is_conditional = True
        self._is_proven = False

    def upload(self, path: str, chunks: Iterable[Buffer], num_bytes: int | None) -> int:
        """Write an object, by obstore where it is installed and can be given the same settings."""
        send = self._fast.ready(path)
        if send is not None:
            return send(path, chunks, num_bytes)
        return uploads.upload(self._requests, path, chunks, num_bytes)

    def begun(self, path: str, num_bytes: int) -> int:
        """Return how many of its first bytes the server has of an unfinished upload of an object of `num_bytes`."""
        return sum(part.num_bytes for part in uploads.parts_begun(self._requests, path, num_bytes).parts)

    def upload_rest(self, path: str, chunks: Iterable[Buffer], begin: int, num_bytes: int) -> int:
        """Write an object from byte `begin` on, by s3fs's client, which knows what the server has got."""
        return uploads.upload_rest(self._requests, path, chunks, begin, num_bytes)

    def create(self, path: str, data: bytes) -> None:
        """Write a small object in one request unless it exists.

        The first one is sent again, unless to Amazon: a server that takes it each time ignores the condition. It has
        the same bytes, so nothing is changed by it.
        """
        if not self.is_conditional:
            self._put(path, data)
            return
        try:
            self._put(path, data, IfNoneMatch="*")
        except OSError as error:
            if server_code(error) not in _NO_CONDITIONS:
                raise
            self._warn_of("has no create-only PUT")
            self._put(path, data)
            return
        if not self._is_proven:
            self._is_proven = self._requests.is_amazon or self._proven(path, data)

    def _put(self, path: str, data: bytes, **condition: Any) -> None:
        bucket, key = uploads.place(self._requests, path)
        checksum = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        self._requests.call("put_object", Bucket=bucket, Key=key, Body=data, ContentMD5=checksum, **condition)

    def _proven(self, path: str, data: bytes) -> bool:
        """Send it again, and say whether the server has told by that what it makes of the condition.

        That it is taken once may be the work of another job, which deletes the object while this one stands still.
        """
        for _ in range(PROOFS):
            try:
                self._put(path, data, IfNoneMatch="*")
            except Exception as error:  # noqa: BLE001 - what was to be written is written
                logger.debug("%s refuses to replace: %s", self._url, server_code(error))
                return server_status(error) in _REFUSALS
        self._warn_of("ignores the condition of a create-only PUT")
        return True

    def _warn_of(self, what: str) -> None:
        self.is_conditional = False
        logger.warning("%s %s: never let two jobs share a directory there", self._url, what)

    def peek(self, path: str, limit_bytes: int) -> bytes | None:
        """Return an object's first bytes; None if there is no such object."""
        found = self._peek(path, limit_bytes)
        return None if found is None else found[0]

    def _peek(self, path: str, limit_bytes: int) -> tuple[bytes, str] | None:
        """Return an object's first bytes and its ETag; of an empty one no ETag is known."""
        bucket, key = uploads.place(self._requests, path)

        async def attempt() -> tuple[bytes, str]:
            answer = await self._requests.once("get_object", Bucket=bucket, Key=key, Range=f"bytes=0-{limit_bytes - 1}")
            async with answer["Body"] as body:
                data = bytes(await body.read())
            if len(data) != int(answer.get("ContentLength", len(data))):
                raise BrokenAnswerError(f"the answer ended after {len(data):,} bytes")
            if "ContentRange" not in answer and _ERROR.match(data):
                raise BrokenAnswerError("an error inside a good answer")
            return data[:limit_bytes], str(answer.get("ETag", ""))

        try:
            return self._requests.run(self._requests.patiently(attempt))
        except FileNotFoundError:
            return None
        except Exception as error:
            if server_code(error) in RANGE_CODES:
                return b"", ""  # an empty object has no first byte
            raise

    def download(self, path: str, start: int, into: Sequence[memoryview]) -> None:
        """Fill the views of `into` from byte `start` on, several requests at once."""
        bucket, key = uploads.place(self._requests, path)
        self._requests.run(downloads.download(self._requests, bucket, key, start, into))

    def find(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """Yield every object below the folder `prefix`, one request for each thousand."""
        bucket, key = uploads.place(self._requests, prefix)
        page: dict[str, Any] = {}
        while True:
            answer = self._requests.call("list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "", **page)
            for found in answer.get("Contents", []):
                yield f"{bucket}/{found['Key']}", int(found["Size"]), found["LastModified"].timestamp()
            token = answer.get("NextContinuationToken")
            if not answer.get("IsTruncated") or not token:
                return
            page = {"ContinuationToken": token}

    def remove(self, paths: Sequence[str]) -> None:
        """Delete objects, one request for each, several at once.

        Not S3's bulk call: some servers do not have it, and its errors come file by file inside a good answer.
        """
        places = [uploads.place(self._requests, path) for path in paths]

        async def gone(bucket: str, key: str) -> dict[str, Any]:
            return await self._requests.once("delete_object", Bucket=bucket, Key=key)

        async def all_of_them() -> None:
            answers = await asyncio.gather(
                *(self._requests.patiently(functools.partial(gone, bucket, key)) for bucket, key in places),
                return_exceptions=True,
            )
            for answer in answers:
                if isinstance(answer, BaseException) and server_code(answer) != "NoSuchKey":
                    raise answer

        self._requests.run(all_of_them())

    def withdraw(self, path: str, data: bytes) -> None:
        """Delete an object that holds `data`, by its ETag: should the request come late, it takes no later one.

        Servers that do not know the condition delete what is there.
        """
        bucket, key = uploads.place(self._requests, path)
        for tries_left in reversed(range(WITHDRAW_TRIES)):
            found = self._peek(path, len(data) + 1)
            if found is None or found[0] != data:
                return
            condition: dict[str, Any] = {"IfMatch": found[1]} if found[1] else {}
            try:
                self._requests.call("delete_object", Bucket=bucket, Key=key, **condition)
            except Exception as error:
                code = server_code(error)
                if code in _NO_CONDITIONS:
                    self.remove([path])
                elif code in RACE_CODES and tries_left:
                    continue
                elif code not in _NOT_THERE:
                    raise
            return

    def uploads(self, prefix: str) -> list[Upload]:
        """Return the unfinished uploads below the folder `prefix`."""
        bucket, key = uploads.place(self._requests, prefix)
        return list(uploads.unfinished(self._requests, bucket, f"{key}/" if key else ""))

    def upload_sizes(self, uploads: Sequence[Upload]) -> Sequence[int | None]:
        """Return how many bytes the server holds of each unfinished upload; None of one that it tells nothing of."""

        async def all_of_them() -> list[int | BaseException | None]:
            return await asyncio.gather(*map(self._upload_size, uploads), return_exceptions=True)

        return [None if isinstance(size, BaseException) else size for size in self._requests.run(all_of_them())]

    async def _upload_size(self, upload: Upload) -> int | None:
        bucket, key = uploads.place(self._requests, upload.path)
        marker: dict[str, Any] = {}
        num_bytes = 0
        while True:
            page = functools.partial(
                self._requests.once, "list_parts", Bucket=bucket, Key=key, UploadId=upload.id, **marker
            )
            answer = await self._requests.patiently(page)
            num_bytes += sum(int(part["Size"]) for part in answer.get("Parts", []))
            following = {"PartNumberMarker": answer.get("NextPartNumberMarker")}
            if not answer.get("IsTruncated") or following == marker:
                return num_bytes
            marker = following

    def abort(self, upload: Upload) -> None:
        """Abort an unfinished upload."""
        uploads.abort(self._requests, upload)

"""Downloads from S3: ranges of an object, several on their way at once, straight into the caller's memory.

Invariant: when a download returns, every byte asked for was received, all from one version of the object.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from distckpt.storage.failures import server_code
from distckpt.storage.parts import between
from distckpt.storage.requests import Requests
from distckpt.storage.retries import BrokenAnswerError

REQUEST_BYTES = 16 << 20
RANGE_CODES = {"InvalidRange", "416"}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


async def download(requests: Requests, bucket: str, key: str, start: int, into: Sequence[memoryview]) -> None:
    """Fill the views of `into`, one after another, from byte `start` of an object on.

    Raises:
        EOFError: The object ends before.
        OSError: The server ignores byte ranges, or the object was replaced meanwhile.
    """
    size = sum(map(len, into))
    ranges = [
        _Range(requests, bucket, key, start + begin, between(into, begin, begin + REQUEST_BYTES))
        for begin in range(0, size, REQUEST_BYTES)
    ]
    if len(ranges) == 1:
        await requests.patiently(ranges[0].receive)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for wanted in ranges:
                group.create_task(requests.patiently(wanted.receive))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    if len({wanted.tag for wanted in ranges}) > 1:
        raise OSError(errno.ESTALE, "the object was replaced while it was read")


class _Range:
    """A range of an object on its way into memory; a try goes on where the one before was cut off."""

    def __init__(self, requests: Requests, bucket: str, key: str, start: int, into: Sequence[memoryview]) -> None:
        self._requests = requests
        self._where = {"Bucket": bucket, "Key": key}
        self._start = start
        self._into = into
        self._num_filled = 0
        self.tag: str | None = None

    async def receive(self) -> None:
        """Receive what is missing."""
        from distckpt.storage.bodies import receive

        size = sum(map(len, self._into))
        begin, num_missing = self._start + self._num_filled, size - self._num_filled
        pinned = {} if self.tag is None else {"IfMatch": self.tag}
        wanted = f"bytes={begin}-{begin + num_missing - 1}"
        try:
            answer = await self._requests.once("get_object", **self._where, Range=wanted, **pinned)
        except Exception as error:
            if server_code(error) in RANGE_CODES:
                raise EOFError(begin) from error
            raise
        body = answer["Body"]
        try:
            num_coming = _checked(answer, begin, num_missing)
            if self.tag is not None and answer.get("ETag") != self.tag:
                raise OSError(errno.ESTALE, "the object was replaced while it was read")
            self.tag = answer.get("ETag")
            wanting = between(self._into, self._num_filled, self._num_filled + num_coming)
            try:
                num_came = await receive(body, wanting, self._count)
            except ValueError as error:
                raise OSError(errno.EIO, str(error)) from error
        except BaseException:
            with suppress(Exception):
                body.close()
            raise
        if num_came < num_coming:
            raise BrokenAnswerError(f"the answer ended after {num_came:,} of {num_coming:,} bytes")
        if num_coming < num_missing:
            raise EOFError(begin + num_coming)

    def _count(self, num_bytes: int) -> None:
        self._num_filled += num_bytes


def _checked(answer: dict[str, Any], begin: int, num_wanted: int) -> int:
    """Return how many bytes of a range the server announces, as far as they are those that were asked for."""
    found = _CONTENT_RANGE.fullmatch(str(answer.get("ContentRange", "")))
    length = int(answer.get("ContentLength", -1))
    if found is None and begin == 0 and length == num_wanted:
        return length  # the whole object, which is what was asked for
    if found is None or int(found[1]) != begin or int(found[2]) - begin + 1 != length or length > num_wanted:
        what = f"{length} bytes" if found is None else repr(found[0])
        raise BrokenAnswerError(
            f"asked for {num_wanted} bytes from {begin} on, the server sent {what}; perhaps it ignores byte ranges"
        )
    return length

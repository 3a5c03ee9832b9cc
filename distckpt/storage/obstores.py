"""Uploads by obstore, a client in Rust: a fraction of the processor time, for those who have installed it.

It only ever moves the bytes of data files to the server. All small requests, and downloads, which it would copy once
more than s3fs's client does, stay with s3fs; so what is not told to obstore (retries of conditional PUTs, listing,
deleting) behaves the same with and without it.
It is given what botocore has made of the user's settings, or it is not used at all.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import importlib
import importlib.util
import logging
import os
import re
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, ClassVar

from distckpt.errors import ConfigError, DependencyError
from distckpt.storage import uploads
from distckpt.storage.contract import Buffer
from distckpt.storage.failures import server_code
from distckpt.storage.jobs import CANCEL_LIMIT_S
from distckpt.storage.parts import Part, cut, part_size
from distckpt.storage.requests import Requests
from distckpt.storage.retries import judged
from distckpt.storage.settings import hindrance, make_store

MOST_WAITING = 8  # views that obstore has not taken yet
MOST_KEPT = 64 << 20  # bytes of memory that is not the caller's staging memory, and would live longer for a repeat

_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_STATUS = re.compile(r"status (?:code: )?(\d{3})")
_NUMBERS = {"PermissionDeniedError": errno.EACCES, "UnauthenticatedError": errno.EACCES, "NotFoundError": errno.ENOENT}

logger = logging.getLogger("distckpt")

Send = Callable[[str, Iterable[Buffer], int | None], int]


class FastUploads:
    """Uploads by obstore, for as long as it can be given the settings that s3fs has.

    Args:
        requests: s3fs's requests, where the settings come from.
        is_wanted: Whether it may be used.
        is_needed: Whether it is an error if it cannot be used.

    Attributes:
        is_lost: Whether this is a forked child of a process that had loaded obstore, whose threads are not here.
    """

    is_lost: ClassVar[bool] = False

    def __init__(self, requests: Requests, *, is_wanted: bool, is_needed: bool) -> None:
        self._requests = requests
        self._is_wanted = is_wanted and (is_needed or importlib.util.find_spec("obstore") is not None)
        self._is_needed = is_needed
        self._stores: dict[tuple[int, str], Any] = {}
        self._lock = threading.Lock()

    def ready(self, path: str) -> Send | None:
        """Return what uploads to `path`, or None if that is to be done otherwise.

        Raises:
            DependencyError: obstore was asked for and is not installed.
            ConfigError: It was asked for and cannot be given these settings.
        """
        if not self._is_wanted or FastUploads.is_lost:
            return None
        bucket, key = uploads.place(self._requests, path)
        with self._lock:
            store = self._store(bucket)
        return None if store is None else functools.partial(self._send, store, key)

    def _store(self, bucket: str) -> Any:
        """Return obstore's store of a bucket, made anew with s3fs's client, for fresh credentials."""
        client = self._requests.connected()
        place = (id(client), bucket)
        if place not in self._stores:
            try:
                obstore = importlib.import_module("obstore.store")
            except ImportError as error:
                raise DependencyError(package="obstore", purpose="storage_options={'engine': 'obstore'}") from error
            problem = hindrance(self._requests.filesystem(), client) or self._elsewhere(client, bucket)
            if problem is not None and self._is_needed:
                raise ConfigError(
                    source="storage_options", problem=f"obstore cannot be used with {problem}", fix="leave out 'engine'"
                )
            if problem is not None:
                logger.debug("obstore is installed and not used, because of %s", problem)
            self._stores.clear()
            self._stores[place] = None if problem is not None else make_store(obstore, self._requests, client, bucket)
        return self._stores[place]

    def _elsewhere(self, client: Any, bucket: str) -> str | None:
        """Return a hindrance if the bucket is in another region: botocore follows Amazon there, obstore does not."""
        if not self._requests.is_amazon:
            return None
        try:
            answer = self._requests.call("head_bucket", Bucket=bucket)
            region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
        except Exception:  # noqa: BLE001 - s3fs will meet it again, and tell
            region = None
        return None if region == client.meta.region_name else f"a bucket in the region {region!r}"

    def _send(self, store: Any, key: str, path: str, chunks: Iterable[Buffer], num_bytes: int | None) -> int:
        source = _Source(chunks, num_bytes)
        has_begun = False
        try:
            if source.is_small():
                self._put(store, key, source, use_multipart=False)
                return source.num_bytes
            has_begun = True
            size, limit = part_size(num_bytes), self._requests.window.limit
            self._put(store, key, source, use_multipart=True, chunk_size=size, max_concurrency=limit)
            return source.num_bytes
        except Exception as error:
            if source.error is not None:
                raise source.error from None
            told = told_by_obstore(error)
            if server_code(told) in uploads.GONE and source.has_ended and self._is_there(path, source.num_bytes):
                return source.num_bytes  # the answer to its last request was lost, and it has asked again
            verdict = judged(told)
            if verdict == "busy":
                self._requests.slow_down()
            if server_code(told) is not None and verdict != "renew":
                raise told from error  # obstore has tried again as often as s3fs would
            if not source.can_repeat:
                raise told from error
            if verdict == "renew":
                self._requests.renew()
            logger.debug("obstore gave up (%s); s3fs goes on", told)
        finally:
            if has_begun:
                self._abort_all(path)
        return uploads.upload(self._requests, path, source.repeated(), num_bytes)

    def _put(self, store: Any, key: str, source: _Source, **settings: Any) -> None:
        """Hand obstore one view after another, from this thread, so that Ctrl-C ends the upload at once.

        Its own blocking call would first finish the upload.
        """
        obstore = importlib.import_module("obstore")
        feed = _Feed(self._requests.filesystem().loop)

        async def work() -> None:
            await obstore.put_async(store, key, feed, **settings)

        job = self._requests.begin(work(), on_end=feed.end)
        try:
            for view in source:
                if not feed.push(view):
                    break
            feed.close()
            job.result()
        except BaseException:
            job.cancel()
            job.wait(CANCEL_LIMIT_S)
            raise

    def _is_there(self, path: str, num_bytes: int) -> bool:
        bucket, key = uploads.place(self._requests, path)
        with suppress(Exception):
            return int(self._requests.call("head_object", Bucket=bucket, Key=key)["ContentLength"]) == num_bytes
        return False

    def _abort_all(self, path: str) -> None:
        """Abort uploads to `path`: obstore leaves those that failed, and those whose first answer was lost."""
        bucket, key = uploads.place(self._requests, path)
        with suppress(Exception):
            for found in uploads.unfinished(self._requests, bucket, key):
                if found.path == path:
                    uploads.abort(self._requests, found)


def _after_fork() -> None:
    FastUploads.is_lost = "obstore" in sys.modules


os.register_at_fork(after_in_child=_after_fork)


class _Source(Iterator[memoryview]):
    """The memory of a file as obstore takes it: one view after another, none of which it copies.

    Views on one large piece of memory, which is there anyway, are remembered, so that they can be sent again.

    Attributes:
        num_bytes: How many bytes were handed out.
        error: What the caller's chunks raised.
        can_repeat: Whether everything that was handed out can be handed out again.
        has_ended: Whether everything was handed out.
    """

    def __init__(self, chunks: Iterable[Buffer], num_bytes: int | None) -> None:
        self._parts = cut(chunks, num_bytes)
        self._waiting: deque[Part] = deque()
        self._views: deque[memoryview] = deque()
        self._sent: list[memoryview] = []
        self._num_kept_alive = 0
        self.num_bytes = 0
        self.error: BaseException | None = None
        self.can_repeat = True
        self.has_ended = False

    def is_small(self) -> bool:
        """Say whether all of it is one part."""
        self._waiting += [part for _ in range(2) if (part := self._taken()) is not None]
        return len(self._waiting) == 1

    def __next__(self) -> memoryview:
        while not self._views:
            part = self._waiting.popleft() if self._waiting else self._taken()
            if part is None:
                self.has_ended = True
                raise StopIteration
            self._views += part.views
        view: memoryview = self._views.popleft()
        self.num_bytes += len(view)
        self._remember(view)
        return view

    def repeated(self) -> Iterator[memoryview]:
        """Yield everything from the beginning."""
        yield from self._sent
        yield from self

    def _remember(self, view: memoryview) -> None:
        if not self._sent or view.obj is not self._sent[-1].obj:
            self._num_kept_alive += len(view)
        if self._num_kept_alive > MOST_KEPT:
            self.can_repeat = False
            self._sent.clear()
        else:
            self._sent.append(view)

    def _taken(self) -> Part | None:
        try:
            return next(self._parts, None)
        except BaseException as error:
            self.error = error
            raise


class _Feed(AsyncIterator[memoryview]):
    """Views that one thread pushes and an event loop of another one takes, a few of them waiting.

    Args:
        loop: The event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._views: asyncio.Queue[memoryview | None] = asyncio.Queue()
        self._room = threading.Semaphore(MOST_WAITING)
        self._has_ended = False

    def push(self, view: memoryview) -> bool:
        """Add a view, once there is room; False if nobody takes any more."""
        self._room.acquire()
        if not self._has_ended:
            self._loop.call_soon_threadsafe(self._views.put_nowait, view)
        return not self._has_ended

    def close(self) -> None:
        """Say that no more views come."""
        self._loop.call_soon_threadsafe(self._views.put_nowait, None)

    def end(self) -> None:
        """Say that nobody takes any more views."""
        self._has_ended = True
        self._room.release()

    async def __anext__(self) -> memoryview:
        view = await self._views.get()
        if view is None:
            raise StopAsyncIteration
        self._room.release()
        return view


def told_by_obstore(error: Exception) -> OSError:
    """Return obstore's error as s3fs would tell it, for `failures` and `retries` to judge."""
    text = str(error)
    code, words, status = _CODE.search(text), _MESSAGE.search(text), _STATUS.search(text)
    number = _NUMBERS.get(type(error).__name__, errno.EIO)
    told = OSError(number, words[1] if words else " ".join(text.partition("\n")[0].split()))
    if code is not None or status is not None:
        found = status[1] if status is not None else "0"
        told_response = {
            "Error": {"Code": code[1] if code is not None else found},
            "ResponseMetadata": {"HTTPStatusCode": int(found) or None},
        }
        told.response = told_response  # type: ignore[attr-defined]  # where botocore has it
    else:
        told.__cause__ = ConnectionError(type(error).__name__)  # no answer, or none that can be understood
    return told

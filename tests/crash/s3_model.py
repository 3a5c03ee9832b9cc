"""An S3 server in memory under the real `S3Client`: its requests, answers and errors, without a network.

`Server` stands in for s3fs: distckpt's own protocol (one PUT or parts, create-only PUTs and their proof, retries, what
is asked after an answer is lost) runs on it, request by request, and every request that changes something is recorded.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from botocore.exceptions import ClientError
from bucket import ROOT, Objects, tag_of
from recording import Log, Op
from s3fs.errors import translate_boto_error

from distckpt.storage import Storage, parts
from distckpt.storage.objects import ObjectStorage

PART_BYTES = 4096  # so that the data files of a tiny state have two
NO_DATE = datetime(2026, 1, 1, tzinfo=UTC)


class S3Objects(Objects):
    """Objects by name, and uploads in parts that have not ended, by number."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads: dict[int, tuple[str, dict[int, bytes]]] = {}
        self.num_uploads = 0

    def copy(self) -> S3Objects:
        made = S3Objects()
        made.objects = dict(self.objects)
        made.uploads = {number: (name, dict(sent)) for number, (name, sent) in self.uploads.items()}
        made.num_uploads = self.num_uploads
        return made

    def machine(self, log: Log | None = None) -> Server:
        return Server(self, log)

    def apply(self, op: Op) -> None:
        """Let a request happen; one about an upload that has ended does nothing."""
        if op.kind == "begin":
            self.uploads[op.inode] = op.name, {}
            self.num_uploads = max(self.num_uploads, op.inode)
        elif op.kind == "part" and op.inode in self.uploads:
            self.uploads[op.inode][1][op.offset] = op.data
        elif op.kind == "abort":
            self.uploads.pop(op.inode, None)
        elif op.kind == "complete" and op.inode in self.uploads:
            _, sent = self.uploads.pop(op.inode)
            self.objects[op.name] = b"".join(data for _, data in sorted(sent.items()))
        else:
            super().apply(op)


class Server:
    """The part of s3fs that `Requests` calls.

    Attributes:
        on_call: Called before each request with its kind and object, and again with "answer" before the answer to a
            change is handed on; may raise.
        contents: What lies there.
        num_open: How many requests have not ended.
    """

    protocol = ("s3", "s3a")
    async_impl = True
    retries = 1

    def __init__(self, contents: S3Objects | None = None, log: Log | None = None) -> None:
        self.contents = contents or S3Objects()
        self.log = log or Log()
        self.storage_options: dict[str, Any] = {}
        self.config_kwargs: dict[str, Any] = {}
        self.on_call: Callable[[str, str], None] = lambda _call, _name: None
        self.num_open = 0
        self.loop: PromptLoop | None = None
        events = SimpleNamespace(register=lambda *_args, **_options: None)
        endpoint = SimpleNamespace(http_session=None)
        meta = SimpleNamespace(endpoint_url="http://127.0.0.1", events=events)
        self._s3 = SimpleNamespace(meta=meta, _endpoint=endpoint)

    @contextmanager
    def opened(self) -> Iterator[Callable[[], Storage]]:
        """Give what opens this server's storage, as each rank does for itself; a part of a file is small meanwhile."""
        before, self.loop = parts.part_size, PromptLoop()
        parts.part_size = lambda _num_bytes, _num_sent=0: PART_BYTES
        try:
            yield lambda: ObjectStorage(self, ROOT, f"s3://{ROOT}", engine="s3fs")
        finally:
            parts.part_size = before
            self.loop.close()

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    async def set_session(self, refresh: bool = False) -> None:
        """There is one client, and its credentials are good."""

    async def _call_s3(self, method: str, *, Bucket: str, **parameters: Any) -> dict[str, Any]:
        self.num_open += 1
        try:
            await asyncio.sleep(0)  # others that are made at the same time are on their way, too
            name = f"{Bucket}/{parameters.pop('Key', parameters.pop('Prefix', ''))}"
            answer: dict[str, Any] = getattr(self, f"_{method}")(name, **parameters)
            return answer
        except ClientError as error:
            raise translate_boto_error(error) from error
        finally:
            self.num_open -= 1

    def _put_object(self, name: str, *, Body: bytes, IfNoneMatch: str = "", ContentMD5: str = "") -> dict[str, Any]:
        assert IfNoneMatch in ("", "*")
        kind = "create" if IfNoneMatch else "put"
        self.on_call(kind, name)
        refusal = None
        if IfNoneMatch and name in self.contents.objects:
            refusal = _refusal("PreconditionFailed", 412, condition="If-None-Match")
        return self._change(kind, name, refusal, data=bytes(Body))

    def _create_multipart_upload(self, name: str) -> dict[str, Any]:
        self.on_call("begin", name)
        number = self.contents.num_uploads + 1
        return {**self._change("begin", name, None, inode=number), "UploadId": str(number)}

    def _upload_part(self, name: str, *, UploadId: str, PartNumber: int, Body: bytes) -> dict[str, Any]:
        self.on_call("part", name)
        answer = self._change(
            "part", name, self._unless_under_way(UploadId), inode=int(UploadId), offset=PartNumber, data=bytes(Body)
        )
        return {**answer, "ETag": tag_of(Body)}

    def _complete_multipart_upload(self, name: str, *, UploadId: str, MultipartUpload: Any) -> dict[str, Any]:
        self.on_call("complete", name)
        refusal = self._unless_under_way(UploadId)
        if refusal is None:
            sent = {number: tag_of(data) for number, data in self.contents.uploads[int(UploadId)][1].items()}
            assert sent == {part["PartNumber"]: part["ETag"] for part in MultipartUpload["Parts"]}
        return self._change("complete", name, refusal, inode=int(UploadId))

    def _abort_multipart_upload(self, name: str, *, UploadId: str) -> dict[str, Any]:
        self.on_call("abort", name)
        return self._change("abort", name, self._unless_under_way(UploadId), inode=int(UploadId))

    def _list_multipart_uploads(self, prefix: str) -> dict[str, Any]:
        self.on_call("list", prefix)
        bucket = prefix.partition("/")[0]
        found = [
            {"Key": name.removeprefix(f"{bucket}/"), "UploadId": str(number)}
            for number, (name, _) in self.contents.uploads.items()
            if name.startswith(prefix)
        ]
        return {"Uploads": found, "IsTruncated": False}

    def _delete_object(self, name: str, *, IfMatch: str = "") -> dict[str, Any]:
        self.on_call("delete", name)
        found = self.contents.objects.get(name)
        changed = IfMatch and (found is None or tag_of(found) != IfMatch)
        refusal = _refusal("PreconditionFailed", 412, condition="If-Match") if changed else None
        return self._change("delete", name, refusal, data=IfMatch.encode())

    def _head_object(self, name: str) -> dict[str, Any]:
        self.on_call("get", name)
        data = self._found(name, "404")
        return {"ContentLength": len(data), "ETag": tag_of(data)}

    def _get_object(self, name: str, *, Range: str, IfMatch: str = "") -> dict[str, Any]:
        self.on_call("get", name)
        data = self._found(name, "NoSuchKey")
        first, last = map(int, Range.removeprefix("bytes=").split("-"))
        if first >= len(data):
            raise _refusal("InvalidRange", 416)
        assert IfMatch in ("", tag_of(data))
        asked = data[first : last + 1]
        return {
            "Body": _Body(asked),
            "ContentLength": len(asked),
            "ContentRange": f"bytes {first}-{first + len(asked) - 1}/{len(data)}",
            "ETag": tag_of(data),
        }

    def _list_objects_v2(self, prefix: str) -> dict[str, Any]:
        self.on_call("list", prefix)
        bucket = prefix.partition("/")[0]
        found = [
            {"Key": name.removeprefix(f"{bucket}/"), "Size": len(data), "LastModified": NO_DATE}
            for name, data in self.contents.listing()
            if name.startswith(prefix) and data is not None
        ]
        return {"Contents": found, "IsTruncated": False}

    def _change(self, kind: str, name: str, refusal: ClientError | None, **facts: Any) -> dict[str, Any]:
        """Do what changes something, unless it is refused, and answer.

        Whether it is refused is judged when the request arrives, which is after `on_call`: others may come before it.
        """
        if refusal is None:
            self.contents.apply(self.log.record(kind, name=name, **facts))
        self.on_call("answer", name)
        if refusal is not None:
            raise refusal
        return {}

    def _found(self, name: str, code: str) -> bytes:
        if name not in self.contents.objects:
            raise _refusal(code, 404)
        return self.contents.objects[name]

    def _unless_under_way(self, upload: str) -> ClientError | None:
        return None if int(upload) in self.contents.uploads else _refusal("NoSuchUpload", 404)


class _Body:
    """What a GET answers with."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __aenter__(self) -> _Body:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def read(self, num_bytes: int = -1) -> bytes:
        given = self._data if num_bytes < 0 else self._data[:num_bytes]
        self._data = self._data[len(given) :]
        return given

    def close(self) -> None:
        """Nothing is open."""


class PromptLoop(asyncio.SelectorEventLoop):
    """An event loop that does what other threads give it at once, on their thread; pauses take no time.

    They come one by one: what is given to it while it ends on another thread would never be done.
    """

    def __init__(self) -> None:
        self._clock = _SkippingSelector()
        self._turn = threading.RLock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.skipped_s

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        with self._turn:
            handle = self.call_soon(callback, *args, context=context)
            if not self.is_running():
                self.run_until_complete(_others_done())
        return handle


class _SkippingSelector(selectors.SelectSelector):
    """Waits for nothing but the time, and that passes at once."""

    skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "every task waits for another one"
        self.skipped_s += timeout
        return []


async def _others_done() -> None:
    me = asyncio.current_task()
    while others := asyncio.all_tasks() - {me}:
        await asyncio.wait(others)


def answered(code: str, status: int) -> Exception:
    """Return a server's refusal as s3fs raises it."""
    error: Exception = translate_boto_error(_refusal(code, status))
    return error


def _refusal(code: str, status: int, *, condition: str = "") -> ClientError:
    told: Any = {
        "Error": {"Code": code, "Message": f"the server says {code}", "Condition": condition},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return ClientError(told, "request")

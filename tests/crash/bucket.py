"""A bucket in memory under the real `ObjectStorage`, and what requests that fail, or come late, leave of it.

`Bucket` is to `ObjectStorage` what s3fs is: each change is one request, which happens as a whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from recording import Log, Op

from distckpt.storage import Storage
from distckpt.storage.objects import ObjectStorage

ROOT = "bucket/run"


class Objects:
    """Objects by name."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def copy(self) -> Objects:
        made = Objects()
        made.objects = dict(self.objects)
        return made

    def machine(self, log: Log | None = None) -> Bucket:
        return Bucket(self, log)

    def listing(self) -> Iterator[tuple[str, bytes | None]]:
        """Yield each object's name and bytes, sorted."""
        yield from sorted(self.objects.items())

    def replace(self, path: str, data: bytes | None) -> None:
        """Damage an object, or remove it."""
        if data is None:
            del self.objects[path]
        else:
            self.objects[path] = data

    def key(self) -> int:
        """Return what two buckets that look the same have in common."""
        return hash(tuple(self.listing()))

    def apply(self, op: Op) -> None:
        """Let a request happen."""
        if op.kind == "put":
            self.objects[op.name] = op.data
        elif op.kind == "create":
            self.objects.setdefault(op.name, op.data)
        elif op.kind == "delete" and op.data in (b"", tag_of(self.objects.get(op.name, b"")).encode()):
            self.objects.pop(op.name, None)


def tag_of(data: bytes) -> str:
    """Return the tag by which S3 knows an object's content."""
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


class RefusedError(Exception):
    """A server's answer, as botocore tells it."""

    def __init__(self, code: str) -> None:
        super().__init__(f"the server says {code}")
        self.response = {"Error": {"Code": code}}


class Bucket:
    """The part of s3fs that `ObjectStorage` calls.

    Attributes:
        on_call: Called before each request with its kind and object, and again with "answer" before its answer is
            handed on; may raise.
        contents: What lies there.
    """

    protocol = ("s3",)
    async_impl = False
    retries = 1

    def __init__(self, contents: Objects | None = None, log: Log | None = None) -> None:
        self.contents = contents or Objects()
        self.log = log or Log()
        self.storage_options: dict[str, Any] = {}
        self.on_call: Callable[[str, str], None] = lambda _call, _name: None
        self.num_open = 0

    @contextmanager
    def opened(self) -> Iterator[Callable[[], Storage]]:
        """Give what opens this bucket's storage, as each rank does for itself."""
        yield lambda: ObjectStorage(self, ROOT, f"s3://{ROOT}")

    def open(self, path: str, mode: str, *, block_size: int) -> _Upload:
        assert mode == "wb"
        return _Upload(self, path, block_size)

    def pipe_file(self, path: str, data: bytes, *, chunksize: int, mode: str = "overwrite") -> None:
        assert len(data) < chunksize
        self.request("create" if mode == "create" else "put", path, bytes(data))

    def cat_file(self, path: str, *, start: int, end: int) -> bytes:
        self.on_call("get", path)
        if path not in self.contents.objects:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if start >= len(self.contents.objects[path]):
            raise OSError("range") from RefusedError("InvalidRange")
        return self.contents.objects[path][start:end]

    def find(self, prefix: str, *, detail: bool) -> dict[str, Any]:
        assert detail
        self.on_call("list", prefix)
        return {
            name: {"type": "file", "size": len(data)}
            for name, data in self.contents.listing()
            if name.startswith(f"{prefix}/") and data is not None
        }

    def rm_file(self, path: str) -> None:
        self.request("delete", path)

    def invalidate_cache(self) -> None:
        """Nothing is cached."""

    def request(self, kind: str, name: str, data: bytes = b"") -> None:
        """Change an object, and answer."""
        self.on_call(kind, name)
        refused = kind == "create" and name in self.contents.objects
        if not refused:
            self.contents.apply(self.log.record(kind, name=name, data=data))
        self.on_call("answer", name)
        if refused:
            raise FileExistsError(errno.EEXIST, "exists", name) from RefusedError("PreconditionFailed")


class _Upload:
    """An object that is written; it is there once it is closed."""

    def __init__(self, bucket: Bucket, path: str, block_size: int) -> None:
        self.blocksize = block_size
        self.closed = False
        self._bucket, self._path, self._data = bucket, path, bytearray()

    def write(self, data: Any) -> int:
        assert len(self._data) + len(data) < self.blocksize, "uploads in parts are not modelled"
        self._data += data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._bucket.request("put", self._path, bytes(self._data))

    def discard(self) -> None:
        self.closed = True

"""`Client`: what `ObjectStorage` needs of a server, and the one that does it through any filesystem of fsspec.

Paths are whole ones, as fsspec has them: "bucket/folder/file".
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from fsspec import AbstractFileSystem

from distckpt.storage.connection import Connection
from distckpt.storage.contract import Buffer
from distckpt.storage.failures import is_unreachable, server_code
from distckpt.storage.parts import USUAL_PART, between

READ_BYTES = 32 << 20
READ_TRIES = 3
NUM_DELETERS = 8

S3_SCHEMES = {"s3", "s3a"}
RANGE_CODES = {"InvalidRange", "416"}
RACE_CODES = {"ConditionalRequestConflict", "OperationAborted", "409"}
_CHANGED = ("LastModified", "mtime", "modified", "updated", "last_modified", "created")

logger = logging.getLogger("distckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """An upload in parts that has begun and is neither finished nor aborted; only the server sees it.

    Attributes:
        path: The path of the object that it would become.
        id: The server's name for it.
        started: When it began, in seconds since 1970; 0.0 if the server does not say.
    """

    path: str
    id: str
    started: float


class Client(Protocol):
    """One server's objects. Errors are the client library's own; a missing object is a FileNotFoundError."""

    @property
    def is_conditional(self) -> bool:
        """Whether `create` refuses an existing object even when two writers race; may turn false."""
        ...

    @property
    def is_outside(self) -> bool:
        """Whether objects lie outside this process, where others see them."""
        ...

    @property
    def read_bytes(self) -> int:
        """A good size of one request of a download."""
        ...

    @property
    def num_readers(self) -> int:
        """How many downloads are best under way at once."""
        ...

    def upload(self, path: str, chunks: Iterable[Buffer], num_bytes: int | None) -> int:
        """Write an object, and leave nothing if that fails, also when `chunks` raises."""
        ...

    def begun(self, path: str, num_bytes: int) -> int:
        """Return how many of its first bytes the server has of an unfinished upload of an object of `num_bytes`."""
        ...

    def upload_rest(self, path: str, chunks: Iterable[Buffer], begin: int, num_bytes: int) -> int:
        """Write an object from byte `begin` on; if that fails, what the server has is left for the next try."""
        ...

    def create(self, path: str, data: bytes) -> None:
        """Write a small object in one request, unless it exists; any error may mean that it exists."""
        ...

    def peek(self, path: str, limit_bytes: int) -> bytes | None:
        """Return an object's first bytes; None if there is no such object."""
        ...

    def download(self, path: str, start: int, into: Sequence[memoryview]) -> None:
        """Fill the views of `into`, in order, from byte `start` on; EOFError if the object ends before."""
        ...

    def find(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """Yield path, size and time of last change of every object below the folder `prefix`, past every cache."""
        ...

    def remove(self, paths: Sequence[str]) -> None:
        """Delete objects, in any order; missing ones are no error."""
        ...

    def withdraw(self, path: str, data: bytes) -> None:
        """Delete an object that holds `data`, and if the server can be told so, no later one."""
        ...

    def uploads(self, prefix: str) -> list[Upload]:
        """Return the unfinished uploads below the folder `prefix`."""
        ...

    def upload_sizes(self, uploads: Sequence[Upload]) -> Sequence[int | None]:
        """Return how many bytes the server holds of each unfinished upload; None of one that it tells nothing of."""
        ...

    def abort(self, upload: Upload) -> None:
        """Abort an unfinished upload; one that is gone is no error."""
        ...


class FilesystemClient:
    """Objects through fsspec's own verbs: Google Cloud Storage, Azure, memory, and what else fsspec knows.

    Single writes are taken to be atomic. Also S3, should s3fs ever be without the method that `requests` calls.
    """

    read_bytes = 4 << 20
    num_readers = 4

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        protocol = connection.origin.protocol
        self._protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._is_s3 = bool(self._protocols & S3_SCHEMES)
        self.is_conditional = self._is_s3

    @property
    def is_outside(self) -> bool:
        """Anywhere but in memory."""
        return "memory" not in self._protocols

    def upload(self, path: str, chunks: Iterable[Buffer], num_bytes: int | None) -> int:
        """Write an object through fsspec's file; closing is what makes it visible, and a failed one is not closed."""
        fs = self._filesystem()
        self._make_folder(fs, path)
        file = fs.open(path, "wb", block_size=max(USUAL_PART, -(-(num_bytes or 0) // 9_000)))
        num_written, may_be_visible = 0, not self._is_s3
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                if view.nbytes:
                    file.write(view.cast("B"))
                num_written += view.nbytes
            may_be_visible = True
            file.close()
        except BaseException as error:
            _abandon(file)
            if may_be_visible and not is_unreachable(error):
                with suppress(Exception):
                    fs.rm_file(path)
            raise
        return num_written

    def begun(self, path: str, num_bytes: int) -> int:
        """Return 0: fsspec does not go on with uploads."""
        return 0

    def upload_rest(self, path: str, chunks: Iterable[Buffer], begin: int, num_bytes: int) -> int:
        """Write an object, from its beginning, as `upload` does."""
        assert begin == 0, "there is nothing to go on with"
        return self.upload(path, chunks, num_bytes)

    def create(self, path: str, data: bytes) -> None:
        """Write an object unless it exists, as far as the filesystem has such a thing."""
        fs = self._filesystem()
        self._make_folder(fs, path)
        options = {"chunksize": len(data) + 1} if self._is_s3 else {}  # never in parts: some servers then overwrite
        try:
            fs.pipe_file(path, data, mode="create", **options)
        except (NotImplementedError, ValueError, TypeError) as error:
            logger.debug("%s has no create-only write: %s", sorted(self._protocols), error)
            self.is_conditional = False
            fs.pipe_file(path, data, **options)

    def _make_folder(self, fs: AbstractFileSystem, path: str) -> None:
        if not self._is_s3:  # there, folders do not exist, and makedirs would make a missing bucket
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def peek(self, path: str, limit_bytes: int) -> bytes | None:
        """Return an object's first bytes; None if there is no such object."""
        try:
            return bytes(self._filesystem().cat_file(path, start=0, end=limit_bytes))
        except FileNotFoundError:
            return None
        except Exception as error:
            if server_code(error) in RANGE_CODES:
                return b""  # an empty object has no first byte
            raise

    def download(self, path: str, start: int, into: Sequence[memoryview]) -> None:
        """Fill the views of `into` from byte `start` on, in requests of up to 32 MiB."""
        size = sum(map(len, into))
        for begin in range(0, size, READ_BYTES):
            end = min(begin + READ_BYTES, size)
            data = memoryview(self._fetch(path, start + begin, end - begin))
            for view in between(into, begin, end):
                view[:] = data[: len(view)]
                data = data[len(view) :]

    def _fetch(self, path: str, start: int, num_bytes: int) -> bytes:
        data = b""
        for _ in range(READ_TRIES):
            try:
                data = self._filesystem().cat_file(path, start=start, end=start + num_bytes)
            except Exception as error:
                if server_code(error) in RANGE_CODES:
                    raise EOFError(start) from error
                raise
            if len(data) == num_bytes:
                return bytes(data)
            if len(data) > num_bytes:
                raise OSError(errno.EIO, f"asked for {num_bytes} bytes, got {len(data)}: it ignores byte ranges")
        raise EOFError(start + len(data))

    def find(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """Yield every object below `prefix`; nothing comes from a cache."""
        fs = self._filesystem()
        fs.invalidate_cache()
        try:
            found: Mapping[str, Any] = fs.find(prefix, detail=True)
        except FileNotFoundError:
            return
        for path, info in found.items():
            if info["type"] == "file":
                yield path, int(info["size"]), _modified(info)

    def remove(self, paths: Sequence[str]) -> None:
        """Delete objects, one request for each."""
        with ThreadPoolExecutor(min(NUM_DELETERS, len(paths)), "distckpt-delete") as pool:
            for _ in pool.map(self._remove, paths):
                pass

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._filesystem().rm_file(path)

    def withdraw(self, path: str, data: bytes) -> None:
        """Delete an object that holds `data`: it is read right before, for fsspec's verb knows no condition."""
        if self.peek(path, len(data) + 1) == data:
            self._remove(path)

    def uploads(self, prefix: str) -> list[Upload]:
        """Return nothing: fsspec does not show unfinished uploads."""
        return []

    def upload_sizes(self, uploads: Sequence[Upload]) -> Sequence[int | None]:
        """Return that nothing is known of any."""
        return [None] * len(uploads)

    def abort(self, upload: Upload) -> None:
        """Do nothing: there is no such upload."""

    def _filesystem(self) -> AbstractFileSystem:
        return self._connection.filesystem()


def _abandon(file: Any) -> None:
    """Abort an upload, and never let its file be closed, not even when it is garbage: that would publish it."""
    with suppress(Exception):
        file.discard()
    with suppress(AttributeError):  # files in memory cannot be marked, and closing them does nothing
        file.closed = True


def _modified(info: Mapping[str, Any]) -> float:
    for key in _CHANGED:
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0

"""Checkpoints in object stores, through fsspec: S3 and what speaks its protocol, and others as far as they go.

Invariant: an upload that fails is aborted and never closed, for closing is what makes an object visible.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

from fsspec import AbstractFileSystem

from distckpt.errors import StorageError
from distckpt.names import checked, join
from distckpt.storage.contract import Buffer, Capabilities, FileInfo, is_plain
from distckpt.storage.failures import STALE_CREDENTIALS, is_unreachable, redacted, remote_error, server_code

PART_BYTES = 16 << 20
MOST_PARTS = 9_000
PARTS_BEFORE_GROWTH = 2_000  # S3 takes 10,000 parts: 2,000 of 16 MiB and 8,000 of 64 MiB make 531 GiB
READ_BYTES = 32 << 20  # one request; s3fs holds about twice as much in memory
READ_TRIES = 3
CREATE_TRIES = 3
CLIENT_TRIES = 2  # s3fs's own, on top of botocore's: its default of 5 makes a dead server cost many minutes
NUM_DELETERS = 8

_S3 = {"s3", "s3a"}
_SECRET_OPTIONS = {"key", "secret", "token", "username", "password"}
_SECRET_CLIENT_OPTIONS = {"aws_access_key_id", "aws_secret_access_key", "aws_session_token"}
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_CHANGED = ("LastModified", "mtime", "modified", "updated", "last_modified", "created")
_RANGE_CODES = {"InvalidRange", "416"}
_RACE_CODES = {"ConditionalRequestConflict", "OperationAborted", "409"}

logger = logging.getLogger("distckpt")


class ObjectStorage:
    """Objects below a prefix of an fsspec filesystem whose single writes are atomic.

    S3 is what it is made for and tested with. `publish` is a conditional PUT (`If-None-Match: *`); a server that
    refuses this header is noticed, and `capabilities` says so from then on; one that ignores it cannot be told apart.
    An upload that is killed leaves parts that only the server sees: give the bucket a rule that aborts incomplete
    multipart uploads after a few days.
    """

    def __init__(self, fs: AbstractFileSystem, root: str, url: str) -> None:
        self._fs = _patient(fs)
        self._pid = os.getpid()
        self._inherited: AbstractFileSystem | None = None
        self._is_expired = False
        self._root = root.rstrip("/")
        self._url = redacted(url)
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._is_s3 = bool(protocols & _S3)
        self._is_memory = "memory" in protocols
        self._is_exclusive = self._is_s3

    def __repr__(self) -> str:
        return f"ObjectStorage({self._url!r})"

    @property
    def url(self) -> str:
        """The root as a URL, without credentials."""
        return self._url

    @property
    def capabilities(self) -> Capabilities:
        """What S3 promises; other filesystems are not known to refuse an existing name when two writers race."""
        return Capabilities(
            exclusive_publish=self._is_exclusive,
            survives_power_loss=not self._is_memory,
            shared=not self._is_memory,
        )

    def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
        """Upload a data file from `chunks`, as `Storage.put` says: one PUT if it is small, else in parts."""
        path, fs = self._path(name), self._filesystem()
        with self._telling("write", name):
            if not self._is_s3:  # there, folders do not exist, and makedirs would make a missing bucket
                fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            # A server takes 10,000 parts at most.
            file = fs.open(path, "wb", block_size=max(PART_BYTES, -(-(num_bytes or 0) // MOST_PARTS)))
        may_be_visible = not self._is_s3
        try:
            num_written = self._upload(file, name, chunks)
            assert num_bytes in (None, num_written), f"{name}: {num_written} bytes of {num_bytes}"
            may_be_visible = True
            with self._telling("write", name):
                file.close()
        except BaseException as error:
            _abandon(file)
            if may_be_visible and not is_unreachable(error):
                with suppress(Exception):
                    fs.rm_file(path)
            raise
        return num_written

    def sync(self, names: Iterable[str]) -> None:
        """Check the names; what `put` has acknowledged is durable."""
        for name in names:
            checked(name)

    def publish(self, name: str, data: bytes) -> None:
        """Write a small file whole, as `Storage.publish` says, by one create-only PUT.

        A PUT can get through although its answer is lost, and servers name the conflict in different ways: after any
        error, what is there decides. A look before the PUT protects what exists on servers that ignore the condition.
        """
        path = self._path(name)
        with self._telling("publish", name):
            found = self._peek(path, len(data) + 1)
        for tries_left in reversed(range(CREATE_TRIES)):
            if found is not None:
                break
            try:
                self._create(path, data)
                return
            except Exception as error:
                found = self._found_after(error, name, len(data) + 1)
                if found is None and (tries_left == 0 or server_code(error) not in _RACE_CODES):
                    raise self._error(error, "publish", name) from error
        if found != data:
            raise FileExistsError(errno.EEXIST, "exists with other content", self._shown(name))

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` from the file's byte `offset` on, as `Storage.read` says, in requests of up to 32 MiB."""
        assert offset >= 0, "offsets count from the file's start"
        path = self._path(name)
        if into.nbytes == 0:
            return
        into = into.cast("B")
        for start in range(0, len(into), READ_BYTES):
            piece = into[start : start + READ_BYTES]
            piece[:] = self._fetch(path, name, offset + start, len(piece))

    def read_all(self, name: str, *, limit_bytes: int) -> bytes:
        """Return a small file whole, as `Storage.read_all` says, by one request."""
        path = self._path(name)
        with self._telling("read", name):
            data = self._peek(path, limit_bytes + 1)
        if data is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._shown(name))
        if len(data) > limit_bytes:
            raise StorageError(path=self._shown(name), action="read", cause=f"it is larger than {limit_bytes:,} bytes")
        return data

    def list(self, folder: str = "") -> list[FileInfo]:
        """Return every file below `folder`, as `Storage.list` says; nothing comes from a cache."""
        prefix, fs = self._path(folder) if folder else self._root, self._filesystem()
        with self._telling("list", folder):
            fs.invalidate_cache()
            try:
                found: Mapping[str, Any] = fs.find(prefix, detail=True)
            except FileNotFoundError as error:
                if server_code(error) == "NoSuchBucket":
                    raise
                return []
        infos = []
        for path, info in found.items():
            name = path.removeprefix(f"{self._root}/")
            if path.startswith(f"{prefix}/") and info["type"] == "file" and is_plain(name):
                infos.append(FileInfo(name=name, num_bytes=int(info["size"]), modified=_modified(info)))
        return sorted(infos, key=lambda info: info.name)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files in order, as `Storage.delete` says, one request for each.

        Not S3's bulk call: s3fs drops the errors that it reports per file, and some servers do not have it.
        """
        ordered = [checked(name) for name in names]
        for _, group in itertools.groupby(ordered, key=lambda name: name.rpartition("/")[0]):
            first, *others = group
            self._remove(first)
            if others:
                with ThreadPoolExecutor(min(NUM_DELETERS, len(others)), "distckpt-delete") as pool:
                    for _ in pool.map(self._remove, others):
                        pass

    def _path(self, name: str) -> str:
        return join(self._root, checked(name))

    def _shown(self, name: str) -> str:
        return join(self._url, name)

    def _filesystem(self) -> AbstractFileSystem:
        """Return the filesystem, built anew where connections and threads are lost (a forked child), or credentials."""
        is_forked = self._pid != os.getpid()
        if is_forked or self._is_expired:
            if is_forked:
                self._inherited = self._fs  # kept: its finalizer would talk to a thread that is not there
            if self._fs.async_impl:
                options = {**self._fs.storage_options, "skip_instance_cache": True}
                self._fs = _patient(type(self._fs)(*self._fs.storage_args, **options))
            self._pid, self._is_expired = os.getpid(), False
        return self._fs

    def _error(self, error: BaseException, action: str, name: str) -> StorageError:
        """Return the error to raise. Expired credentials are looked up anew for the next call."""
        self._is_expired = self._is_expired or server_code(error) in STALE_CREDENTIALS
        options = self._fs.storage_options
        client_options = options.get("client_kwargs") or {}
        secrets = [options.get(option) for option in _SECRET_OPTIONS]
        secrets += [client_options.get(option) for option in _SECRET_CLIENT_OPTIONS]
        secrets += [os.environ.get(variable) for variable in _SECRET_VARIABLES]
        known = frozenset(secret for secret in secrets if isinstance(secret, str) and secret)
        return remote_error(error, action=action, path=self._shown(name), secrets=known)

    @contextmanager
    def _telling(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            raise self._error(error, action, name) from error

    def _upload(self, file: Any, name: str, chunks: Iterable[Buffer]) -> int:
        """Feed `chunks` to an open upload, cut so that the parts that it sends are of equal size."""
        num_bytes = num_parts = num_filled = 0
        part_bytes = PART_BYTES
        for chunk in chunks:
            left = memoryview(chunk)
            left = left.cast("B") if left.nbytes else memoryview(b"")
            while left:
                piece = left[: part_bytes - num_filled]
                with self._telling("write", name):
                    file.write(piece)
                left = left[len(piece) :]
                num_bytes += len(piece)
                num_filled += len(piece)
                if num_filled == part_bytes:
                    num_filled = 0
                    num_parts += 1
                    if part_size(num_parts) != part_bytes:
                        part_bytes = file.blocksize = part_size(num_parts)
        return num_bytes

    def _create(self, path: str, data: bytes) -> None:
        """Write an object unless it exists, in one request; without the condition if the server has no such thing."""
        fs = self._filesystem()
        if not self._is_s3:
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        options = {"chunksize": len(data) + 1} if self._is_s3 else {}  # never in parts: some servers then overwrite
        if self._is_exclusive or not self._is_s3:
            try:
                fs.pipe_file(path, data, mode="create", **options)
                return
            except (NotImplementedError, ValueError) as error:
                logger.debug("%s has no create-only write: %s", self._url, error)
            except OSError as error:
                if server_code(error) not in {"NotImplemented", "501"}:
                    raise
                self._is_exclusive = False
                logger.warning("%s has no create-only PUT: never let two jobs share a directory there", self._url)
        fs.pipe_file(path, data, **options)

    def _found_after(self, error: Exception, name: str, limit_bytes: int) -> bytes | None:
        """Return what is there after a create-only write has failed; raise its error if that cannot be seen."""
        try:
            return self._peek(self._path(name), limit_bytes)
        except Exception:  # noqa: BLE001 - the first error is the one to tell
            raise self._error(error, "publish", name) from error

    def _peek(self, path: str, limit_bytes: int) -> bytes | None:
        """Return an object's first bytes; None if there is no such object."""
        try:
            return bytes(self._filesystem().cat_file(path, start=0, end=limit_bytes))
        except FileNotFoundError:
            return None
        except Exception as error:
            if server_code(error) in _RANGE_CODES:
                return b""  # an empty object has no first byte
            raise

    def _fetch(self, path: str, name: str, start: int, num_bytes: int) -> bytes:
        end = start + num_bytes
        for _ in range(READ_TRIES):
            try:
                data = self._filesystem().cat_file(path, start=start, end=end)
            except FileNotFoundError as error:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._shown(name)) from error
            except Exception as error:
                if server_code(error) in _RANGE_CODES:
                    raise EOFError(f"{self._shown(name)!r} ends before byte {start}") from error
                raise self._error(error, "read", name) from error
            if len(data) == num_bytes:
                return bytes(data)
            if len(data) > num_bytes:
                cause = f"asked for {num_bytes} bytes, the server sent {len(data)}; it ignores byte ranges"
                raise StorageError(path=self._shown(name), action="read", cause=cause)
        raise EOFError(f"{self._shown(name)!r} ends at byte {start + len(data)}, {end} are needed")

    def _remove(self, name: str) -> None:
        with self._telling("delete", name), suppress(FileNotFoundError):
            self._filesystem().rm_file(self._path(name))


def part_size(num_parts_sent: int) -> int:
    """Return the size of the next part of an upload in bytes, so that 10,000 parts are enough for any shard."""
    return PART_BYTES if num_parts_sent < PARTS_BEFORE_GROWTH else 4 * PART_BYTES


def _patient(fs: AbstractFileSystem) -> AbstractFileSystem:
    """Limit how often s3fs repeats what botocore has repeated already."""
    if hasattr(fs, "retries"):
        fs.retries = CLIENT_TRIES
    return fs


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

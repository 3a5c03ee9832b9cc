"""Checkpoints in object stores: S3 and what speaks its protocol, and others through fsspec as far as they go.

Invariant: an upload that fails is aborted and never finished, for finishing is what makes an object visible.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fsspec import AbstractFileSystem

from distckpt.errors import DistckptError, StorageError
from distckpt.names import checked, join
from distckpt.storage.clients import RACE_CODES, S3_SCHEMES, Client, FilesystemClient, Upload
from distckpt.storage.connection import Connection
from distckpt.storage.contract import DAY_S, Begun, Buffer, Capabilities, FileInfo, UnfinishedUpload, is_plain
from distckpt.storage.failures import STALE_CREDENTIALS, redacted, remote_error, server_code
from distckpt.storage.retries import judged
from distckpt.storage.s3 import S3Client

CREATE_TRIES = 3


class ObjectStorage:
    """Objects below a prefix of an fsspec filesystem whose single writes are atomic.

    S3 is what it is made for and tested with. `publish` is a conditional PUT (`If-None-Match: *`); a server that
    refuses this header, or ignores it, is found out at the first one, and `capabilities` says so from then on.
    An upload that is killed leaves parts that only the server sees: `uploads` finds them, `abort_uploads` ends them.

    Args:
        fs: The filesystem; it must not be used by others, for its settings are changed.
        root: The prefix, as the filesystem has it: "bucket/folder".
        url: The same as users write it.
        engine: What uploads to S3: "s3fs", "obstore", or None for the faster one that can be used.
    """

    def __init__(self, fs: AbstractFileSystem, root: str, url: str, *, engine: str | None = None) -> None:
        self._root = root.rstrip("/")
        self._url = redacted(url)
        self._engine = engine
        self._connection = Connection(fs)
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._client: Client
        if protocols & S3_SCHEMES and hasattr(fs, "_call_s3"):
            self._client = S3Client(self._connection, url=self._url, engine=engine)
        else:
            self._client = FilesystemClient(self._connection)

    def __repr__(self) -> str:
        return f"ObjectStorage({self._url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (self._connection.origin, self._root, self._url, self._engine)

    @property
    def url(self) -> str:
        """The root as a URL, without credentials."""
        return self._url

    @property
    def capabilities(self) -> Capabilities:
        """What S3 promises; other filesystems are not known to refuse an existing name when two writers race."""
        return Capabilities(
            exclusive_publish=self._client.is_conditional,
            survives_power_loss=self._client.is_outside,
            shared=self._client.is_outside,
            read_bytes=self._client.read_bytes,
            num_readers=self._client.num_readers,
        )

    def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
        """Upload a data file from `chunks`, as `Storage.put` says: one PUT if it is small, else in parts.

        To S3 their memory is sent without a copy: it must not change before this returns.
        """
        path, source = self._path(name), _Watched(chunks)
        try:
            num_written = self._client.upload(path, source, num_bytes)
        except Exception as error:
            if error is source.error or isinstance(error, DistckptError):
                raise
            raise self._error(error, "write", name) from error
        assert num_bytes in (None, num_written), f"{name}: {num_written} bytes of {num_bytes}"
        return num_written

    def begun(self, name: str, *, num_bytes: int) -> Begun:
        """Return which parts the server has of an unfinished upload, as `ContinuingStorage.begun` says."""
        path = self._path(name)
        with self._telling("list the unfinished uploads of", name):
            return Begun(num_bytes=self._client.begun(path, num_bytes), is_sure=True)

    def put_rest(self, name: str, chunks: Iterable[Buffer], *, begin: int, num_bytes: int) -> int:
        """Go on with an unfinished upload, as `ContinuingStorage.put_rest` says, or begin it."""
        path, source = self._path(name), _Watched(chunks)
        try:
            return self._client.upload_rest(path, source, begin, num_bytes)
        except Exception as error:
            if error is source.error or isinstance(error, DistckptError):
                raise
            raise self._error(error, "write", name) from error

    def sync(self, names: Iterable[str]) -> None:
        """Check the names; what `put` has acknowledged is durable."""
        for name in names:
            checked(name)

    def publish(self, name: str, data: bytes) -> None:
        """Write a small file whole, as `Storage.publish` says, by one create-only PUT.

        A PUT can get through although its answer is lost, and servers name the conflict in different ways: after any
        error, what is there decides. Looks before and after it protect what exists on servers without conditions;
        two writers who race there may still both believe that they have won.
        """
        path = self._path(name)
        with self._telling("publish", name):
            found = self._client.peek(path, len(data) + 1)
        for tries_left in reversed(range(CREATE_TRIES)):
            if found is not None:
                break
            try:
                self._client.create(path, data)
                if self._client.is_conditional:
                    return
                found = self._client.peek(path, len(data) + 1)
            except Exception as error:
                found = self._found_after(error, name, len(data) + 1)
                if found is None and (tries_left == 0 or server_code(error) not in RACE_CODES):
                    raise self._error(error, "publish", name) from error
        if found != data:
            raise FileExistsError(errno.EEXIST, "exists with other content", self._shown(name))

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` from the file's byte `offset` on, as `Storage.read` says, by several requests at once."""
        self.read_scattered(name, offset, [into])

    def read_scattered(self, name: str, offset: int, into: Sequence[memoryview]) -> None:
        """Fill several buffers, one after another, from the file's byte `offset` on, as if they were one."""
        assert offset >= 0, "offsets count from the file's start"
        path = self._path(name)
        views = [view.cast("B") for view in into if view.nbytes]
        if not views:
            return
        try:
            self._client.download(path, offset, views)
        except EOFError as error:
            end = offset + sum(map(len, views))
            raise EOFError(f"{self._shown(name)!r} ends before byte {end}, which is needed") from error
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._shown(name)) from error
        except Exception as error:
            raise self._error(error, "read", name) from error

    def read_all(self, name: str, *, limit_bytes: int) -> bytes:
        """Return a small file whole, as `Storage.read_all` says, by one request."""
        path = self._path(name)
        with self._telling("read", name):
            data = self._client.peek(path, limit_bytes + 1)
        if data is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._shown(name))
        if len(data) > limit_bytes:
            raise StorageError(path=self._shown(name), action="read", cause=f"it is larger than {limit_bytes:,} bytes")
        return data

    def list(self, folder: str = "") -> list[FileInfo]:
        """Return every file below `folder`, as `Storage.list` says; nothing comes from a cache."""
        prefix = self._path(folder) if folder else self._root
        infos = []
        with self._telling("list", folder):
            for path, num_bytes, modified in self._client.find(prefix):
                name = self._name(path)
                if path.startswith(f"{prefix}/") and is_plain(name):
                    infos.append(FileInfo(name=name, num_bytes=num_bytes, modified=modified))
        return sorted(infos, key=lambda info: info.name)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files in order, as `Storage.delete` says, one request for each."""
        ordered = [checked(name) for name in names]
        for _, group in itertools.groupby(ordered, key=lambda name: name.rpartition("/")[0]):
            first, *others = group
            self._remove([first])
            if others:
                self._remove(others)

    def withdraw(self, name: str, data: bytes) -> None:
        """Delete a published file, as `contract.withdraw` says, on S3 by a DELETE that names its ETag."""
        with self._telling("delete", name):
            self._client.withdraw(self._path(name), data)

    def uploads(self, *, older_than_s: float = DAY_S, sized: bool = False) -> Sequence[UnfinishedUpload]:
        """Return unfinished uploads, as `KeepsUploads.uploads` says; none where only fsspec knows the server."""
        newest = time.time() - older_than_s
        with self._telling("list the unfinished uploads of", ""):
            found = [
                each for each in self._client.uploads(self._root) if older_than_s <= 0 or 0 < each.started <= newest
            ]
            sizes = self._client.upload_sizes(found) if sized else [None] * len(found)
        uploads = [
            UnfinishedUpload(name=self._name(each.path), id=each.id, started=each.started, num_bytes=size)
            for each, size in zip(found, sizes, strict=True)
        ]
        return sorted((each for each in uploads if is_plain(each.name)), key=lambda each: each.started)

    def abort_uploads(self, uploads: Iterable[UnfinishedUpload]) -> int:
        """Abort unfinished uploads, as `KeepsUploads.abort_uploads` says."""
        num_aborted = 0
        for each in uploads:
            path = self._path(each.name)
            with self._telling("abort the upload of", each.name):
                self._client.abort(Upload(path=path, id=each.id, started=each.started))
            num_aborted += 1
        return num_aborted

    def _name(self, path: str) -> str:
        return path.removeprefix(f"{self._root}/")

    def _path(self, name: str) -> str:
        return join(self._root, checked(name))

    def _shown(self, name: str) -> str:
        return join(self._url, name) if name else self._url

    def _remove(self, names: Sequence[str]) -> None:
        with self._telling("delete", names[0]):
            self._client.remove([self._path(name) for name in names])

    def _error(self, error: BaseException, action: str, name: str) -> StorageError:
        """Return the error to raise. Expired credentials are looked up anew for the next call."""
        if server_code(error) in STALE_CREDENTIALS:
            self._connection.forget()
        is_final = server_code(error) is not None and judged(error) == "never"
        secrets = self._connection.secrets()
        return remote_error(error, action=action, path=self._shown(name), secrets=secrets, is_final=is_final)

    @contextmanager
    def _telling(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except DistckptError:
            raise
        except Exception as error:
            raise self._error(error, action, name) from error

    def _found_after(self, error: Exception, name: str, limit_bytes: int) -> bytes | None:
        """Return what is there after a create-only write has failed; raise its error if that cannot be seen."""
        try:
            return self._client.peek(self._path(name), limit_bytes)
        except Exception:  # noqa: BLE001 - the first error is the one to tell
            raise self._error(error, "publish", name) from error


class _Watched(Iterator[Buffer]):
    """Chunks, and the error that they raised, which is the caller's own."""

    def __init__(self, chunks: Iterable[Buffer]) -> None:
        self._chunks = iter(chunks)
        self.error: BaseException | None = None

    def __next__(self) -> Buffer:
        try:
            return next(self._chunks)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise


def _remade(fs: AbstractFileSystem, root: str, url: str, engine: str | None) -> ObjectStorage:
    return ObjectStorage(fs, root, url, engine=engine)

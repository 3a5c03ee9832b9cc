"""Storages round a storage."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from distckpt.storage.contract import Buffer, Capabilities, FileInfo, Storage, read_scattered, withdraw
from distckpt.storage.room import Room, room_of


@dataclass(frozen=True, slots=True, kw_only=True)
class VerbCount:
    """How often one verb was called, and what it moved.

    Attributes:
        num_calls: Calls begun, also those that failed.
        num_bytes: Bytes handed over by `put` and `publish`, or asked for by `read` and `read_all`.
    """

    num_calls: int = 0
    num_bytes: int = 0


class CountingStorage:
    """A storage that counts what is done with another one; any thread may use it."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self._lock = threading.Lock()
        self._counts: dict[str, VerbCount] = {}

    @property
    def url(self) -> str:
        """The inner storage's root."""
        return self.inner.url

    @property
    def capabilities(self) -> Capabilities:
        """What the inner storage promises."""
        return self.inner.capabilities

    def room(self) -> Room | None:
        """Return how much room the inner storage has left; not counted."""
        return room_of(self.inner)

    def counted(self, verb: str) -> VerbCount:
        """Return what was counted for "put", "sync", "publish", "read", "read_all", "list" or "delete"."""
        with self._lock:
            return self._counts.get(verb, VerbCount())

    def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
        """Write through to the inner storage."""
        self._count("put", num_calls=1)
        return self.inner.put(name, self._counted_chunks(chunks), num_bytes=num_bytes)

    def sync(self, names: Iterable[str]) -> None:
        """Sync the inner storage."""
        self._count("sync", num_calls=1)
        self.inner.sync(names)

    def publish(self, name: str, data: bytes) -> None:
        """Publish on the inner storage."""
        self._count("publish", num_calls=1, num_bytes=len(data))
        self.inner.publish(name, data)

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Read from the inner storage."""
        self._count("read", num_calls=1, num_bytes=into.nbytes)
        self.inner.read(name, offset, into)

    def read_scattered(self, name: str, offset: int, into: Sequence[memoryview]) -> None:
        """Read from the inner storage; counted as one "read"."""
        self._count("read", num_calls=1, num_bytes=sum(view.nbytes for view in into))
        read_scattered(self.inner, name, offset, into)

    def read_all(self, name: str, *, limit_bytes: int) -> bytes:
        """Read from the inner storage."""
        self._count("read_all", num_calls=1)
        data = self.inner.read_all(name, limit_bytes=limit_bytes)
        self._count("read_all", num_bytes=len(data))
        return data

    def list(self, folder: str = "") -> list[FileInfo]:
        """List the inner storage."""
        self._count("list", num_calls=1)
        return self.inner.list(folder)

    def delete(self, names: Iterable[str]) -> None:
        """Delete from the inner storage."""
        self._count("delete", num_calls=1)
        self.inner.delete(names)

    def withdraw(self, name: str, data: bytes) -> None:
        """Withdraw a file from the inner storage; counted as a "delete"."""
        self._count("delete", num_calls=1)
        withdraw(self.inner, name, data)

    def _counted_chunks(self, chunks: Iterable[Buffer]) -> Iterator[Buffer]:
        for chunk in chunks:
            self._count("put", num_bytes=memoryview(chunk).nbytes)
            yield chunk

    def _count(self, verb: str, *, num_calls: int = 0, num_bytes: int = 0) -> None:
        with self._lock:
            count = self._counts.get(verb, VerbCount())
            self._counts[verb] = VerbCount(num_calls=count.num_calls + num_calls, num_bytes=count.num_bytes + num_bytes)

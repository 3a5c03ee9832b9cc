"""A storage that fails, or dies, at its N-th operation: the seam for tests of every crash point."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from distckpt.storage import Buffer, Capabilities, FileInfo, Storage


class FailingStorage:
    """A storage whose `fail_at`-th change (from 0) fails; reads and lists always work.

    Changes are counted one by one: each chunk of a put, its end, each sync, the moment before and the moment after
    each publish, each deleted file. `changes` names those that were begun, so a run that is not made to fail counts
    the points at which another one can be.

    Args:
        inner: Where the changes go.
        fail_at: The change to fail at; None for never.
        fail: What happens then: raises, or ends the process (`die`).
    """

    def __init__(self, inner: Storage, *, fail_at: int | None = None, fail: Callable[[], None] | None = None) -> None:
        self.inner = inner
        self.fail_at = fail_at
        self.fail = fail or raise_io_error
        self.changes: list[str] = []

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
        def counted() -> Iterator[Buffer]:
            for chunk in chunks:
                self._change(f"put a chunk of {name}")
                yield chunk
            self._change(f"finish {name}")

        return self.inner.put(name, counted(), num_bytes=num_bytes)

    def sync(self, names: Iterable[str]) -> None:
        self._change("sync")
        self.inner.sync(names)

    def publish(self, name: str, data: bytes) -> None:
        self._change(f"publish {name}")
        self.inner.publish(name, data)
        self._change(f"answer that {name} is published")

    def read(self, name: str, offset: int, into: memoryview) -> None:
        self.inner.read(name, offset, into)

    def read_all(self, name: str, *, limit_bytes: int) -> bytes:
        return self.inner.read_all(name, limit_bytes=limit_bytes)

    def list(self, folder: str = "") -> list[FileInfo]:
        return self.inner.list(folder)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._change(f"delete {name}")
            self.inner.delete([name])

    def _change(self, what: str) -> None:
        index = len(self.changes)
        self.changes.append(what)
        if index == self.fail_at:
            self.fail()


def raise_io_error() -> None:
    """Fail as a broken disk does."""
    raise OSError(5, "Input/output error, made by a test")


def die() -> None:
    """End this process at once, as kill -9 does: nothing is cleaned up."""
    os._exit(137)

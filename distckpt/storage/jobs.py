"""Work on an event loop of another thread, begun and awaited from this one.

Invariant: when waiting ends, also by Ctrl-C, the work has ended too: nothing writes to memory that was handed back.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")

CANCEL_LIMIT_S = 30.0


class Job(Generic[T]):
    """A coroutine that runs on a loop of another thread.

    Args:
        work: The coroutine.
        loop: A loop that runs in another thread.
        on_end: Called on that loop when the work has ended in any way.
    """

    def __init__(
        self,
        work: Coroutine[Any, Any, T],
        loop: asyncio.AbstractEventLoop,
        *,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._ended = threading.Event()
        self._task: asyncio.Task[T] | None = None
        self._on_end = on_end
        loop.call_soon_threadsafe(self._begin, work)

    def _begin(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # seen, so that asyncio does not complain about a job that nobody asks any more
        if self._on_end is not None:
            self._on_end()
        self._ended.set()

    @property
    def has_ended(self) -> bool:
        """Whether it has ended in any way."""
        return self._ended.is_set()

    @property
    def has_succeeded(self) -> bool:
        """Whether it has ended with a result."""
        task = self._task
        return self.has_ended and task is not None and not task.cancelled() and task.exception() is None

    def result(self) -> T:
        """Wait for the end and return the result; if waiting is interrupted, the work is ended first."""
        try:
            self._ended.wait()
        except BaseException:
            self.cancel()
            self.wait(CANCEL_LIMIT_S)
            raise
        assert self._task is not None
        return self._task.result()

    def cancel(self) -> None:
        """Ask the work to end; it has ended after `wait`."""
        self._loop.call_soon_threadsafe(lambda: self._task is not None and self._task.cancel())

    def wait(self, limit_s: float) -> None:
        """Wait until the work has ended in any way."""
        self._ended.wait(limit_s)


def run(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """Run a coroutine on a loop of another thread and return its result."""
    return Job(work, loop).result()

"""How many requests are on their way at once: fewer when the server is too busy, more again when it is not."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType


class Window:
    """A limit on requests at once that is halved when the server throttles and grows back one by one.

    An asynchronous context manager round each request; all methods are called on one event loop.

    Attributes:
        most: The limit as long as nobody throttles.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._limit = float(most)
        self._num_inside = 0
        self._num_good = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        """How many requests may be on their way now."""
        return int(self._limit)

    async def __aenter__(self) -> None:
        while self._num_inside >= self.limit:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake()  # the place that this one was given goes to the next
                raise
        self._num_inside += 1

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._num_inside -= 1
        self._wake()

    def succeeded(self) -> None:
        """Let the limit grow a little: by one for each window full of answers."""
        self._num_good += 1
        self._limit = min(float(self.most), self._limit + 1 / self._limit)
        self._wake()

    def throttled(self) -> None:
        """Halve the limit; the refusals that come together with the first one count once."""
        if self._num_good or self._limit == self.most:
            self._limit = max(1.0, self._limit / 2)
        self._num_good = 0

    def _wake(self) -> None:
        room = self.limit - self._num_inside
        while self._waiting and room > 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                room -= 1

"""The bulletin: brings what happens to a job to those who listen, on rank 0 alone.

Invariant: a callback is called on the thread of the training, between two of its steps, and whatever it raises ends
there. Only an `EventLog`, which takes care of threads itself, is told at once.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from distckpt.events import Callback, Event, EventLog, Started
from distckpt.ranks import Ranks
from distckpt.version import __version__

logger = logging.getLogger("distckpt")


class Audience:
    """Callbacks that are told of one event after another; one that raises is told of no more.

    Args:
        callbacks: Those to tell.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks = list(callbacks)

    def add(self, callback: Callback) -> None:
        """Tell one more from now on.

        Ranks: any.
        """
        self._callbacks.append(callback)

    def __call__(self, event: Event) -> None:
        """Tell all."""
        for callback in list(self._callbacks):
            try:
                callback(event)
            except Exception:
                self._callbacks.remove(callback)
                logger.warning(
                    "callback %s failed at a %r event, and is not called again",
                    *(getattr(callback, "__qualname__", callback), event.kind),
                    exc_info=True,
                )


class Bulletin:
    """What one job tells of itself.

    Args:
        callbacks: Those to tell.

    Attributes:
        job: The job's short name, which no other has.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        callbacks = list(callbacks)
        self.job = secrets.token_hex(4)
        self._at_once = Audience(callback for callback in callbacks if isinstance(callback, EventLog))
        self._later = Audience(callback for callback in callbacks if not isinstance(callback, EventLog))
        self._waiting: deque[Event] = deque()
        self._is_open = False

    def begin(self, ranks: Ranks, *, directory: str) -> None:
        """Tell on rank 0, from now on; first, that the job has started.

        Ranks: any; nothing is ever told on others than rank 0.
        """
        self._is_open = ranks.rank == 0
        world_size, host, pid = ranks.world_size, socket.gethostname(), os.getpid()
        self.post(Started(world_size=world_size, host=host, pid=pid, directory=directory, version=__version__))

    def post(self, event: Event) -> None:
        """Tell of an event: those at once who can take it on any thread, the others when `deliver` is called.

        Ranks: any, on any thread.
        """
        if self._is_open:
            event = replace(event, job=self.job)
            self._at_once(event)
            self._waiting.append(event)

    def deliver(self) -> None:
        """Tell the callbacks what they have not been told yet.

        Ranks: any, on the thread of the training; blocks as long as the callbacks do.
        """
        while self._waiting:
            self._later(self._waiting.popleft())

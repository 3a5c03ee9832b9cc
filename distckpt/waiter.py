"""The waiter: waits in the job's store on a thread of its own, so that a wait can be interrupted, and ends in time.

Invariant: a wait that was left is never joined by another one in the same connection.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

import torch.distributed as dist


class NoAnswerError(Exception):
    """The store has not answered in time."""


class Waiter:
    """Waits in the store, on a thread of its own: in there no signal would be heard, and a wait that is over may go on.

    For when its time is up, the store's client tells the server so, and waits for the answer; if the link between them
    is cut, that takes as long as TCP takes to give a connection up, a quarter of an hour.
    The thread ends with this object.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_left = False

    def do(self, work: Callable[[], None], *, limit_s: float) -> None:
        """Do `work`, and return when it is done.

        A signal's handler may raise in between, or its time be up; `work` then goes on, and no other can be done.

        Raises:
            NoAnswerError: It is not done within `limit_s`.
            InterruptedError: The work before is not done yet.

        Ranks: any.
        """
        if threading.current_thread() is not threading.main_thread() and not dist.is_initialized():
            work()  # no other process is there, nor a link to it
            return
        if self._is_left:
            raise InterruptedError("it was interrupted while it waited for the other ranks")
        if self._thread is None:
            # A daemon: a job that ends while it waits is not held up by it.
            self._thread = threading.Thread(
                target=_work_off, args=(self._work, self._done), name="distckpt-wait", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._work.put, None).atexit = False
        self._is_left = True
        self._work.put(work)
        try:
            error = self._done.get(timeout=limit_s)
        except queue.Empty:
            raise NoAnswerError from None
        self._is_left = False
        if error is not None:
            raise error


def _work_off(
    work: queue.SimpleQueue[Callable[[], None] | None], done: queue.SimpleQueue[BaseException | None]
) -> None:
    """Do what comes, until None does; hold on to nothing in between."""
    while (todo := work.get()) is not None:
        try:
            todo()
        except BaseException as error:  # noqa: BLE001  raised by `do`
            done.put(error)
        else:
            done.put(None)
        del todo

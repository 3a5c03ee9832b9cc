"""Preemption: a request to stop soon, heard on any rank, answered by all at the same step.

A signal's handler only sets a flag. At the next step's boundary the rank that has it announces a step at which to stop,
one that no rank can have passed while ranks wait for each other once a step; every rank looks for it at every boundary.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from distckpt.ranks import Ranks

logger = logging.getLogger("distckpt")

_STOP = "stop"
_IMPATIENT_S = 5.0  # a launcher forwards a signal that a terminal has sent already; a person repeats it later


class Preemption:
    """Listens for signals, and agrees with the other ranks on the step at which to stop.

    Args:
        signals: Which signals ask for a stop.

    Attributes:
        requested: Whether this process was asked to stop.
    """

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self.requested = False
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Any] = {}
        self._first_s = 0.0
        self._stop_at: int | None = None
        self._agreed = False

    def listen(self) -> None:
        """Install the handlers; only the main thread can, elsewhere this warns and does nothing.

        Ranks: any.
        """
        if self._before or not self._signals:
            return
        if threading.current_thread() is not threading.main_thread():
            logger.warning("signals are not handled: the manager is used outside the main thread")
            return
        for number in self._signals:
            self._before[number] = signal.signal(number, self._handle)

    def ignore(self) -> None:
        """Put the handlers back that were there before.

        Ranks: any.
        """
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the request. An interrupt that is repeated later is one of a person who does not want to wait."""
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._first_s > _IMPATIENT_S:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first_s = True, now
        before = self._before.get(signal.Signals(number))
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    def stops(self, step: int, ranks: Ranks) -> bool:
        """Say whether the job stops after `step`, the same on every rank.

        Args:
            step: The step that this rank has just completed.
            ranks: All ranks.

        Raises:
            RankTimeoutError: A stop is due, and a rank did not come to it.

        Ranks: all, once after every step; blocks only when a stop is due.
        """
        if ranks.world_size == 1:
            return self.requested
        if self.requested and self._stop_at is None:
            # While this rank is between two steps no other can be further than one step ahead of it.
            ranks.announce(_STOP, step + 1)
        if self._stop_at is None:
            self._stop_at = ranks.announced(_STOP)
        if self._stop_at is None or step < self._stop_at:
            return False
        if not self._agreed:
            # Ranks that never wait for each other may have gone further: then it is the furthest one's step.
            self._stop_at = ranks.agree("stop", lambda: step, _furthest)
            self._agreed = True
        return step == self._stop_at


def _furthest(steps: list[int]) -> int:
    return max(steps)

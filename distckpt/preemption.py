"""Preemption: a request to stop soon, heard by this process; the schedule brings it to all ranks.

A signal's handler only sets a flag, which is looked at between two steps.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

logger = logging.getLogger("distckpt")

_IMPATIENT_S = 5.0  # a launcher forwards a signal that a terminal has sent already; a person repeats it later


class Preemption:
    """Listens for signals that ask this process to stop.

    Args:
        signals: Which signals ask for a stop.

    Attributes:
        requested: Whether this process was asked to stop.
        signal: The name of the signal that asked first; None if none did.
    """

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self.requested = False
        self.signal: str | None = None
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Any] = {}
        self._first_s = 0.0

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
            self.requested, self._first_s, self.signal = True, now, signal.Signals(number).name
        before = self._before.get(signal.Signals(number))
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

"""Preemption: a request to stop soon, heard by this process; the schedule brings it to all ranks.

A signal's handler only sets a flag and takes the time; it is looked at between two steps.
The end of an allocation that is known beforehand is such a request, too.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from distckpt.deadline import Deadline

logger = logging.getLogger("distckpt")

_IMPATIENT_S = 5.0  # a launcher forwards a signal that a terminal has sent already; a person repeats it later


class Preemption:
    """Listens for signals that ask this process to stop, and looks out for the end of its allocation.

    Args:
        signals: Which signals ask for a stop.
        deadline: What is known about the end of the job.

    Attributes:
        requested: Whether this process was asked to stop.
        cause: What asked, in words; None as long as nothing did.
        signal: The name of the signal that asked first; None if none did.
    """

    def __init__(self, signals: Sequence[signal.Signals], *, deadline: Deadline | None = None) -> None:
        self.requested = False
        self.cause: str | None = None
        self._deadline = Deadline() if deadline is None else deadline
        self.signal: str | None = None
        self._signals = tuple(signals)
        self._before: dict[signal.Signals, Any] = {}
        self._first_s = 0.0

    @property
    def age_s(self) -> float:
        """Seconds since the request; 0 before."""
        return time.monotonic() - self._first_s if self.requested else 0.0

    def left_s(self) -> float | None:
        """Return the seconds that this process has left, as far as that is known.

        Ranks: any.
        """
        return self._deadline.left_s(now=time.time(), signalled=self.signal, age_s=self.age_s)

    def look_at_end(self, margin_s: float) -> None:
        """Take the end of the allocation for a request, once it is no further than `margin_s`.

        Ranks: any.
        """
        if not self.requested and self._deadline.is_near(now=time.time(), margin_s=margin_s):
            self.requested, self.cause, self._first_s = True, "the end of the allocation is near", time.monotonic()

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
            if number == signal.SIGUSR1 and _is_taken(number):
                logger.info("%s is left alone: something else in this process handles it already", number.name)
                continue
            self._before[number] = signal.signal(number, self._handle)

    def ignore(self) -> None:
        """Put the handlers back that were there before, but where another one has come since.

        Ranks: any.
        """
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the request. An interrupt that is repeated later is one of a person who does not want to wait."""
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._first_s > _IMPATIENT_S:
            raise KeyboardInterrupt
        if self.signal is None:  # the end of an allocation may be followed by a signal, which counts from now on
            self.signal = self.cause = signal.Signals(number).name
            self.requested, self._first_s = True, now
        before = self._before.get(signal.Signals(number))
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)


def known_deadline(*, grace_s: float | None, ends_at: float | None) -> Deadline:
    """Return what is known about the end of this process: what the user says, else what its environment does.

    Args:
        grace_s: Seconds from a signal until the launcher kills; None if the user does not say.
        ends_at: When the allocation ends, in seconds since 1970; None if the user does not say.

    Ranks: any.
    """
    return Deadline.of(
        os.environ,
        now=time.time(),
        grace_s=grace_s,
        ends_at=ends_at,
        is_grace_settable=_is_grace_settable(),
    )


@functools.cache
def _is_grace_settable() -> bool:
    """Say whether torchrun can be told how long to wait after a signal; before torch 2.12 it always waits for 30 s."""
    return torch.__version__ >= "2.12"


def _is_taken(number: signal.Signals) -> bool:
    """Say whether something that is not Python code handles a signal, such as faulthandler, which dumps stacks.

    Python does not know of such a handler, and would replace it.

    Source: proc(5): SigCgt is the mask of the signals that are caught.
    """
    if callable(signal.getsignal(number)):
        return False
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        [mask] = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
    except (OSError, ValueError):
        return False
    return bool(int(mask, 16) >> (number - 1) & 1)

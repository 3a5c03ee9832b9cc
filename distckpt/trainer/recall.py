"""Recall: what becomes of this machine when ranks of other machines only were asked to stop.

All ranks save and stop together, whichever was asked. But on a machine of which nobody has asked anything, torchrun
would take ranks that end well for a training that is done, and end the job on all machines that are left.
So these ranks end as ones that want to be started again: then the machines that are left go on.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # it needs torch, which a start has not imported yet
    from distckpt.ranks import Ranks

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
LINGER_S = 5.0  # how much later than others a machine may be asked; where all are, none is to be started again

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Hearing:
    """Notes whether this process was asked to stop, while its context lasts; who handles the signals may be above it.

    Attributes:
        was_asked: Whether a signal has come.
    """

    def __init__(self) -> None:
        self.was_asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
            with suppress(ValueError):  # outside the main thread nothing is heard
                for number in _SIGNALS:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def only_elsewhere(self, ranks: Ranks) -> bool:
        """Say whether ranks were asked to stop, but none of this machine.

        Ranks: all (collective); blocks until all have come.
        """
        machine = os.environ.get("GROUP_RANK", "0")
        asked = ranks.agree(
            "telling who was asked to stop",
            lambda: machine if self.was_asked else None,
            lambda facts: sorted({fact for fact in facts if fact is not None}),
        )
        return bool(asked) and machine not in asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.was_asked = True
        before = self._before.get(signal.Signals(number))
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

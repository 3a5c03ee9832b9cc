"""Memory that uploads may hold at once, one budget for the whole process."""

from __future__ import annotations

import os
import threading

FEWEST = 4  # so many parts are always let in: where parts are large, the budget must not end all concurrency


class Budget:
    """Bytes that may be on their way at once; threads wait until there is room.

    Attributes:
        limit_bytes: How many bytes; may be set at any time.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.reset()

    def reset(self) -> None:
        """Forget who has taken what: in a forked child, whose threads are not there."""
        self._room = threading.Condition()
        self._num_bytes = 0
        self._num_holders = 0

    def take(self, num_bytes: int) -> None:
        """Wait until `num_bytes` fit, and hold them until `give`."""
        with self._room:
            self._room.wait_for(lambda: self._has_room(num_bytes))
            self._num_bytes += num_bytes
            self._num_holders += 1

    def give(self, num_bytes: int) -> None:
        """Give back what was taken."""
        with self._room:
            self._num_bytes -= num_bytes
            self._num_holders -= 1
            self._room.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        return self._num_holders < FEWEST or self._num_bytes + num_bytes <= self.limit_bytes


UPLOAD_BUDGET = Budget(256 << 20)  # the one that all storages of this process share
os.register_at_fork(after_in_child=UPLOAD_BUDGET.reset)

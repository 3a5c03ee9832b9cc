"""Ranks as threads of one process: the real `Ranks`, over a store in memory, in an order that never changes.

Only one thread runs at a time; it gives way when it waits for another rank. So a run is the same every time, and what
a rank knows of the others is known, too: it is what they had done when they told it something.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from recording import Log

from distckpt.ranks import Ranks

Result = TypeVar("Result")
TIMEOUT_S = 30.0


class Crew:
    """So many ranks.

    Args:
        size: How many.
        log: Who runs is noted here, and what each knows.
        first: The rank that is ahead of the others: it begins, and goes on first after each meeting.
    """

    def __init__(self, size: int, log: Log, *, first: int = 0) -> None:
        self.size = size
        self.log = log
        self.values: dict[str, tuple[bytes, dict[int, int]]] = {}
        self.first = first
        self._turn = threading.Condition()
        self._running: list[int] = []

    def run(self, work: Callable[[int], Result]) -> list[Result | BaseException]:
        """Do `work` on every rank; return what each returned or raised."""
        if self.size == 1:
            self.log.rank = 0
            try:
                return [work(0)]
            except BaseException as error:  # noqa: BLE001  the caller looks at it
                return [error]
        results: list[Any] = [None] * self.size
        self._running = [*range(self.first, self.size), *range(self.first)]
        self.log.rank = self._running[0]

        def live(rank: int) -> None:
            self._await_turn(rank)
            try:
                results[rank] = work(rank)
            except BaseException as error:  # noqa: BLE001  the caller looks at it
                results[rank] = error
            finally:
                with self._turn:
                    self._pass_on(rank)
                    self._running.remove(rank)
                    self._turn.notify_all()

        threads = [threading.Thread(target=live, args=(rank,), name=f"rank-{rank}") for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def give_way(self, rank: int) -> None:
        """Let the next rank run; return when it is this one's turn again."""
        with self._turn:
            self._pass_on(rank)
            self._turn.notify_all()
        self._await_turn(rank)

    def _pass_on(self, rank: int) -> None:
        self.log.rank = self._running[(self._running.index(rank) + 1) % len(self._running)]

    def _await_turn(self, rank: int) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self.log.rank == rank)


class CrewStore:
    """What torch's Store is to `Ranks`, for one rank of a crew."""

    def __init__(self, crew: Crew, rank: int, prefix: str) -> None:
        self._crew = crew
        self._rank = rank
        self._prefix = prefix

    def set(self, key: str, value: str) -> None:
        self._crew.values[self._prefix + key] = value.encode(), dict(self._crew.log.clock())
        if self._rank == 0 and self._crew.first != 0:
            self._crew.give_way(self._rank)

    def get(self, key: str) -> bytes:
        self.wait([key], timedelta())
        value, known = self._crew.values[self._prefix + key]
        self._crew.log.learn(known)
        return value

    def has_extended_api(self) -> bool:
        return False

    def check(self, keys: list[str]) -> bool:
        if not self._has(keys):
            self._crew.give_way(self._rank)
        return self._has(keys)

    def set_timeout(self, timeout: timedelta) -> None:
        """Wait for ever: a rank that does not come shows as a test that does not end."""

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        while not self.check(keys):
            pass

    def delete_key(self, key: str) -> bool:
        return self._crew.values.pop(self._prefix + key, None) is not None

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if self._prefix + key not in self._crew.values:
            self.set(key, desired)
        return self.get(key)

    def _has(self, keys: list[str]) -> bool:
        return all(self._prefix + key in self._crew.values for key in keys)


class CrewRanks(Ranks):
    """The real `Ranks`, but for where its ranks meet."""

    def __init__(self, crew: Crew, rank: int, channel: str) -> None:
        super().__init__(timeout_s=TIMEOUT_S)
        self.rank = rank
        self.world_size = crew.size
        self._store = CrewStore(crew, rank, f"{channel}/") if crew.size > 1 else None

"""What several ranks asked of a storage, in order, with who knew of what: the material that crashes are made of."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Beside = Literal["writing", "pruning"]
MOST_RANKS = 4


class Ack(NamedTuple):
    """A save that was acknowledged: its step, and which content of that step it was."""

    step: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One change, or one promise.

    Attributes:
        rank: Who asked for it: a rank's line of work.
        index: Its place among this line's operations.
        known: How many operations of each line had happened before it, for certain.
        kind: "mkdir", "create", "link", "unlink", "rmdir", "rename", "allocate", "write", "fsync" on a disk;
            "put", "create" (only if there is none), "delete" in a bucket; "ack" of a save.
        place: On a disk the inode that it changes; -1 elsewhere.
        name: The entry of a folder, or the object, that it changes.
        inode: The inode that an entry leads to.
        offset: Where a write begins; the size of an allocation.
        data: What is written; of a rename, the new name.
        ack: What is acknowledged.
    """

    rank: int
    index: int
    known: tuple[int, ...]
    kind: str
    place: int = -1
    name: str = ""
    inode: int = -1
    offset: int = 0
    data: bytes = b""
    ack: Ack | None = None

    def __str__(self) -> str:
        what = f"{self.ack.step}" if self.ack else self.name or f"inode {self.place}"
        more = f" {len(self.data)} bytes at {self.offset}" if self.kind == "write" else ""
        return f"rank {self.rank}: {self.kind} {what}{more}"


class Log:
    """The operations of ranks of which only one runs at a time; it is named by `rank`.

    A rank has lines of work: its training's thread, and those beside it. What is done on one line is over before the
    rank goes on, yet counts as if nobody knew how far it is until the rank waits for it.

    Attributes:
        rank: The rank that runs.
        ops: What has happened, in order.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.ops: list[Op] = []
        self._clocks: dict[int, dict[int, int]] = {}
        self._lines: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def line(self) -> int:
        """The line of work that runs."""
        return self._lines.get(self.rank, self.rank)

    @contextmanager
    def beside(self, thread: Beside) -> Iterator[None]:
        """Let the running rank do something on another of its lines."""
        rank, before, known = self.rank, self.line, dict(self.clock())
        self._lines[rank] = _line(rank, thread)
        self.learn(known)
        try:
            yield
        finally:
            self._lines[rank] = before

    def join(self, thread: Beside) -> None:
        """Let the running line know all that the running rank has done on another one."""
        self.learn(dict(self._clocks.get(_line(self.rank, thread), {})))

    def clock(self) -> dict[int, int]:
        """Return how many operations of each line the running one knows of; the caller may change it."""
        return self._clocks.setdefault(self.line, {})

    def learn(self, known: dict[int, int]) -> None:
        """Let the running line know what another one knew."""
        clock = self.clock()
        for line, count in known.items():
            clock[line] = max(clock.get(line, 0), count)

    def record(self, kind: str, **facts: object) -> Op:
        """Add an operation of the running line."""
        with self._lock:
            clock, line = self.clock(), self.line
            index = clock.get(line, 0)
            width = 1 + max([line, *clock])
            known = tuple(clock.get(other, 0) for other in range(width))
            op = Op(rank=line, index=index, known=known, kind=kind, **facts)  # type: ignore[arg-type]
            clock[line] = index + 1
            self.ops.append(op)
            return op

    def acknowledge(self, step: int, generation: int) -> None:
        """Say that a save has returned to its caller."""
        self.record("ack", ack=Ack(step, generation))


def is_before(earlier: Op, later: Op) -> bool:
    """Say whether `earlier` happened before `later` in every run in which both happen."""
    return earlier.rank < len(later.known) and later.known[earlier.rank] > earlier.index


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What has happened when all ranks die: of each line of work its first so many operations.

    Attributes:
        counts: How many of each line.
        done: These operations, in order.
        pending: The next one of each line that may be in flight, for all that it waited for has happened.
    """

    counts: tuple[int, ...]
    done: tuple[Op, ...] = field(repr=False)
    pending: tuple[Op, ...] = field(repr=False)

    @property
    def acked(self) -> Ack | None:
        """The last save that was acknowledged."""
        return max((op.ack for op in self.done if op.ack is not None), default=None)


def cuts(ops: Sequence[Op]) -> Iterator[Cut]:
    """Yield every consistent cut of a log: none in which something happened before what it waited for."""
    lines: dict[int, list[Op]] = {}
    for op in ops:
        lines.setdefault(op.rank, []).append(op)
    width = 1 + max(lines, default=0)
    waiting = [(0,) * width]
    seen = set(waiting)
    while waiting:
        following = []
        for counts in waiting:
            ready = [
                line[counts[rank]]
                for rank, line in lines.items()
                if counts[rank] < len(line) and _is_ready(line[counts[rank]], counts)
            ]
            yield Cut(
                counts=counts,
                done=tuple(op for op in ops if op.index < counts[op.rank]),
                pending=tuple(ready),
            )
            for op in ready:
                further = (*counts[: op.rank], counts[op.rank] + 1, *counts[op.rank + 1 :])
                if further not in seen:
                    seen.add(further)
                    following.append(further)
        waiting = following


def _is_ready(op: Op, counts: tuple[int, ...]) -> bool:
    """Say whether all that an operation waited for has happened."""
    return all(needed <= counts[line] for line, needed in enumerate(op.known) if line != op.rank)


def _line(rank: int, thread: Beside) -> int:
    return rank + {"writing": 1, "pruning": 2}[thread] * MOST_RANKS

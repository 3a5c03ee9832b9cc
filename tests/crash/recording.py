"""What several ranks asked of a storage, in order, with who knew of what: the material that crashes are made of."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Ack(NamedTuple):
    """A save that was acknowledged: its step, and which content of that step it was."""

    step: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One change, or one promise.

    Attributes:
        rank: Who asked for it.
        index: Its place among this rank's operations.
        known: How many operations of each rank had happened before it, for certain.
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

    Attributes:
        rank: The rank that runs.
        ops: What has happened, in order.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.ops: list[Op] = []
        self._clocks: dict[int, dict[int, int]] = {}
        self._lock = threading.Lock()

    def clock(self) -> dict[int, int]:
        """Return how many operations of each rank the running one knows of; the caller may change it."""
        return self._clocks.setdefault(self.rank, {})

    def learn(self, known: dict[int, int]) -> None:
        """Let the running rank know what another one knew."""
        clock = self.clock()
        for rank, count in known.items():
            clock[rank] = max(clock.get(rank, 0), count)

    def record(self, kind: str, **facts: object) -> Op:
        """Add an operation of the running rank."""
        with self._lock:
            clock = self.clock()
            index = clock.get(self.rank, 0)
            width = 1 + max([self.rank, *clock])
            known = tuple(clock.get(rank, 0) for rank in range(width))
            op = Op(rank=self.rank, index=index, known=known, kind=kind, **facts)  # type: ignore[arg-type]
            clock[self.rank] = index + 1
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
    """What has happened when all ranks die: of each rank its first so many operations.

    Attributes:
        counts: How many of each rank.
        done: These operations, in order.
        pending: The next one of each rank that has one: it may be in flight.
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
    by_rank: dict[int, list[Op]] = {}
    for op in ops:
        by_rank.setdefault(op.rank, []).append(op)
    lines = [by_rank.get(rank, []) for rank in range(1 + max(by_rank, default=0))]
    for counts in itertools.product(*(range(len(line) + 1) for line in lines)):
        last = [line[count - 1] for line, count in zip(lines, counts, strict=True) if count]
        if any(needed > counts[rank] for op in last for rank, needed in enumerate(op.known) if rank != op.rank):
            continue
        yield Cut(
            counts=counts,
            done=tuple(op for op in ops if op.index < counts[op.rank]),
            pending=tuple(line[count] for line, count in zip(lines, counts, strict=True) if count < len(line)),
        )

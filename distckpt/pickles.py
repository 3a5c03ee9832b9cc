"""Pickles, looked at before they are opened: what they name, and that they stay as small as they are.

An allow-list of classes keeps a pickle from running code; it does not keep it from taking all memory, or all time, with
a few bytes: a number that reserves room, a tuple that holds itself twice thirty times over.
Invariant: nothing is made of a pickle here; its operations are counted.
"""

from __future__ import annotations

import io
import pickletools
from dataclasses import dataclass, field

# A pickle of weights costs as much as it has operations; what is shared in it counts again at each place.
MAX_COST_PER_BYTE = 64
LEAST_COST = 1 << 16


class OversizedPickleError(ValueError):
    """A pickle would become far more than its own size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a pickle was found to be.

    Attributes:
        names: The classes and functions that it asks for, as "module.name".
        end: The place behind its last byte.
    """

    names: frozenset[str]
    end: int


def inspect(data: bytes, begin: int = 0) -> Inspection:
    """Return what the pickle at `begin` asks for; makes nothing of it.

    Raises:
        OversizedPickleError: It would grow far beyond its size.
        ValueError: It is cut off, or malformed.

    Ranks: any.
    """
    stream = io.BytesIO(data)
    stream.seek(begin)
    machine = _Machine(limit=LEAST_COST + MAX_COST_PER_BYTE * (len(data) - begin), size=len(data) - begin)
    try:
        for operation, argument, _ in pickletools.genops(stream):
            machine.do(operation, argument)
    # A text with odd escapes is a warning, which the process may have made an error; no save writes such a text.
    except (IndexError, KeyError, OverflowError, UnicodeError, MemoryError, Warning) as error:
        raise ValueError(f"a malformed pickle: {error}") from error
    return Inspection(names=frozenset(machine.names), end=stream.tell())


# A place on the stack: what the value there costs, all that is in it counted; a list, as containers grow.
_Cost = list[int]


@dataclass(slots=True)
class _Machine:
    """Does a pickle's operations on costs instead of values."""

    limit: int
    size: int
    stack: list[_Cost | None] = field(default_factory=list)  # None is a mark
    memo: dict[int, _Cost] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=lambda: ["", ""])  # the last two

    def do(self, operation: pickletools.OpcodeInfo, argument: object) -> None:
        """Do one operation."""
        name = operation.name
        if isinstance(argument, str) and name != "GLOBAL":
            self.texts = [self.texts[1], argument]
        if name in ("GLOBAL", "INST"):
            self.names.add(str(argument).replace(" ", "."))
        elif name == "STACK_GLOBAL":
            self.names.add(".".join(self.texts))  # the unpickler's own allow-list has the last word
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memoize(len(self.memo) if name == "MEMOIZE" else int(str(argument)))
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(str(argument))])
        elif name == "DUP":
            self.stack.append(self._top())
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
            self._grow(self._popped({"APPEND": 1, "SETITEM": 2, "BUILD": 1}.get(name)))
        else:
            self._replace(operation)

    def _replace(self, operation: pickletools.OpcodeInfo) -> None:
        """Take what an operation takes, and put what it makes of it."""
        before = operation.stack_before
        if operation.name == "POP" and self.stack and self.stack[-1] is None:
            self.stack.pop()
            return
        slice_place = before.index(pickletools.markobject) if pickletools.markobject in before else None
        taken = self._popped(len(before) if slice_place is None else None)
        if slice_place:  # none of the operations that end here takes something below the mark
            raise ValueError(f"a malformed pickle: {operation.name}")
        for made in operation.stack_after:
            self.stack.append(None if made is pickletools.markobject else self._cost(taken))

    def _popped(self, count: int | None) -> list[_Cost]:
        """Take `count` places off the stack; None is all down to the mark, and the mark."""
        taken: list[_Cost] = []
        while count is None or len(taken) < count:
            top = self.stack.pop()
            if top is None:
                if count is None:
                    break
                raise ValueError("a malformed pickle: a mark in the place of a value")
            taken.append(top)
        return taken

    def _cost(self, parts: list[_Cost]) -> _Cost:
        cost = 1 + sum(part[0] for part in parts)
        if cost > self.limit:
            raise OversizedPickleError(f"what is shared in it would make far more of it than its {self.size:,} bytes")
        return [cost]

    def _grow(self, parts: list[_Cost]) -> None:
        top = self._top()
        top[0] = self._cost([[top[0]], *parts])[0]

    def _top(self) -> _Cost:
        if self.stack[-1] is None:
            raise ValueError("a malformed pickle: a mark in the place of a value")
        return self.stack[-1]

    def _memoize(self, number: int) -> None:
        if not 0 <= number <= self.size:  # one unpickler makes room for all numbers below
            raise OversizedPickleError(f"it asks for room for {number:,} values in {self.size:,} bytes")
        self.memo[number] = self._top()

"""What every exception of distckpt is: a message made of facts, which are plain enough to travel as JSON.

So an error that one rank has met can be raised, with the same type and message, on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SHOWN_PROBLEMS = 20  # a report of a thousand missing keys helps nobody


class DistckptError(Exception):
    """Anything that distckpt raises on purpose.

    Attributes:
        facts: The keyword arguments that the error was made from; plain JSON values.
        fix: What the reader can do about it, ready to paste; None if nothing is known to help.
    """

    facts: dict[str, Any]
    fix: str | None = None

    def _tell(self, message: str, *, fix: str | None, **facts: Any) -> None:
        super().__init__(message if fix is None else f"{message}\nFix: {fix}")
        self.facts = {**facts, "fix": fix}
        for name, value in self.facts.items():  # after the builtin's own constructor, which resets some of them
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return from_wire, (to_wire(self),)


def to_wire(error: DistckptError) -> dict[str, Any]:
    """Return an error as plain JSON values, for `from_wire` on another rank."""
    return {"type": type(error).__name__, "facts": error.facts}


def from_wire(wire: dict[str, Any]) -> DistckptError:
    """Return the error that `to_wire` described."""
    kinds = {kind.__name__: kind for kind in _kinds(DistckptError)}
    return kinds[wire["type"]](**wire["facts"])


def _kinds(root: type[DistckptError]) -> Iterator[type[DistckptError]]:
    """Yield the classes of errors that distckpt itself defines."""
    for kind in root.__subclasses__():
        if kind.__module__.partition(".")[0] == __name__.partition(".")[0]:
            yield kind
        yield from _kinds(kind)


def listed(names: list[str]) -> str:
    """Return some of many names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def numbered(noun: str, numbers: list[int]) -> str:
    """Return numbers as ranges, with what they number: ranks 0-3, 7."""
    ends: list[list[int]] = []
    for number in sorted(numbers):
        if ends and number == ends[-1][-1] + 1:
            ends[-1] = [ends[-1][0], number]
        else:
            ends.append([number])
    noun = noun if len(numbers) == 1 else f"{noun}s"
    return f"{noun} " + ", ".join("-".join(map(str, pair)) for pair in ends)

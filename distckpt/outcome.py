"""Outcomes: how a job that owned a run's directory ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from distckpt.values import Json

Ending = Literal["complete", "preempted", "failed"]
MAX_REASON_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended, as it said itself; one that was killed says nothing.

    Attributes:
        ending: "complete": it did all it was to do; "preempted": it was asked to stop, saved and stopped, and is to be
            started again; "failed": it ended with an error.
        step: The newest step that it had committed; None if there is none.
        time: When, in seconds since 1970, by its own clock.
        host: The host of its rank 0.
        reason: Why it ended, in a few words; None if there is nothing to say.
    """

    ending: Ending
    step: int | None
    time: float
    host: str
    reason: str | None = None

    def to_json(self) -> dict[str, Json]:
        """Return this as plain JSON values, for `from_json`."""
        reason = None if self.reason is None else self.reason[:MAX_REASON_CHARS]
        return {"ending": self.ending, "step": self.step, "time": self.time, "host": self.host, "reason": reason}

    @classmethod
    def from_json(cls, body: Any) -> Outcome:
        """Return what `to_json` described.

        Raises:
            ValueError: It is something else.
        """
        if not isinstance(body, dict) or body.get("ending") not in get_args(Ending):
            raise ValueError("is no outcome")
        step, reason = body.get("step"), body.get("reason")
        if step is not None and (type(step) is not int or step < 0):
            raise ValueError(f"has the step {step!r:.40}")
        if reason is not None and not isinstance(reason, str):
            raise ValueError("has a reason that is no text")
        return cls(
            ending=body["ending"],
            step=step,
            time=checked_moment(body, "time"),
            host=checked_text(body, "host"),
            reason=reason,
        )


def reason_of(error: BaseException | None) -> str | None:
    """Return an error as the reason of an end: what happened, without what to do about it; None of a clean exit."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return None
    return f"{type(error).__name__}: {error}".partition("\nFix:")[0]


def checked_moment(body: dict[str, Any], key: str) -> float:
    """Return the number under `key`.

    Raises:
        ValueError: It is no number from 0 on, or beyond all reason.
    """
    value = body.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e18:
        raise ValueError(f"has {key} {value!r:.40}")
    return float(value)


def checked_text(body: dict[str, Any], key: str) -> str:
    """Return the text under `key`.

    Raises:
        ValueError: It is none, or unreasonably long.
    """
    value = body.get(key)
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError(f"has {key} {value!r:.40}")
    return value

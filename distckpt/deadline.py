"""The deadline: how long a job that is asked to stop has left, and what it still does in that time. Pure decisions.

Invariant: a step is given up only when it is known that its save cannot be committed in time. What is not known counts
as enough time and as a quick save: one that is killed half-way harms nothing, one that is not tried loses a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

GRACE_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
END_VARIABLE = "SLURM_JOB_END_TIME"
TORCHRUN_GRACE_S = 30.0
TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"  # those that it forwards, unless it is told others
UNKNOWN_DURABLE_S = 20.0  # for a save of which nothing is known, where it decides when to stop
MARGIN_S = 10.0  # for leaving: joining threads, closing process groups

Way = Literal["save", "finish", "leave"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """What is known about the end of a job.

    Attributes:
        grace_s: Seconds from a signal, whichever it is, until the launcher kills; None if nobody has said so.
        launcher_grace_s: The same for the signals that torchrun forwards; None without torchrun.
        launcher_signals: Their names.
        ends_at: When the allocation ends, in seconds since 1970; None if it is not known.
    """

    grace_s: float | None = None
    launcher_grace_s: float | None = None
    launcher_signals: frozenset[str] = frozenset()
    ends_at: float | None = None

    @classmethod
    def of(
        cls,
        environment: Mapping[str, str],
        *,
        now: float,
        grace_s: float | None = None,
        ends_at: float | None = None,
        is_grace_settable: bool = True,
    ) -> Deadline:
        """Return what a user and the environment say; the user wins.

        Args:
            environment: The environment variables; those of torchrun and of Slurm are looked at.
            now: The time, in seconds since 1970: an end that the environment places before it is none.
            grace_s: What the user says.
            ends_at: What the user says.
            is_grace_settable: Whether this torchrun heeds `TORCH_ELASTIC_SHUTDOWN_TIMEOUT`.
        """
        launcher_grace_s = None
        if "TORCHELASTIC_RUN_ID" in environment:
            said = _number(environment.get(GRACE_VARIABLE)) if is_grace_settable else None
            launcher_grace_s = TORCHRUN_GRACE_S if said is None else said
        if ends_at is None:
            end = _number(environment.get(END_VARIABLE))
            ends_at = end if end is not None and end > now else None
        forwarded = environment.get("TORCHELASTIC_SIGNALS_TO_HANDLE", TORCHRUN_SIGNALS).split(",")
        return cls(
            grace_s=grace_s,
            launcher_grace_s=launcher_grace_s,
            launcher_signals=frozenset(name.strip() for name in forwarded),
            ends_at=ends_at,
        )

    def left_s(self, *, now: float, signalled: str | None, age_s: float = 0.0) -> float | None:
        """Return the seconds that are left; None if that is not known.

        Args:
            now: The time, in seconds since 1970.
            signalled: The name of the signal that asked for the stop; None if none did.
            age_s: Seconds since it came.
        """
        grace_s = self.grace_s
        if grace_s is None and signalled in self.launcher_signals:
            grace_s = self.launcher_grace_s
        found = [] if signalled is None or grace_s is None else [grace_s - age_s]
        # An allocation that lives on after its end was extended, or is in a grace of which nothing is known.
        if self.ends_at is not None and now < self.ends_at:
            found.append(self.ends_at - now)
        return min(found, default=None)

    def is_near(self, *, now: float, margin_s: float) -> bool:
        """Say whether it is time to stop, as the allocation ends within `margin_s`."""
        return self.ends_at is not None and now >= self.ends_at - margin_s


def margin_s(*, durable_s: float | None, step_s: float) -> float:
    """Return how long before the end of an allocation a job stops: seconds.

    A save may have begun just now, and the last one follows it: the time of two, and half as much again. All ranks stop
    after the next step, which one of them may only have begun.

    Args:
        durable_s: Seconds from a save's beginning until it is committed, of a slow one; None if nothing is known.
        step_s: Seconds of a slow step.
    """
    return 3 * (UNKNOWN_DURABLE_S if durable_s is None else durable_s) + 2 * step_s + MARGIN_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a choice rests on, of all ranks together.

    Attributes:
        step: The step that all have completed; 0 if none.
        saved_step: The newest step that is committed, or was restored; None if there is none.
        in_flight: The step of the save in flight; None if there is none.
        in_flight_s: For how long it has been.
        left_s: Seconds until they are killed; None if that is not known.
        durable_s: Seconds that a save takes here until it is committed; None if that is not known.
    """

    step: int
    saved_step: int | None = None
    in_flight: int | None = None
    in_flight_s: float = 0.0
    left_s: float | None = None
    durable_s: float | None = None

    def __str__(self) -> str:
        left = "no deadline is known" if self.left_s is None else f"{self.left_s:.1f} s left"
        takes = (
            "what a save takes is not known yet" if self.durable_s is None else f"a save takes {self.durable_s:.1f} s"
        )
        flying = "" if self.in_flight is None else f", that of step {self.in_flight} began {self.in_flight_s:.1f} s ago"
        return f"{left}, {takes}{flying}"


def choose(situation: Situation) -> Way:
    """Return what to do: "save" the step, only "finish" the save in flight, or "leave" without another one.

    A save in flight has to end before another begins; it is finished in any case, for nothing better can be done in
    that time.
    """
    facts = situation
    if facts.in_flight == facts.step and facts.step:
        return "finish"
    if facts.step in (0, facts.saved_step):
        return "leave"
    if facts.left_s is None or facts.durable_s is None:
        return "save"
    rest_s = 0.0 if facts.in_flight is None else max(0.0, facts.durable_s - facts.in_flight_s)
    if rest_s + facts.durable_s <= facts.left_s:
        return "save"
    return "leave" if facts.in_flight is None else "finish"


def intention(situation: Situation, way: Way) -> str:
    """Return in words what is about to be done."""
    step, newest = situation.step, situation.saved_step
    if way == "save":
        return f"saving step {step}"
    if way == "finish":
        rest = _after(situation, situation.in_flight)
        return f"finishing the save of step {situation.in_flight}" + (
            f"; {rest} only if time is left then" if rest else ""
        )
    if step == 0:
        return "no step is done, so there is nothing to save"
    if newest == step:
        return f"step {step} is saved"
    return f"no time to save step {step}; {_after(situation, newest)} will have to be done again"


def _after(situation: Situation, kept: int | None) -> str:
    """Name the steps that are not in the checkpoint of step `kept`."""
    first, last = (kept or 0) + 1, situation.step
    if first > last:
        return ""
    return f"step {last}" if first == last else f"steps {first} to {last}"


def _number(text: str | None) -> float | None:
    """Return a number of seconds that an environment variable holds; None for anything else."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None

"""Who of the contenders can be made here, and why each of the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.states import State
from benchmarks.team import Team


def opened(
    makers: Mapping[str, Callable[[State, Team], Any]], state: State, team: Team, only: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Make contenders; return them, and why each of the others is not there."""
    made: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        if only is not None and name not in only:
            absent[name] = "not asked for"
            continue
        try:
            made[name] = make(state, team)
        except Exception as error:  # noqa: BLE001  whatever keeps a peer from running is reported
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return made, absent

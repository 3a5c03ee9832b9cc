"""The saves of a run and its checkpoints: what was written, what is left of it, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distckpt.errors import ConfigError
from distckpt.inventory import Found
from distckpt.report.records import Event
from distckpt.retention import Retention, decide

Fate = Literal["kept", "deleted", "damaged", "partial", "newer format"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """One save that committed.

    Attributes:
        step: The step that it saved.
        time: When it committed, in seconds since 1970.
        num_bytes: How much it wrote.
        stall_s: How long training waited for it; by the manifest alone, how long its staging took. None: unknown.
        write_s: How long the writing took.
    """

    step: int
    time: float
    num_bytes: int | None
    stall_s: float | None
    write_s: float | None

    @property
    def rate(self) -> float | None:
        """Bytes per second while it was written; None if that is not known."""
        return self.num_bytes / self.write_s if self.num_bytes and self.write_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One checkpoint that is, or was, there.

    Attributes:
        step: Its step; None if nobody knows.
        fate: What became of it.
        created: When it was committed, in seconds since 1970; None if nobody knows.
        gone: When it was deleted or put aside; None if it is there, or nobody knows.
        num_bytes: Its size.
        world_size: The number of ranks that saved it.
        layout: How it was saved.
        metrics: What was measured at its step.
        pinned: Whether it is pinned.
        reasons: Why it is kept; or what is wrong with it.
    """

    step: int | None
    fate: Fate
    created: float | None
    gone: float | None = None
    num_bytes: int | None = None
    world_size: int | None = None
    layout: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    pinned: bool = False
    reasons: tuple[str, ...] = ()


def saves_of(events: Sequence[Event], found: Sequence[Found]) -> list[Save]:
    """Return the saves that the event log tells of, and those that only their checkpoint does; oldest first."""
    saves = [
        Save(
            step=event.step,
            time=event.time,
            num_bytes=event.whole("num_bytes"),
            stall_s=event.number("stall_s"),
            write_s=event.number("write_s"),
        )
        for event in events
        if event.kind == "saved" and event.step is not None
    ]
    told = {save.step for save in saves}
    for one in found:
        if (checkpoint := one.checkpoint) is not None and checkpoint.step not in told:
            save = Save(
                step=checkpoint.step,
                time=checkpoint.created,
                num_bytes=checkpoint.num_bytes,
                stall_s=checkpoint.timings.get("stage_s"),
                write_s=checkpoint.timings.get("write_s"),
            )
            saves.append(save)
    return sorted(saves, key=lambda save: save.time)


def retention_of(config: Mapping[str, Any] | None) -> Retention | None:
    """Return the retention that the trainer's configuration asks for; None if there is none, or it makes no sense."""
    section = (config or {}).get("checkpoint")
    keep = section.get("keep") if isinstance(section, Mapping) else None
    try:
        return Retention(**keep) if isinstance(keep, Mapping) else None if keep is None else Retention.of(keep)
    except (ConfigError, TypeError):
        return None


def rows_of(
    events: Sequence[Event],
    found: Sequence[Found],
    saves: Sequence[Save],
    *,
    retention: Retention | None,
    resumed_from: int | None,
    now: float,
) -> list[Row]:
    """Return the checkpoints that are there, and those that were; oldest first.

    Args:
        events: The events, oldest first.
        found: What lies on the storage.
        saves: The saves.
        retention: What is kept; None if nobody said.
        resumed_from: The step that the latest job went on from.
        now: The present, in seconds since 1970.
    """
    reasons = _reasons(found, retention, resumed_from=resumed_from, now=now)
    ends = _ends(events)
    there = [_there(one, saves, ends, reasons) for one in found]
    present = {row.step for row in there if row.fate != "partial"}
    later: dict[int, float] = {}
    gone = []
    for save in reversed(saves):
        if save.step in later or save.step not in present:  # of a step that was saved again, the last one may be there
            gone.append(_gone(save, ends, until=later.get(save.step, math.inf)))
        later[save.step] = save.time
    return sorted([*there, *gone], key=lambda row: (row.created or 0.0, row.step or 0))


def _reasons(
    found: Sequence[Found], retention: Retention | None, *, resumed_from: int | None, now: float
) -> dict[int, tuple[str, ...]]:
    """Return why each committed checkpoint is kept, as far as the retention is known."""
    if retention is None:
        return {}
    checkpoints = [one.checkpoint for one in found if one.checkpoint is not None]
    pinned = [checkpoint.step for checkpoint in checkpoints if checkpoint.pinned]
    decisions = decide(checkpoints, retention, now=now, resumed_from=resumed_from, pinned=pinned)
    return {decision.step: decision.reasons for decision in decisions}


def _ends(events: Sequence[Event]) -> dict[int, list[Event]]:
    """Return by step the events that ended a checkpoint: it was put aside, or pruned."""
    ends: dict[int, list[Event]] = {}
    for event in events:
        pruned = event.facts.get("steps") if event.kind == "pruned" else None
        steps = pruned if isinstance(pruned, list) else [event.step] if event.kind == "quarantined" else []
        for step in steps:
            if isinstance(step, int):
                ends.setdefault(step, []).append(event)
    return ends


def _there(
    one: Found, saves: Sequence[Save], ends: Mapping[int, Sequence[Event]], reasons: Mapping[int, tuple[str, ...]]
) -> Row:
    checkpoint = one.checkpoint
    if checkpoint is not None:
        return Row(
            step=checkpoint.step,
            fate="kept",
            created=checkpoint.created,
            num_bytes=checkpoint.num_bytes,
            world_size=checkpoint.world_size,
            layout=checkpoint.layout,
            metrics=checkpoint.metrics,
            pinned=checkpoint.pinned,
            reasons=reasons.get(checkpoint.step, ("pinned",) if checkpoint.pinned else ()),
        )
    fate: Fate = "kept" if one.state == "committed" else one.state
    created, gone = one.modified, None
    if fate == "damaged":
        created = next((save.time for save in reversed(saves) if save.step == one.step), created)
        aside = [event.time for event in ends.get(one.step or 0, ()) if event.kind == "quarantined"]
        gone = aside[-1] if aside else None
    return Row(
        step=one.step,
        fate=fate,
        created=created,
        gone=gone,
        num_bytes=one.num_bytes,
        pinned=one.pinned,
        reasons=() if one.problem is None else (one.problem,),
    )


def _gone(save: Save, ends: Mapping[int, Sequence[Event]], *, until: float) -> Row:
    """Return the checkpoint of a save that is no longer there, or whose place another one took."""
    own = [event for event in ends.get(save.step, ()) if save.time <= event.time <= until]
    aside = next((event for event in own if event.kind == "quarantined"), None)
    reason = aside.text("reason") if aside else None
    first = aside or (own[0] if own else None)
    return Row(
        step=save.step,
        fate="damaged" if aside else "deleted",
        created=save.time,
        gone=first.time if first else None,
        num_bytes=save.num_bytes,
        reasons=(reason,) if reason else (),
    )

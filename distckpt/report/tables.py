"""Tables: the jobs, the checkpoints, the configuration."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distckpt.report.facts import Facts
from distckpt.report.history import Row
from distckpt.report.jobs import Job
from distckpt.report.markup import Markup, join, tag
from distckpt.wording import count_text, duration_text, number_text, size_text

MOST_ROWS = 300
_MOST_SETTINGS = 300
_MOST_VALUE_CHARS = 300
_PROSE = frozenset({"why", "ended", "where"})  # columns whose text may be long
_FATE_NAMES = {"newer format": "of a newer distckpt"}


def moment_text(moment: float | None) -> str:
    """Return a moment, in seconds since 1970, in this machine's time: "22 Nov 2026 12:04:31"; "" for None."""
    if moment is None:
        return ""
    try:
        return time.strftime("%-d %b %Y %H:%M:%S", time.localtime(moment))
    except (ValueError, OverflowError, OSError):
        return f"{moment:.0f}"


def status(kind: str, text: str) -> Markup:
    """Return a state as a coloured sign with its name."""
    return tag("span", text, class_=f"status {kind.replace(' ', '-')}")


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> Markup:
    """Return a table that becomes a list of cards on a phone: each cell knows its column's name."""
    sides = [None if head in _PROSE else "num tight" if head in right else "tight" for head in heads]
    head = tag("tr", *(tag("th", name, scope="col", class_=side) for name, side in zip(heads, sides, strict=True)))
    body = []
    for row in rows:
        cells = zip(row, heads, sides, strict=True)
        body.append(tag("tr", *(tag("td", cell, data_name=name, class_=side) for cell, name, side in cells)))
    caption_line = tag("caption", caption, class_="unseen")
    return tag("table", caption_line, tag("thead", head), tag("tbody", *body), class_="list")


def job_table(facts: Facts) -> Markup:
    """Return the table of jobs, the latest first."""
    heads = ["job", "started", "lasted", "steps", "ranks", "saves", "restore", "ended", "where"]
    shown = facts.jobs[::-1][:MOST_ROWS]
    table = _table("Jobs", heads, [_job_cells(job) for job in shown], right=["lasted", "ranks", "saves", "restore"])
    return join([table, _left_out(len(facts.jobs) - len(shown), "job")])


def _job_cells(job: Job) -> list[str]:
    restore = "" if job.restore_s is None else duration_text(job.restore_s)
    if restore and job.restore_bytes:
        restore += f" for {size_text(job.restore_bytes)}" + (" from memory" if job.restore_memory else "")
    first, last = job.first_step, job.last_step
    steps = "" if last is None else f"{last:,}" if first is None else f"{first:,} → {last:,}"
    ending = status(job.ending, job.ending)
    return [
        f"{job.number}",
        moment_text(job.started),
        duration_text(job.ended - job.started),
        steps,
        "" if job.world_size is None else f"{job.world_size:,}",
        f"{job.num_saves:,}",
        restore,
        join([ending, tag("small", job.reason) if job.reason else None], " "),
        "" if job.host is None else job.host + ("" if job.pid is None else f", process {job.pid}"),
    ]


def checkpoint_table(facts: Facts) -> Markup:
    """Return the table of the checkpoints that are there, the newest first, and, folded, of those that were."""
    there = [row for row in facts.rows if row.fate != "deleted"][::-1]
    deleted = [row for row in facts.rows if row.fate == "deleted"][::-1]
    names = sorted({name for row in there for name in row.metrics})[:4]
    heads = ["step", "state", "why", "saved", "size", "ranks", *names]
    cells = [_there_cells(row, names) for row in there[:MOST_ROWS]]
    parts: list[Markup | None] = [
        _table("Checkpoints", heads, cells, right=["step", "size", "ranks", *names]) if cells else None,
        _left_out(len(there) - len(cells), "older checkpoint"),
    ]
    if deleted:
        heads = ["step", "saved", "deleted", "lived", "size"]
        cells = [_deleted_cells(row) for row in deleted[:MOST_ROWS]]
        table = _table("Deleted checkpoints", heads, cells, right=["step", "lived", "size"])
        left_out = _left_out(len(deleted) - len(cells), "older checkpoint")
        parts.append(tag("details", tag("summary", count_text(len(deleted), "deleted checkpoint")), table, left_out))
    return join(parts)


def _deleted_cells(row: Row) -> list[str]:
    lived = duration_text(row.gone - row.created) if row.gone is not None and row.created is not None else ""
    size = "" if row.num_bytes is None else size_text(row.num_bytes)
    return ["?" if row.step is None else f"{row.step:,}", moment_text(row.created), moment_text(row.gone), lived, size]


def _there_cells(row: Row, names: Sequence[str]) -> list[str]:
    why = list(row.reasons)
    if row.pinned and "pinned" not in why:
        why.append("pinned")
    return [
        "?" if row.step is None else f"{row.step:,}",
        status(row.fate, _FATE_NAMES.get(row.fate, row.fate)),
        ", ".join(why),
        moment_text(row.created),
        "" if row.num_bytes is None else size_text(row.num_bytes),
        "" if row.world_size is None else f"{row.world_size:,}",
        *(number_text(row.metrics[name]) if name in row.metrics else "" for name in names),
    ]


def _left_out(number: int, noun: str) -> Markup | None:
    return tag("p", f"{count_text(number, noun)} not listed.", class_="note") if number > 0 else None


def settings(config: Mapping[str, Any]) -> Markup:
    """Return a configuration as a list of dotted names and values."""
    pairs = list(_flattened(config, ""))
    items = [
        join([tag("dt", name), tag("dd", text[:_MOST_VALUE_CHARS] + ("…" if len(text) > _MOST_VALUE_CHARS else ""))])
        for name, text in pairs[:_MOST_SETTINGS]
    ]
    return join([tag("dl", *items, class_="settings"), _left_out(len(pairs) - _MOST_SETTINGS, "setting")])


def _flattened(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value and depth < 20:
        for key in value:
            yield from _flattened(value[key], f"{name}.{key}" if name else str(key), depth + 1)
    else:
        yield name[:_MOST_VALUE_CHARS], "" if value is None else _text(value)


def _text(value: Any) -> str:
    try:
        return str(value)
    except RecursionError:
        return "nested too deep to be shown"

"""The page: everything in one text of HTML, with its style and its script.

Invariant: the page forbids itself to load anything, and to run any script but its own (Content Security Policy).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib import resources

from distckpt.report.classes import accuracy_bars, confusion_figure, sheet
from distckpt.report.facts import Facts
from distckpt.report.markup import Markup, tag
from distckpt.report.progress import progress_charts
from distckpt.report.saving import save_charts, timeline
from distckpt.report.tables import checkpoint_table, job_table, moment_text, settings, status
from distckpt.version import __version__
from distckpt.wording import count_text, duration_text, number_text, size_text

_STATES = {
    "complete": "complete",
    "preempted": "preempted",
    "failed": "failed",
    "running": "running",
    "killed": "ended without a word",
    "unknown": "unknown",
}


def render(facts: Facts) -> str:
    """Return the page: whole HTML, in one text."""
    style, script = _asset("page.css"), _asset("page.js")
    sections = [
        _section("progress", "Progress", [tag("div", *progress_charts(facts), class_="charts")], facts.curves),
        _section("saves", "Saves", [tag("div", *save_charts(facts), class_="charts small")], facts.saves),
        _section("checkpoints", "Checkpoints", _checkpoints(facts), facts.rows),
        _section("jobs", "Jobs", [_source(facts), job_table(facts)], facts.jobs),
        _section("classes", "Classes", _classes(facts), facts.evaluation),
        _section("settings", "Settings", [_settings(facts)], facts.config or facts.versions),
    ]
    shown = [section for section in sections if section is not None]
    title = f"{facts.name}: {_STATES[facts.state]}"
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"distckpt {__version__}"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        tag("div", _header(facts), tag("main", _tiles(facts), *shown), _footer(facts), class_="page"),
        tag("div", class_="tip", role="status", hidden=True),
        tag("script", Markup(script)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return resources.files("distckpt.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _section(name: str, title: str, parts: Iterable[Markup | None], present: object) -> Markup | None:
    """Return a section; None if there is nothing to show in it."""
    if not present:
        return None
    return tag("section", tag("h2", title, id=f"{name}-title"), *parts, id=name, aria_labelledby=f"{name}-title")


def _header(facts: Facts) -> Markup:
    worlds = sorted({job.world_size for job in facts.jobs if job.world_size})
    ranks = "" if not worlds else "1 rank" if worlds == [1] else f"{' and '.join(map(str, worlds))} ranks"
    parts = [
        tag("span", facts.url, class_="url"),
        tag("span", ranks) if ranks else None,
        *(tag("span", f"{name} {text}") for name, text in sorted(facts.versions.items())),
    ]
    return tag(
        "header",
        tag("p", "distckpt report", class_="brand"),
        tag("button", "Theme", class_="theme", type="button", hidden=True, aria_label="Switch between light and dark"),
        tag("h1", facts.name),
        status(facts.state, _STATES[facts.state]),
        tag("p", facts.reason, class_="reason") if facts.reason else None,
        tag("p", *parts, class_="where"),
    )


def _tiles(facts: Facts) -> Markup:
    """Return what matters most, as a few figures."""
    tiles = [_step_tile(facts), _result_tile(facts), *_time_tiles(facts), _checkpoint_tile(facts), _stall_tile(facts)]
    shown = (
        tag("div", tag("dt", name), tag("dd", tag("b", figure), tag("small", more) if more else None))
        for name, figure, more in (tile for tile in tiles if tile is not None)
    )
    return tag("dl", *shown, class_="tiles")


Tile = tuple[str, str, str]


def _step_tile(facts: Facts) -> Tile | None:
    if facts.step is None:
        return None
    total = facts.total_steps
    more = "" if not total else f"of {total:,}, {100 * min(facts.step, total) / total:.0f} %"
    return "Step", f"{facts.step:,}", more


def _result_tile(facts: Facts) -> Tile | None:
    """Return the last evaluation, or else the last loss."""
    if points := facts.curves.get("val/top1"):
        best = max(points, key=lambda point: (point[1], point[0]))
        more = "the best so far" if best == points[-1] else f"best {100 * best[1]:.2f} % at step {best[0]:,}"
        return "Accuracy", f"{100 * points[-1][1]:.2f} %", more
    for name, words in (("val/loss", "Validation loss"), ("train/loss", "Training loss")):
        if points := facts.curves.get(name):
            best = min(points, key=lambda point: (point[1], -point[0]))
            more = "the best so far" if best == points[-1] else f"best {number_text(best[1])} at step {best[0]:,}"
            return words, number_text(points[-1][1]), more
    return None


def _time_tiles(facts: Facts) -> list[Tile]:
    if not facts.jobs:
        return []
    begin, end = min(job.started for job in facts.jobs), max(job.ended for job in facts.jobs)
    busy = sum(job.ended - job.started for job in facts.jobs)
    ends = [job.ending for job in facts.jobs[:-1]]
    counts = ((ending, ends.count(ending)) for ending in dict.fromkeys(ends))
    restarts = ", ".join(f"{number:,} {ending}" for ending, number in counts if ending != "unknown")
    return [
        ("Duration", duration_text(end - begin), f"{duration_text(busy)} in {count_text(len(facts.jobs), 'job')}"),
        ("Restarts", f"{facts.restarts:,}", f"{restarts} before" if restarts else ""),
    ]


def _checkpoint_tile(facts: Facts) -> Tile:
    kept = facts.kept
    fates = [row.fate for row in facts.rows]
    others = ", ".join(f"{fates.count(fate):,} {fate}" for fate in ("deleted", "damaged", "partial") if fate in fates)
    size = size_text(sum(row.num_bytes or 0 for row in kept))
    return "Checkpoints", f"{len(kept):,}", f"{size}; {others}" if others else size


def _stall_tile(facts: Facts) -> Tile | None:
    stalls = [save.stall_s for save in facts.saves if save.stall_s is not None]
    if not stalls:
        return None
    busy = sum(job.ended - job.started for job in facts.jobs)
    share = f"{number_text(100 * sum(stalls) / busy, digits=2)} % of the time, " if busy and facts.has_events else ""
    return "Lost to saves", duration_text(sum(stalls)), f"{share}{count_text(len(stalls), 'save')}"


def _checkpoints(facts: Facts) -> list[Markup | None]:
    return [timeline(facts), _retention(facts), checkpoint_table(facts)]


def _retention(facts: Facts) -> Markup | None:
    """Return the retention in words."""
    keep = facts.retention
    if keep is None:
        return None
    rules = [f"the newest {keep.last}" if keep.last > 1 else "the newest"]
    if keep.best:
        rules.append(f"the best {keep.best} by {keep.metric}" if keep.best > 1 else f"the best by {keep.metric}")
    if keep.every:
        rules.append(f"every {keep.every:,} steps")
    if keep.within_s is not None:
        rules.append(f"those of the last {duration_text(keep.within_s)}")
    words = f"Retention keeps {', '.join(rules)}; pinned ones, and the one that a job resumed from."
    return tag("p", words, class_="note")


def _source(facts: Facts) -> Markup | None:
    """Return what a reader has to know of jobs that no event log tells of."""
    if facts.has_events:
        return None
    words = "There is no event log here: these are the jobs that the checkpoints which are left were saved by."
    return tag("p", words, class_="note")


def _classes(facts: Facts) -> list[Markup | None]:
    record = facts.evaluation
    if record is None:
        return []
    words = (
        f"{100 * record.accuracy:.2f} % of {count_text(sum(record.num_samples), 'test sample')} right "
        f"after step {record.step:,}."
    )
    pair = tag("div", accuracy_bars(record), confusion_figure(record), class_="pair")
    return [tag("p", words, class_="note"), pair, sheet(record)]


def _settings(facts: Facts) -> Markup:
    return tag(
        "details",
        tag("summary", "Configuration and versions"),
        settings({**(facts.config or {}), "versions": dict(facts.versions)}),
    )


def _footer(facts: Facts) -> Markup:
    made = moment_text(facts.made)
    words = f"Made by distckpt {__version__} on {made}; times are in the time zone of the machine that made it."
    return tag("footer", tag("p", words))

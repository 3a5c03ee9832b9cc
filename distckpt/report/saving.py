"""Figures of the saves: what each cost, and which checkpoint lived for how long."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from distckpt.report.charts import Key, Layer, Sign, Tip, chart
from distckpt.report.facts import Facts
from distckpt.report.history import Fate, Row, Save
from distckpt.report.jobs import Job
from distckpt.report.markup import Markup, tag
from distckpt.report.scales import Scale, step_scale, time_scale, value_scale
from distckpt.report.tables import moment_text
from distckpt.wording import count_text, duration_text, number_text, size_text

_MOST_STEMS = 1_000
_MOST_LIVES = 1_000
_MOST_BANDS = 200
Units = tuple[tuple[str, float], ...]  # names and sizes, largest first

_TIMES: Units = (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))
_SIZES: Units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
_RATES: Units = tuple((f"{name}/s", size) for name, size in _SIZES)
_UNSAID = {"kept": "still there", "partial": "never committed"}
_FATES: tuple[tuple[str, Fate, str], ...] = (
    ("kept", "kept", "kept"),
    ("gone", "deleted", "deleted"),
    ("bad", "damaged", "damaged"),
    ("part", "partial", "never committed"),
)


def save_charts(facts: Facts) -> list[Markup]:
    """Return charts of what the saves cost: stall, write time, throughput and size."""
    stalls = "Stall" if facts.has_events else "Staging"
    panels: list[tuple[str, Callable[[Save], float | None], Callable[[float], str], Units]] = [
        (stalls, lambda save: save.stall_s, duration_text, _TIMES),
        ("Write time", lambda save: save.write_s, duration_text, _TIMES),
        ("Throughput", lambda save: save.rate, lambda rate: f"{size_text(rate)}/s", _RATES),
        ("Size", lambda save: save.num_bytes, size_text, _SIZES),
    ]
    return [
        _save_chart(facts, title, measured, text=text, units=units)
        for title, of, text, units in panels
        if (measured := [(save, value) for save in facts.saves if (value := of(save)) is not None])
    ]


def _save_chart(
    facts: Facts,
    title: str,
    measured: Sequence[tuple[Save, float]],
    *,
    text: Callable[[float], str],
    units: Units,
) -> Markup:
    """Return a chart of one figure of each save; of very many, the highest of each neighbourhood."""
    middle = statistics.median(value for _, value in measured)
    most = max(value for _, value in measured)
    unit, size = next(((name, size) for name, size in units if most >= size), units[-1])
    x = step_scale(0, max(facts.step or 0, *(save.step for save, _ in measured)))
    y = value_scale([value / size for _, value in measured], from_zero=True)
    shown = _highest(measured, _MOST_STEMS)
    places = [(x.at(save.step), y.at(value / size)) for save, value in shown]
    tips = [
        Tip(
            at=at,
            head=f"step {save.step:,}",
            rows=((title.lower(), text(value), "one"), ("at", moment_text(save.time), "")),
            spots=((height, "one"),),
        )
        for (save, value), (at, height) in zip(shown, places, strict=True)
    ]
    width = max(1.0, min(6.0, 240 / max(1, len(shown))))
    return chart(
        title=title,
        summary=f"{count_text(len(measured), 'save')}: median {text(middle)}, highest {text(most)}.",
        x=x,
        y=y,
        layers=[Layer(style="one", shape="stems", places=places, width=width)],
        keys=[Key(style="", name="median", figure=text(middle)), Key(style="", name="highest", figure=text(most))],
        tips=tips,
        note=unit,
        size="low",
    )


def _highest(measured: Sequence[tuple[Save, float]], most: int) -> list[tuple[Save, float]]:
    num_parts = min(most, len(measured))
    parts = [
        measured[part * len(measured) // num_parts : (part + 1) * len(measured) // num_parts]
        for part in range(num_parts)
    ]
    return [max(part, key=lambda pair: pair[1]) for part in parts]


def timeline(facts: Facts) -> Markup | None:
    """Return the chart of all checkpoints over time: each from its save to its end; above it, the jobs."""
    known = [row for row in facts.rows if row.created is not None and row.step is not None]
    deleted = [row for row in known if row.fate == "deleted"]
    rows = [row for row in known if row.fate != "deleted"][-_MOST_LIVES:] + deleted[-_MOST_LIVES:]
    if not rows:
        return None
    jobs = facts.jobs[-_MOST_BANDS:]
    moments = [row.created or 0.0 for row in rows] + [job.started for job in jobs] + [job.ended for job in jobs]
    gone = [row.gone for row in rows if row.gone is not None]
    x = time_scale(min(moments), max(moments + gone))
    y = value_scale([row.step or 0 for row in rows], from_zero=True)
    counts = Counter(row.fate for row in facts.rows)
    lives = {style: [row for row in rows if row.fate == fate] for style, fate, _ in _FATES}
    layers = [layer for style, some in lives.items() if some for layer in _lives(some, style, x, y)]
    return chart(
        title="Checkpoints over time",
        summary=_summary(facts),
        x=x,
        y=y,
        layers=layers,
        keys=[Key(style=style, name=name, figure=f"{counts[fate]:,}") for style, fate, name in _FATES if counts[fate]],
        tips=[_tip(row, x, y) for row in rows],
        signs=[Sign(at=x.at(job.started), kind="start") for job in jobs[1:]],
        above=_bands(jobs, x) if facts.has_events else None,
        note="by step; each from its save to its end",
        size="tall",
    )


def _lives(rows: Sequence[Row], style: str, x: Scale, y: Scale) -> list[Layer]:
    """Return lines from each checkpoint's save to its end, and a dot at each save."""
    places: list[tuple[float, float]] = []
    dots = []
    for row in rows:
        height, begin = y.at(row.step or 0), x.at(row.created or 0.0)
        dots.append((begin, height))
        if row.fate != "partial" and (row.gone is not None or row.fate == "kept"):
            places += [(begin, height), (x.at(row.gone) if row.gone else 1.0, height), (1.0, math.nan)]
    return [Layer(style=style, shape="line", places=places), Layer(style=style, shape="dots", places=dots)]


def _tip(row: Row, x: Scale, y: Scale) -> Tip:
    style = next((style for style, fate, _ in _FATES if fate == row.fate), "bad")
    rows = [("saved", moment_text(row.created), "")]
    if row.num_bytes is not None:
        rows.append(("size", size_text(row.num_bytes), ""))
    said = "; ".join(row.reasons)
    ended = f"{moment_text(row.gone)}" if row.gone is not None else ""
    otherwise = _UNSAID.get(row.fate, "nobody said when")
    rows.append((row.fate, ", ".join(part for part in (ended, said) if part) or otherwise, style))
    spot = (y.at(row.step or 0), style)
    return Tip(at=x.at(row.created or 0.0), head=f"step {row.step:,}", rows=tuple(rows), spots=(spot,))


def _bands(jobs: Sequence[Job], x: Scale) -> Markup:
    """Return the jobs as a strip of bands."""
    bands = []
    for job in jobs:
        begin, end = x.at(job.started), x.at(job.ended)
        place = f"left:{100 * begin:.2f}%;width:{100 * (end - begin):.2f}%"
        words = f"job {job.number}: {job.ending}, {duration_text(job.ended - job.started)}"
        bands.append(tag("span", str(job.number), class_=f"band {job.ending}", style=place, title=words))
    return tag("div", *bands, class_="bands", aria_hidden="true")


def _summary(facts: Facts) -> str:
    kept = facts.kept
    size = size_text(sum(row.num_bytes or 0 for row in kept))
    deleted = sum(row.fate == "deleted" for row in facts.rows)
    damaged = sum(row.fate == "damaged" for row in facts.rows)
    steps = f" of steps {', '.join(number_text(row.step or 0) for row in kept[-10:])}" if kept else ""
    return f"{count_text(len(kept), 'checkpoint')} kept{steps}, {size}; {deleted:,} deleted, {damaged:,} damaged."

"""Figures of the training: losses, metrics, the learning rate and whatever else was measured, over steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from distckpt.report.charts import Key, Layer, Sign, Tip, chart
from distckpt.report.facts import Facts, MarkKind
from distckpt.report.history import Fate
from distckpt.report.markup import Markup
from distckpt.report.records import Point
from distckpt.report.scales import Scale, means, step_scale, thin, value_scale
from distckpt.wording import count_text, number_text

MOST_POINTS = 2_000  # of a curve; a plot is about a thousand pixels wide
_SMOOTH_FROM = 400  # points of a curve, from which its mean says more than itself
_NUM_MEANS = 150
_STYLES = ("one", "two", "three", "four")
_MOST_OTHERS = 8  # charts of curves that have no chart of their own
_TITLES = {"loss": "Loss", "top1": "Accuracy", "lr": "Learning rate", "grad_norm": "Gradient norm"}
_NAMES = {
    "train/loss": "training",
    "val/loss": "validation",
    "train/lr": "learning rate",
    "val/top1": "first choice",
    "val/top5": "among five",
    "train/grad_norm": "norm",
}
_SHARES = frozenset({"val/top1", "val/top5"})
_RUG: tuple[tuple[str, Fate], ...] = (("gone", "deleted"), ("kept", "kept"), ("bad", "damaged"))
_SIGN_NAMES: dict[MarkKind, str] = {
    "restart": "restart",
    "preemption": "preemption",
    "damage": "damaged checkpoint",
    "failure": "failure",
}


def progress_charts(facts: Facts) -> list[Markup]:
    """Return a chart of each thing that was measured: what belongs together in one."""
    groups = _groups(facts.curves)
    if not groups:
        return []
    steps = [step for names in groups for name in names for step, _ in facts.curves[name]]
    x = step_scale(0, max(*steps, facts.step or 0))
    return [_chart(facts, names, x, is_first=index == 0) for index, names in enumerate(groups)]


def _groups(curves: Mapping[str, Sequence[Point]]) -> list[list[str]]:
    """Return the names of curves, those together that share a chart."""
    wanted = [["train/loss", "val/loss"], ["val/top1", "val/top5"], ["train/lr"]]
    groups = [[name for name in names if curves.get(name)] for names in wanted]
    others = [name for name in curves if curves[name] and not any(name in names for names in wanted)]
    return [names for names in groups if names] + [[name] for name in others[:_MOST_OTHERS]]


def _chart(facts: Facts, names: Sequence[str], x: Scale, *, is_first: bool) -> Markup:
    """Return a chart of curves; the first one says what its signs mean, for all of them."""
    curves = {name: thin(facts.curves[name], MOST_POINTS) for name in names}
    are_shares = _SHARES.issuperset(names)
    values = [value for points in curves.values() for _, value in points]
    y = value_scale([100 * value for value in values] if are_shares else values, from_zero=names == ["train/lr"])
    factor = 100 if are_shares else 1
    layers: list[Layer] = []
    for name, style in zip(names, _STYLES, strict=False):
        layers += _layers(facts.curves[name], curves[name], x=x, y=y, style=style, factor=factor)
    notes = ["logarithmic"] if y.kind == "log" else ["%"] if are_shares else []
    stem = names[0].rpartition("/")[2]
    return chart(
        title=_TITLES.get(stem, names[0]) if names[0] in _NAMES else names[0],
        summary=_summary(facts, names),
        x=x,
        y=y,
        layers=layers,
        keys=[*_keys(facts, names), *(_sign_keys(facts) if is_first else ())],
        tips=_tips(facts, curves, x, y, factor),
        signs=[Sign(at=x.at(mark.step), kind=mark.kind) for mark in facts.marks],
        rug=checkpoint_rug(facts, x),
        note=", ".join(notes),
        size="tall" if "loss" in stem else "",
    )


def _layers(
    points: Sequence[Point], thinned: Sequence[Point], *, x: Scale, y: Scale, style: str, factor: float
) -> list[Layer]:
    """Return a curve as it is drawn: long ones as their mean before the whole."""

    def placed(some: Sequence[Point]) -> list[tuple[float, float]]:
        return [(x.at(step), y.at(factor * value) if math.isfinite(value) else math.nan) for step, value in some]

    if len(points) < _SMOOTH_FROM or style != _STYLES[0]:
        dots = [Layer(style=style, shape="dots", places=placed(thinned))] if len(points) <= 60 else []
        return [Layer(style=style, shape="line", places=placed(thinned)), *dots]
    smooth = [points[0], *means(points, _NUM_MEANS), points[-1]]
    return [
        Layer(style=style, shape="band", places=placed(thinned)),
        Layer(style=style, shape="line", places=placed(smooth[1:-1])),
    ]


def checkpoint_rug(facts: Facts, x: Scale) -> list[Layer]:
    """Return the checkpoints as dots along the steps: those that are there, those that were, and damaged ones."""
    layers = []
    for style, fate in _RUG:
        places = {round(x.at(row.step), 3) for row in facts.rows if row.fate == fate and row.step is not None}
        if places:
            layers.append(Layer(style=style, shape="dots", places=[(at, 0.5) for at in sorted(places)]))
    return layers


def _keys(facts: Facts, names: Sequence[str]) -> list[Key]:
    return [
        Key(style=style, name=_NAMES.get(name, name), figure=_figure(name, facts.curves[name][-1][1]))
        for name, style in zip(names, _STYLES, strict=False)
    ]


def _sign_keys(facts: Facts) -> list[Key]:
    counts = Counter(mark.kind for mark in facts.marks)
    fates = Counter(row.fate for row in facts.rows)
    return [
        Key(style=f"sign {kind}", name=name if counts[kind] == 1 else f"{name}s", figure=f"{counts[kind]:,}")
        for kind, name in _SIGN_NAMES.items()
        if counts[kind]
    ] + [Key(style=style, name=f"checkpoint {fate}") for style, fate in _RUG[:2] if fates[fate]]


def _tips(facts: Facts, curves: Mapping[str, Sequence[Point]], x: Scale, y: Scale, factor: float) -> list[Tip]:
    """Return what there is to say of each step."""
    rows: dict[int, list[tuple[str, str, str]]] = {}
    spots: dict[int, list[tuple[float, str]]] = {}
    for (name, points), style in zip(curves.items(), _STYLES, strict=False):
        for step, value in thin(points, 400):
            rows.setdefault(step, []).append((_NAMES.get(name, name), _figure(name, value), style))
            if math.isfinite(value):
                spots.setdefault(step, []).append((y.at(factor * value), style))
    for mark in facts.marks:
        rows.setdefault(mark.step, []).append((_SIGN_NAMES[mark.kind], mark.text, f"sign {mark.kind}"))
    return [
        Tip(at=x.at(step), head=f"step {step:,}", rows=tuple(some), spots=tuple(spots.get(step, ())))
        for step, some in rows.items()
    ]


def _figure(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{100 * value:.2f} %" if name in _SHARES else number_text(value, digits=4 if "loss" in name else 3)


def _summary(facts: Facts, names: Sequence[str]) -> str:
    """Return the curves in words."""
    sentences = []
    for name in names:
        points = facts.curves[name]
        finite = [value for _, value in points if math.isfinite(value)]
        if not finite:
            sentences.append(f"{_NAMES.get(name, name)}: never a finite number.")
            continue
        first, last, low, high = (_figure(name, value) for value in (finite[0], finite[-1], min(finite), max(finite)))
        sentences.append(
            f"{_NAMES.get(name, name)}: from {first} at step {points[0][0]:,} to {last} at step {points[-1][0]:,}, "
            f"lowest {low}, highest {high}, {count_text(len(points), 'point')}."
        )
    return " ".join(sentences)

"""Charts: SVG that stretches to any width, with labels of ordinary text beside it, readable on a phone and in print.

Coordinates run from 0 to 1000 in both directions and are stretched by the browser; strokes and dots are not.
What a pointer or the arrow keys bring up are tips, computed here; the page's script only shows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distckpt.report.markup import Markup, data, join, tag
from distckpt.report.scales import Scale

MOST_TIPS = 600  # a plot is about a thousand pixels wide
_MARK_GAP = 0.006  # of the width: marks nearer than this share one sign

Shape = Literal["line", "band", "dots", "stems"]
Place = tuple[float, float]  # on the plot: 0 to 1 from the left, 0 to 1 from the bottom; NaN is a gap


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One thing that is drawn.

    Attributes:
        style: The class that gives it its colour.
        shape: "line"; "band", a line that stays in the background; "dots"; or "stems", lines up from the bottom.
        places: Where.
        width: The stroke's width in pixels; None for the shape's own.
    """

    style: str
    shape: Shape
    places: Sequence[Place]
    width: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One entry of a legend: its colour's class, its name, and its figure."""

    style: str
    name: str
    figure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tip:
    """What is shown of one place on the horizontal axis.

    Attributes:
        at: The place, 0 to 1.
        head: What it is.
        rows: Names, figures and the classes of their colours.
        spots: What is dotted: places from the bottom, and classes.
    """

    at: float
    head: str
    rows: tuple[tuple[str, str, str], ...]
    spots: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """A line across the plot, with a sign at its top: where, and of which kind; a tip says more."""

    at: float
    kind: str


def chart(
    *,
    title: str,
    summary: str,
    x: Scale,
    y: Scale,
    layers: Sequence[Layer],
    keys: Sequence[Key] = (),
    tips: Sequence[Tip] = (),
    signs: Sequence[Sign] = (),
    rug: Sequence[Layer] = (),
    above: Markup | None = None,
    note: str = "",
    size: str = "",
) -> Markup:
    """Return a chart.

    Args:
        title: What it shows.
        summary: The same in a sentence or two, for those who cannot see it.
        x: The horizontal axis.
        y: The vertical axis.
        layers: What is drawn, the lowest first.
        keys: The legend.
        tips: What a pointer brings up; more than a plot has room for are thinned out.
        signs: Lines across the plot.
        rug: What is drawn in a strip below the plot; its places' heights do not count.
        above: What stands in a strip above the plot.
        note: A remark beside the title.
        size: A class for the plot's height.
    """
    grid = _stroke("grid", (f"M0 {_down(y.at(value))}H1000" for value, _ in y.ticks))
    lines = (_stroke(f"rule {sign.kind}", (f"M{_across(sign.at)} 0V1000",)) for sign in _apart(signs))
    picture = _svg(join([grid, *lines, *map(_drawn, layers)]), role="img", aria_label=f"{title}. {summary}")
    flags = (
        tag("span", class_=f"sign {sign.kind}", style=f"{_left(sign.at)};--row:{row}", aria_hidden="true")
        for sign, row in _stacked(_apart(signs))
    )
    plot = tag(
        "div",
        picture,
        *flags,
        _labels(y, "y"),
        tag("div", class_="hair", hidden=True),
        class_=f"plot {size}".rstrip(),
    )
    strip = tag("div", _svg(join(map(_drawn, rug)), aria_hidden="true"), class_="rug") if rug else None
    inner = tag("div", above, plot, strip, _labels(x, "x"), class_="frame", tabindex="0" if tips else None)
    return tag(
        "figure",
        tag("figcaption", tag("h3", title), tag("span", note, class_="note") if note else None, _legend(keys)),
        inner,
        data([_tip(one) for one in _spread(tips)]) if tips else None,
        class_="chart signed" if signs else "chart",
    )


def _svg(content: str, **attributes: str) -> Markup:
    return tag("svg", content, viewBox="0 0 1000 1000", preserveAspectRatio="none", **attributes)


def _drawn(layer: Layer) -> Markup:
    paths = {"line": _line, "band": _line, "dots": _dots, "stems": _stems}[layer.shape](layer.places)
    style = f"{layer.shape} {layer.style}"
    return _stroke(style, paths, width=layer.width)


def _stroke(style: str, parts: Iterable[str], *, width: float | None = None) -> Markup:
    wide = None if width is None else f"stroke-width:{width:g}px"
    return tag("path", class_=style, d="".join(parts), style=wide, vector_effect="non-scaling-stroke")


def _line(places: Sequence[Place]) -> Iterable[str]:
    """Yield the parts of a path along places; a place alone between gaps is a dot."""
    pen = "M"
    for index, (at, height) in enumerate(places):
        if math.isnan(height):
            pen = "M"
            continue
        yield f"{pen}{_across(at)} {_down(height)}"
        if pen == "M" and (index + 1 == len(places) or math.isnan(places[index + 1][1])):
            yield "h0"
        pen = "L"


def _dots(places: Sequence[Place]) -> Iterable[str]:
    return (f"M{_across(at)} {_down(height)}h0" for at, height in places if not math.isnan(height))


def _stems(places: Sequence[Place]) -> Iterable[str]:
    return (f"M{_across(at)} 1000V{_down(height)}" for at, height in places if not math.isnan(height))


def _across(at: float) -> str:
    return f"{1000 * at:.1f}".removesuffix(".0")


def _down(height: float) -> str:
    return f"{1000 * (1 - height):.1f}".removesuffix(".0")


def _left(at: float) -> str:
    return f"left:{100 * at:.2f}%"


def _labels(scale: Scale, axis: Literal["x", "y"]) -> Markup:
    """Return an axis's labels; every second one gives way where there is little room."""
    edge = "left" if axis == "x" else "bottom"
    labels = (
        tag("span", text, class_="minor" if index % 2 else None, style=f"{edge}:{100 * scale.at(value):.2f}%")
        for index, (value, text) in enumerate(scale.ticks)
    )
    return tag("div", *labels, class_=f"axis {axis}", aria_hidden="true")


def _legend(keys: Sequence[Key]) -> Markup | None:
    if not keys:
        return None
    entries = (
        tag("li", tag("i", class_=key.style), key.name, tag("b", key.figure) if key.figure else None) for key in keys
    )
    return tag("ul", *entries, class_="legend")


def _apart(signs: Sequence[Sign]) -> list[Sign]:
    """Return the signs without those that would lie on another of the same kind."""
    last: dict[str, float] = {}
    shown = []
    for sign in sorted(signs, key=lambda sign: sign.at):
        if sign.at - last.get(sign.kind, -1.0) >= _MARK_GAP:
            shown.append(sign)
            last[sign.kind] = sign.at
    return shown


def _stacked(signs: Sequence[Sign]) -> list[tuple[Sign, int]]:
    """Return the signs with the row that each stands in: those at one place stand above each other."""
    stacked: list[tuple[Sign, int]] = []
    for sign in signs:
        last, row = stacked[-1] if stacked else (None, 0)
        stacked.append((sign, row + 1 if last is not None and sign.at - last.at < _MARK_GAP else 0))
    return stacked


def _spread(tips: Sequence[Tip]) -> list[Tip]:
    """Return the tips from left to right, and no more than there is room for."""
    ordered = sorted(tips, key=lambda tip: tip.at)
    if len(ordered) <= MOST_TIPS:
        return ordered
    return [ordered[index * (len(ordered) - 1) // (MOST_TIPS - 1)] for index in range(MOST_TIPS)]


def _tip(tip: Tip) -> list[Any]:
    spots = [[round(1000 * height, 1), style] for height, style in tip.spots if not math.isnan(height)]
    return [round(1000 * tip.at, 1), tip.head, [list(row) for row in tip.rows], spots]

"""Scales: where values lie between the edges of a plot, and where its lines are labelled; and shorter curves.

Invariant: what is thinned out keeps its extremes, its ends and its gaps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distckpt.report.records import Point
from distckpt.wording import number_text

_LOG_FROM = 30.0  # the ratio of largest to smallest from which a linear scale would hide the small ones
_MOST_DECADES = 12
_SMALLEST, _LARGEST = 1e-280, 1e280  # beyond them, sums and ratios leave the range of a float
_LAST_MOMENT = 1e11  # in seconds since 1970; in the year 5138
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
_TIME_STEPS = (
    1,
    2,
    5,
    10,
    15,
    30,
    *(_MINUTE * n for n in (1, 2, 5, 10, 15, 30)),
    *(_HOUR * n for n in (1, 2, 3, 6, 12)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """An axis.

    Attributes:
        low: The value at its beginning.
        high: The value at its end; more than `low`.
        kind: "linear" or "log".
        ticks: The values that are labelled, with their labels.
    """

    low: float
    high: float
    kind: Literal["linear", "log"] = "linear"
    ticks: tuple[tuple[float, str], ...] = ()

    def at(self, value: float) -> float:
        """Return where a value lies: 0 at the beginning, 1 at the end; beyond them at the nearer one."""
        if self.kind == "log":
            value = max(value, self.low)
            place = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, place))


def value_scale(values: Sequence[float], *, from_zero: bool = False, num_ticks: int = 4) -> Scale:
    """Return a scale for values: logarithmic if they are all positive and differ much, unless it begins at zero."""
    finite = [min(_LARGEST, max(-_LARGEST, value)) for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if not from_zero and low > _SMALLEST and high / low >= _LOG_FROM:
        return _log_scale(max(low, high / 10**_MOST_DECADES), high)
    low = min(0.0, low) if from_zero else low
    if high - low <= max(_SMALLEST, 1e-12 * max(abs(high), abs(low))):  # all the same: some room on both sides
        room = abs(high) / 2 if abs(high) > _SMALLEST else 1.0
        low, high = (low if from_zero else low - room), high + room
    step = _nice((high - low) / num_ticks)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    places = [low + index * step for index in range(round((high - low) / step) + 1)]
    ticks = [(0.0 if abs(place) < step / 1e6 else place) for place in places]
    return Scale(low=low, high=high, ticks=tuple((tick, short_text(tick)) for tick in ticks))


def _log_scale(low: float, high: float) -> Scale:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    decades = last - first
    factors = (1, 2, 5) if decades <= 1 else (1, 3) if decades <= 6 else (1,)
    marks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    low = max((mark for mark in marks if mark <= low * 1.001), default=low)
    high = min((mark for mark in marks if mark >= high * 0.999), default=high)
    inside = [mark for mark in marks if low * 0.999 <= mark <= high * 1.001]
    shown = inside[:: max(1, math.ceil(len(inside) / 7))]
    return Scale(low=low, high=high, kind="log", ticks=tuple((mark, short_text(mark)) for mark in shown))


def step_scale(low: int, high: int, *, num_ticks: int = 6) -> Scale:
    """Return a scale for steps: from the first to the last one, labelled at round ones."""
    high = max(high, low + 1)
    size = max(1, round(_nice((high - low) / num_ticks)))
    ticks = range(-(-low // size) * size, high + 1, size)
    return Scale(low=low, high=high, ticks=tuple((tick, short_text(tick)) for tick in ticks))


def time_scale(low: float, high: float, *, num_ticks: int = 5) -> Scale:
    """Return a scale for moments, in seconds since 1970, labelled with the machine's local time."""
    low = min(_LAST_MOMENT, max(0.0, low))
    high = min(_LAST_MOMENT + 1, max(high, low + 1))
    wanted = (high - low) / num_ticks
    size = next((size for size in _TIME_STEPS if size >= wanted), 0) or max(1, math.ceil(wanted / _DAY)) * _DAY
    offset = time.localtime(low).tm_gmtoff
    first = math.ceil((low + offset) / size) * size - offset
    form = "%H:%M:%S" if size < _MINUTE else "%H:%M" if high - low < _DAY else "%d %b %H:%M" if size < _DAY else "%d %b"
    places = (first + index * size for index in range(math.floor((high - first) / size) + 1))
    moments = [place for place in places if low <= place <= high]
    return Scale(low=low, high=high, ticks=tuple((m, time.strftime(form, time.localtime(m))) for m in moments))


def _nice(size: float) -> float:
    """Return the smallest of 1, 2, 2.5 and 5 times a power of ten that is no less than `size`."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= size * (1 - 1e-9))


def short_text(value: float) -> str:
    """Return a label: "0.05", "1,200", "25k", "3M"."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size > 1e3):
            return f"{number_text(value / size, digits=3)}{suffix}"
    return number_text(value, digits=3)


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most about `most` of a curve's points, in order: of each stretch the lowest and the highest."""
    if len(points) <= most:
        return list(points)
    num_parts = max(1, most // 2)
    kept = {0, len(points) - 1}
    for part in range(num_parts):
        begin, end = part * len(points) // num_parts, (part + 1) * len(points) // num_parts
        finite = [index for index in range(begin, end) if math.isfinite(points[index][1])]
        if finite:
            kept |= {min(finite, key=lambda index: points[index][1]), max(finite, key=lambda index: points[index][1])}
        if len(finite) < end - begin:  # a gap stays one
            kept.add(next(index for index in range(begin, end) if not math.isfinite(points[index][1])))
    return [points[index] for index in sorted(kept)]


def means(points: Sequence[Point], num_parts: int) -> list[Point]:
    """Return the mean of each of so many stretches of a curve, at the middle of each."""
    result = []
    for part in range(num_parts):
        stretch = points[part * len(points) // num_parts : (part + 1) * len(points) // num_parts]
        finite = [value for _, value in stretch if math.isfinite(value)]
        if finite:
            result.append((stretch[len(stretch) // 2][0], math.fsum(finite) / len(finite)))
    return result

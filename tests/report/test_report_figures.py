"""Scales, thinned curves and words."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distckpt.report.charts import MOST_TIPS, Layer, Sign, Tip, chart
from distckpt.report.scales import Scale, means, short_text, step_scale, thin, time_scale, value_scale
from distckpt.wording import duration_text, number_text, size_text

VALUES = st.lists(st.floats(-1e9, 1e9) | st.just(math.nan), min_size=1, max_size=300)


@given(values=VALUES, most=st.integers(2, 60))
def test_a_thinned_curve_keeps_its_extremes_ends_and_gaps(values: list[float], most: int) -> None:
    points = list(enumerate(values))
    thinned = thin(points, most)
    finite = [value for value in values if math.isfinite(value)]
    kept = [value for _, value in thinned if math.isfinite(value)]
    assert len(thinned) <= 3 * max(1, most // 2) + 2
    assert [step for step, _ in thinned] == sorted({step for step, _ in thinned})
    assert (thinned[0][0], thinned[-1][0]) == (0, len(values) - 1)
    assert (min(finite, default=0), max(finite, default=0)) == (min(kept, default=0), max(kept, default=0))
    assert any(map(math.isnan, values)) == any(math.isnan(value) for _, value in thinned)


@given(values=st.lists(st.floats(-1e12, 1e12) | st.floats(), max_size=20), from_zero=st.booleans())
@example(values=[0.0, 5e-324], from_zero=False)
@example(values=[5e-324, 1e-300], from_zero=False)
@example(values=[-1.7e308, 1.7e308], from_zero=True)
def test_every_value_lies_on_its_scale(values: list[float], from_zero: bool) -> None:
    scale = value_scale(values, from_zero=from_zero)
    slack = 1e-9 * max(1.0, abs(scale.low), abs(scale.high))
    assert scale.low < scale.high
    shown = [value for value in values if abs(value) <= 1e280]
    most = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    shown = [value for value in shown if scale.kind == "linear" or value > most / 1e12]
    assert all(scale.low - slack <= value <= scale.high + slack for value in shown)
    assert all(0 <= scale.at(value) <= 1 for value in values)
    assert 2 <= len(scale.ticks) <= 12
    assert all(0 <= scale.at(tick) <= 1 for tick, _ in scale.ticks)


def test_values_that_differ_much_get_a_logarithmic_scale() -> None:
    assert value_scale([2.3, 0.008]).kind == "log"
    assert value_scale([2.3, 0.5]).kind == "linear"
    assert value_scale([2.3, 0.0]).kind == "linear"
    assert value_scale([2.3, 0.008], from_zero=True).kind == "linear"
    assert [text for _, text in value_scale([2.3, 0.012]).ticks] == ["0.01", "0.03", "0.1", "0.3", "1", "3"]


@given(high=st.integers(0, 10**12))
def test_steps_are_labelled_at_whole_numbers(high: int) -> None:
    scale = step_scale(0, high)
    assert 2 <= len(scale.ticks) <= 9
    assert len({text for _, text in scale.ticks}) == len(scale.ticks)


@given(low=st.floats(0, 2e9), length=st.floats(0, 1e8) | st.floats(0, 1e300))
@example(low=1e300, length=1.0)
def test_moments_are_labelled_within_their_scale(low: float, length: float) -> None:
    scale = time_scale(low, low + length)
    assert len(scale.ticks) <= 12
    assert all(scale.low <= moment <= scale.high for moment, _ in scale.ticks)
    assert all(0 <= scale.at(moment) <= 1 for moment in (low, low + length))


def test_means_leave_gaps_out() -> None:
    assert means([(1, 1.0), (2, math.nan), (3, 3.0), (4, math.nan)], 2) == [(2, 1.0), (4, 3.0)]


def test_a_gap_breaks_a_line_and_a_lone_point_is_a_dot() -> None:
    places = [(0.0, 0.0), (0.25, 0.5), (0.5, math.nan), (1.0, 1.0)]
    scale = Scale(low=0.0, high=1.0)
    page = chart(title="", summary="", x=scale, y=scale, layers=[Layer(style="one", shape="line", places=places)])
    assert 'd="M0 1000L250 500M1000 0h0"' in page


def test_signs_at_one_place_stand_above_each_other_and_a_crowd_is_thinned() -> None:
    scale = Scale(low=0.0, high=1.0)
    signs = [Sign(at=0.5, kind=kind) for kind in ("restart", "restart", "damage")]
    tips = [Tip(at=index / 5000, head="", rows=()) for index in range(5000)]
    page = chart(title="", summary="", x=scale, y=scale, layers=[], signs=signs, tips=tips)
    assert page.count('class="sign restart"') == 1
    assert 'class="sign damage" style="left:50.00%;--row:1"' in page
    assert page.count(',"",[],[]]') == MOST_TIPS


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.00042, "0.42 ms"),
        (0.0412, "41 ms"),
        (0.9994, "999 ms"),
        (0.99951, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min"),
        (250, "4 min 10 s"),
        (3600, "1 h"),
        (11_520, "3 h 12 min"),
        (190_800, "2 d 5 h"),
        (-1, "unknown"),
        (math.nan, "unknown"),
    ],
)
def test_a_duration_in_words(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.008121, "0.008121"),
        (1234567.0, "1,234,567"),
        (3.2e-9, "3.2e-9"),
        (0.05, "0.05"),
        (99.999999, "100"),
        (1e20, "1e20"),
        (-2.5, "-2.5"),
        (math.inf, "inf"),
    ],
)
def test_a_number_in_words(value: float, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(1200, "1,200"), (25_000, "25k"), (3e6, "3M"), (0.05, "0.05"), (0, "0")])
def test_a_label_is_short(value: float, text: str) -> None:
    assert short_text(value) == text


def test_a_size_in_words() -> None:
    assert [size_text(size) for size in (0, 999, 6.84e6, 99.96e6, 2e15)] == [
        "0 B",
        "999 B",
        "6.8 MB",
        "100 MB",
        "2.0 PB",
    ]

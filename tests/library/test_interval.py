"""How often to save: what users may say, and what is chosen from what saves, steps and failures cost."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distckpt.errors import ConfigError
from distckpt.interval import (
    FIRST_STEPS,
    LONGEST_S,
    MOST_LOST,
    SHORTEST_S,
    Estimator,
    Every,
    choose,
    default_mtbf_s,
    estimated_mtbf_s,
    uptimes,
    young_daly,
)
from distckpt.pace import Pace

COSTS = st.floats(0, 1e4)
MTBFS = st.floats(1, 1e8)
STEPS = st.floats(1e-6, 1e4)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (None, Every()),
        (500, Every(steps=500)),
        ("auto", Every(auto=True)),
        ("90s", Every(duration_s=90)),
        ("10min", Every(duration_s=600)),
        ("2h", Every(duration_s=7200)),
        ("1.5 h", Every(duration_s=5400)),
    ],
)
def test_an_interval_is_steps_or_a_time_or_auto(said: int | str | None, meant: Every):
    assert Every.of(said) == meant


@pytest.mark.parametrize(
    "said", [0, -1, True, 1.5, "", "10", "10m", "-5s", "0s", "0.0h", "nan s", "1e3s", "10min ", "1h30min", "Auto", "٣s"]
)
def test_anything_else_is_refused_in_one_line_that_shows_what_is_accepted(said: object):
    with pytest.raises(ConfigError) as raised:
        Every.of(said)  # type: ignore[arg-type]
    assert str(raised.value) == (
        f'CheckpointManager: every must be at least 1 step, a duration ("90s", "10min", "2h") or "auto", is {said!r}'
    )


@given(st.text())
def test_any_text_is_either_understood_or_refused(text: str):
    try:
        every = Every.of(text)
    except ConfigError:
        return
    assert every.auto or (every.duration_s is not None and 0 < every.duration_s < math.inf)


def lost_by_daly(interval_s: float, cost_s: float, mtbf_s: float) -> float:
    """Return time spent for each second of progress, restarts left out: the function whose minimum is wanted."""
    return mtbf_s * math.expm1((interval_s + cost_s) / mtbf_s) / interval_s


@given(st.floats(1e-5, 0.5), MTBFS)
def test_no_other_interval_loses_noticeably_less(ratio: float, mtbf_s: float):
    cost_s = ratio * mtbf_s
    chosen = lost_by_daly(young_daly(cost_s, mtbf_s), cost_s, mtbf_s)
    first_order = math.sqrt(2 * cost_s * mtbf_s)
    best = min(lost_by_daly(first_order * 1.02**power, cost_s, mtbf_s) for power in range(-80, 80))
    assert chosen <= best * 1.001


def test_a_cheap_save_comes_as_often_as_young_says_and_one_that_costs_two_failures_once_in_each():
    assert young_daly(0.01, 20_000) == pytest.approx(20, rel=2e-3)
    assert young_daly(2_000, 1_000) == young_daly(9_000, 1_000) == 1_000


@given(COSTS, COSTS, STEPS, MTBFS)
@example(0.0, 0.0, 1e-6, 1.0)
@example(1e4, 0.0, 1e4, 1.0)
def test_a_choice_stays_in_its_bounds_and_predicts_fractions(
    cost_s: float, durable_s: float, step_s: float, mtbf_s: float
):
    choice = choose(cost_s=cost_s, durable_s=durable_s, step_s=step_s, mtbf_s=mtbf_s)
    assert choice.steps >= 1
    assert choice.interval_s >= max(SHORTEST_S, durable_s)
    assert choice.lost_to_saves <= MOST_LOST * (1 + 1e-9)
    assert choice.interval_s <= max(LONGEST_S, durable_s, 19 * cost_s) + step_s + 1e-6
    assert choice.interval_s == pytest.approx(choice.steps * step_s, abs=step_s * 1.001)
    assert 0 <= choice.lost_to_saves <= choice.lost + 1e-12 <= 1 + 1e-9
    assert 0 <= choice.lost_to_failures <= choice.lost + 1e-12


@given(st.floats(0.01, 100), st.floats(60, 1e7), st.floats(1.5, 10))
def test_rarer_failures_never_make_saves_more_frequent(cost_s: float, mtbf_s: float, factor: float):
    often = choose(cost_s=cost_s, durable_s=0, step_s=0.1, mtbf_s=mtbf_s)
    seldom = choose(cost_s=cost_s, durable_s=0, step_s=0.1, mtbf_s=mtbf_s * factor)
    assert seldom.interval_s >= often.interval_s


def test_nothing_is_chosen_before_a_step_and_a_save_are_known():
    estimator = Estimator()
    assert estimator.choice(3600) is None
    estimator.note_save(stall_s=1, durable_s=1)
    assert estimator.choice(3600) is None
    estimator.note_step(0.5, writing=False)
    assert estimator.choice(3600) is not None


def test_a_save_costs_its_stall_and_what_it_slows_the_steps_beside_it():
    estimator = Estimator()
    for _ in range(20):
        estimator.note_step(0.5, writing=False)
    for _ in range(4):
        estimator.note_step(0.75, writing=True)
    estimator.note_save(stall_s=0.2, durable_s=3.2)
    choice = estimator.choice(3600)
    assert choice is not None
    assert choice.cost_s == pytest.approx(0.2 + 4 * 0.25)
    assert choice.interval_s == pytest.approx(young_daly(1.2, 3600), abs=0.5)


@given(st.lists(st.floats(0, 1e6), max_size=3))
def test_a_few_strange_steps_and_saves_move_nothing(strange: list[float]):
    estimator = Estimator()
    for seconds in [*strange, *[0.5] * 10]:
        estimator.note_step(seconds, writing=False)
    for seconds in [*strange, *[0.25] * 5]:
        estimator.note_save(stall_s=seconds, durable_s=seconds)
    choice = estimator.choice(3600)
    assert choice is not None
    assert (estimator.step_s, choice.cost_s) == (0.5, 0.25)


def test_a_history_replaces_the_default_the_longer_it_is():
    assert estimated_mtbf_s([], 0, default_s=21_600) == 21_600
    assert estimated_mtbf_s([60], 60, default_s=21_600) == pytest.approx(10_860)
    assert estimated_mtbf_s([3_600] * 100, 0, default_s=21_600) == pytest.approx(3_600, rel=0.06)
    assert estimated_mtbf_s([], 1e7, default_s=21_600) > 1e7


def test_a_process_was_at_work_from_its_first_checkpoint_to_its_last():
    sightings = [("a/1", 100.0), ("a/1", 400.0), ("b/1", 1000.0), ("a/2", 1100.0), ("a/2", 1150.0)]
    assert uptimes(sightings) == [300.0, 0.0, 50.0]


def test_thousands_of_ranks_fail_more_often_than_a_few():
    assert default_mtbf_s(1) == default_mtbf_s(512) == 6 * 3600
    assert default_mtbf_s(16_384) == pytest.approx(3.05 * 3600, rel=0.01)


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def saves_of(pace: Pace, clock: Clock, *, num_steps: int, step_s: float, stall_s: float) -> list[int]:
    """Run steps that take so long, and saves when they are due; return the steps that were saved."""
    saved = []
    for step in range(1, num_steps + 1):
        clock.now_s += step_s
        pace.step_ended(world_size=1, tell=True)
        if pace.is_due(step, busy=False):
            saved.append(step)
            clock.now_s += stall_s
            pace.restart(step)
            pace.save_committed(stall_s=stall_s, durable_s=stall_s)
        pace.step_begins(writing=False)
    return saved


def test_a_time_is_kept_whatever_a_step_takes():
    for step_s, expected in ((1.0, [11, 21, 31]), (4.0, [4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34]), (30.0, [2, 3])):
        clock = Clock()
        pace = Pace(Every.of("10s"), clock=clock)
        assert saves_of(pace, clock, num_steps=expected[-1], step_s=step_s, stall_s=0.0) == expected


def test_auto_measures_one_save_early_and_then_keeps_the_best_interval(caplog: pytest.LogCaptureFixture):
    clock = Clock()
    pace = Pace(Every.of("auto"), mtbf_s=3600, clock=clock)
    with caplog.at_level(logging.INFO, logger="distckpt"):
        first, *more = saves_of(pace, clock, num_steps=500, step_s=2.0, stall_s=1.0)
    assert first == FIRST_STEPS
    assert {b - a for a, b in itertools.pairwise(more)} == {math.ceil(young_daly(1.0, 3600) / 2)} == {43}
    [line] = caplog.messages
    assert line == (
        "from here on saving every 43 steps (86.0 s): a save costs 1.000 s of training, a failure is expected every "
        "60.0 min; predicted loss 1.15 % to saves and 1.22 % to steps done again"
    )


def test_auto_counts_what_a_write_slows_the_steps_beside_it(caplog: pytest.LogCaptureFixture):
    clock = Clock()
    pace = Pace(Every.of("auto"), mtbf_s=3600, clock=clock)
    with caplog.at_level(logging.INFO, logger="distckpt"):
        for step in range(1, 20):
            beside = FIRST_STEPS < step <= FIRST_STEPS + 3
            clock.now_s += 1.5 if beside else 1.0
            if step == FIRST_STEPS + 3:
                pace.save_committed(stall_s=0.25, durable_s=4.0)
            pace.step_ended(world_size=1, tell=True)
            if pace.is_due(step, busy=beside):
                pace.restart(step)
                clock.now_s += 0.25
            pace.step_begins(writing=FIRST_STEPS <= step < FIRST_STEPS + 3)
    [line] = caplog.messages
    assert "a save costs 1.750 s of training" in line


def test_auto_takes_the_runs_history_where_it_is_told_nothing():
    chosen = []
    for ended_s in ([], [600.0] * 50):
        clock = Clock()
        pace = Pace(Every.of("auto"), clock=clock)
        pace.ended_s = ended_s
        first, second, *_ = saves_of(pace, clock, num_steps=1000, step_s=1.0, stall_s=0.1)
        chosen.append(second - first)
    assert chosen[0] > 2 * chosen[1]


def test_auto_waits_for_what_its_first_save_costs():
    clock = Clock()
    pace = Pace(Every.of("auto"), clock=clock)
    due = [step for step in range(1, 40) if pace.is_due(step, busy=step > FIRST_STEPS)]
    assert due == [FIRST_STEPS]

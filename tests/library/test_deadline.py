"""How much time a job has left once it is asked to stop, and what it does with it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distckpt.deadline import MARGIN_S, UNKNOWN_DURABLE_S, Deadline, Situation, choose, intention, margin_s

NOW = 1_000_000.0
TORCHRUN = {"TORCHELASTIC_RUN_ID": "job"}


@pytest.mark.parametrize(
    ("environment", "said", "signal", "left_s"),
    [
        ({}, {}, "SIGTERM", None),
        ({}, {"grace_s": 30.0}, "SIGTERM", 28.0),
        ({}, {"grace_s": 30.0}, "SIGUSR1", 28.0),
        ({}, {"grace_s": 30.0}, None, None),
        (TORCHRUN, {}, "SIGTERM", 28.0),
        (TORCHRUN, {}, "SIGINT", 28.0),
        # torchrun kills after a signal that it forwards; one that came past it says nothing of a kill
        (TORCHRUN, {}, "SIGUSR1", None),
        ({**TORCHRUN, "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM, SIGUSR1"}, {}, "SIGUSR1", 28.0),
        ({**TORCHRUN, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}, {}, "SIGTERM", 118.0),
        ({**TORCHRUN, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "soon"}, {}, "SIGTERM", 28.0),
        ({**TORCHRUN, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}, {"is_grace_settable": False}, "SIGTERM", 28.0),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}, {}, "SIGTERM", None),
        ({**TORCHRUN, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}, {"grace_s": 60.0}, "SIGTERM", 58.0),
        ({"SLURM_JOB_END_TIME": "1000500"}, {}, None, 500.0),
        ({"SLURM_JOB_END_TIME": "1000500"}, {}, "SIGUSR1", 500.0),
        ({"SLURM_JOB_END_TIME": "1000500", **TORCHRUN}, {}, "SIGTERM", 28.0),
        ({"SLURM_JOB_END_TIME": "1000010", **TORCHRUN}, {}, "SIGTERM", 10.0),
        ({"SLURM_JOB_END_TIME": "1000500"}, {"ends_at": NOW + 70}, None, 70.0),
        # one that is over, of another allocation: it says nothing
        ({"SLURM_JOB_END_TIME": "999000"}, {}, "SIGTERM", None),
        ({"SLURM_JOB_END_TIME": "Unknown"}, {}, "SIGTERM", None),
        ({"SLURM_JOB_END_TIME": "inf"}, {}, "SIGTERM", None),
    ],
)
def test_the_time_left_is_the_least_that_anybody_tells(
    environment: dict[str, str], said: dict[str, Any], signal: str | None, left_s: float | None
):
    deadline = Deadline.of(environment, now=NOW, **said)
    assert deadline.left_s(now=NOW, signalled=signal, age_s=2.0) == left_s


def test_an_allocation_that_lives_on_after_its_end_has_no_known_end():
    deadline = Deadline(ends_at=NOW)
    assert deadline.left_s(now=NOW - 5, signalled="SIGTERM") == 5
    assert deadline.left_s(now=NOW + 5, signalled="SIGTERM") is None
    assert Deadline(ends_at=NOW, grace_s=30).left_s(now=NOW + 5, signalled="SIGTERM", age_s=1) == 29


def test_it_is_time_to_stop_a_margin_before_the_end_and_ever_after():
    deadline = Deadline(ends_at=NOW)
    near = [deadline.is_near(now=NOW + late_s, margin_s=60) for late_s in (-61, -60, -1, 100)]
    assert near == [False, True, True, True]
    assert not Deadline(grace_s=1).is_near(now=NOW, margin_s=1e9)


@given(durable_s=st.floats(0, 1e5), step_s=st.floats(0, 1e5), begun_s=st.floats(0, 1))
def test_the_margin_holds_a_save_in_flight_another_one_and_two_steps(durable_s: float, step_s: float, begun_s: float):
    needed_s = durable_s * (1 - begun_s) + durable_s + 2 * step_s
    assert margin_s(durable_s=durable_s, step_s=step_s) >= needed_s + MARGIN_S / 2


def test_the_margin_is_a_guess_as_long_as_no_save_was_seen():
    assert margin_s(durable_s=None, step_s=0.0) == margin_s(durable_s=UNKNOWN_DURABLE_S, step_s=0.0) == 70


CASES = {
    "no deadline is known": ({"durable_s": 9.0}, "save", "saving step 50"),
    "what a save takes is not known": ({"left_s": 0.1}, "save", "saving step 50"),
    "there is time": ({"left_s": 10.0, "durable_s": 9.0}, "save", "saving step 50"),
    "there is no time": (
        {"left_s": 8.0, "durable_s": 9.0, "saved_step": 40},
        "leave",
        "no time to save step 50; steps 41 to 50 will have to be done again",
    ),
    "there is no time, and never was a save": (
        {"left_s": 8.0, "durable_s": 9.0},
        "leave",
        "no time to save step 50; steps 1 to 50 will have to be done again",
    ),
    "the time is over": ({"left_s": -3.0, "durable_s": 0.5, "saved_step": 49}, "leave", None),
    "this step is being saved": (
        {"left_s": 1.0, "durable_s": 9.0, "in_flight": 50},
        "finish",
        "finishing the save of step 50",
    ),
    "this step is saved": ({"saved_step": 50, "left_s": 30.0, "durable_s": 1.0}, "leave", "step 50 is saved"),
    "there is time for the rest of one save and another": (
        {"left_s": 12.0, "durable_s": 8.0, "in_flight": 45, "in_flight_s": 4.0},
        "save",
        "saving step 50",
    ),
    "there is time for the save in flight only": (
        {"left_s": 11.0, "durable_s": 8.0, "in_flight": 49, "in_flight_s": 4.0, "saved_step": 40},
        "finish",
        "finishing the save of step 49; step 50 only if time is left then",
    ),
    "there is hardly time for the save in flight": (
        {"left_s": 1.0, "durable_s": 8.0, "in_flight": 45, "in_flight_s": 4.0},
        "finish",
        "finishing the save of step 45; steps 46 to 50 only if time is left then",
    ),
    "the save in flight takes longer than usual": (
        {"left_s": 9.0, "durable_s": 8.0, "in_flight": 45, "in_flight_s": 60.0},
        "save",
        "saving step 50",
    ),
    "no step is done": ({"step": 0, "left_s": 30.0}, "leave", "no step is done, so there is nothing to save"),
    "no step is done since the restore": ({"saved_step": 50}, "leave", "step 50 is saved"),
}


@pytest.mark.parametrize(("facts", "way", "words"), CASES.values(), ids=CASES.keys())
def test_what_can_be_done_in_time_is_done(facts: dict[str, Any], way: str, words: str | None):
    situation = Situation(**{"step": 50, **facts})
    assert choose(situation) == way
    assert words is None or intention(situation, choose(situation)) == words


TIMES = st.none() | st.floats(-10, 1000)


@given(
    step=st.integers(0, 3),
    saved_step=st.none() | st.integers(0, 3),
    in_flight=st.none() | st.integers(0, 3),
    in_flight_s=st.floats(0, 1000),
    left_s=TIMES,
    durable_s=st.none() | st.floats(0, 1000),
)
@example(step=2, saved_step=1, in_flight=None, in_flight_s=0.0, left_s=None, durable_s=None)
def test_a_step_is_given_up_only_if_its_save_is_known_to_take_too_long(**facts: Any):
    situation = Situation(**facts)
    way = choose(situation)
    is_kept = facts["saved_step"] == facts["step"] or facts["in_flight"] == facts["step"]
    if way != "save" and facts["step"] > 0 and not is_kept:
        assert facts["left_s"] is not None
        assert facts["durable_s"] is not None
        busy_s = 0.0 if facts["in_flight"] is None else max(0.0, facts["durable_s"] - facts["in_flight_s"])
        assert busy_s + facts["durable_s"] > facts["left_s"]
    if facts["in_flight"] is not None and way == "leave":
        assert facts["step"] == 0 or is_kept, "a save in flight is always finished first"
    assert intention(situation, way)
    assert str(situation)


def test_the_numbers_of_a_choice_are_told():
    situation = Situation(step=50, saved_step=40, in_flight=45, in_flight_s=1.26, left_s=28.84, durable_s=3.4)
    assert str(situation) == "28.8 s left, a save takes 3.4 s, that of step 45 began 1.3 s ago"
    assert str(Situation(step=3)) == "no deadline is known, what a save takes is not known yet"

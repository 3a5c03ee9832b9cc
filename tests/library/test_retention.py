"""Retention never removes what it must keep."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import ConfigError
from distckpt.retention import Retention, decide


@dataclass(frozen=True)
class Made:
    step: int
    created: float
    metrics: dict[str, float] = field(default_factory=dict)


LOSSES = st.one_of(st.none(), st.floats(allow_nan=True))
CHECKPOINTS = st.dictionaries(st.integers(0, 200), st.tuples(st.floats(0, 1e6), LOSSES), max_size=20).map(
    lambda made: [Made(step, created, {} if loss is None else {"loss": loss}) for step, (created, loss) in made.items()]
)
RULES = st.builds(
    Retention,
    last=st.integers(1, 5),
    best=st.integers(0, 3),
    metric=st.just("loss"),
    mode=st.sampled_from(["min", "max"]),
    every=st.one_of(st.none(), st.integers(1, 50)),
    within_s=st.one_of(st.none(), st.floats(0, 1e6)),
)


@given(CHECKPOINTS, RULES, st.integers(0, 200), *[st.sets(st.integers(0, 200), max_size=3)] * 2)
def test_what_must_stay_stays(checkpoints, rules, resumed_from, pinned, origins):
    branches = dict.fromkeys(origins, ("wide",))
    decisions = decide(checkpoints, rules, now=1e6, resumed_from=resumed_from, pinned=pinned, branches=branches)
    assert [d.step for d in decisions] == sorted(c.step for c in checkpoints)
    kept = {d.step for d in decisions if d.kept}
    steps = sorted(c.step for c in checkpoints)
    assert set(steps[-rules.last :]) <= kept
    assert ({resumed_from} | pinned | origins) & set(steps) <= kept
    if rules.every:
        assert {step for step in steps if step % rules.every == 0} <= kept


@given(CHECKPOINTS, RULES)
def test_pruning_twice_removes_no_more_than_once(checkpoints, rules):
    kept = {d.step for d in decide(checkpoints, rules, now=1e6) if d.kept}
    left = [c for c in checkpoints if c.step in kept]
    assert all(d.kept for d in decide(left, rules, now=1e6))


def test_the_best_is_kept_by_mode_and_nan_is_never_best():
    made = [Made(1, 0, {"loss": 0.5}), Made(2, 0, {"loss": float("nan")}), Made(3, 0, {"loss": 0.9}), Made(4, 0)]
    kept = [d.step for d in decide(made, Retention(last=1, best=1, metric="loss"), now=0) if d.kept]
    assert kept == [1, 4]
    kept = [d.step for d in decide(made, Retention(last=1, best=1, metric="loss", mode="max"), now=0) if d.kept]
    assert kept == [3, 4]


def test_each_reason_is_given():
    made = [Made(10, 0), Made(20, 90)]
    rules = Retention(last=1, every=10, within_s=20)
    decisions = decide(made, rules, now=100, resumed_from=10, pinned=[10], branches={10: ("deep", "wide")})
    expected = ("every 10 steps", "the run resumed from it", "deep, wide went off from it", "pinned")
    assert decisions[0].reasons == expected
    assert decisions[1].reasons == ("newest", "last 1", "every 10 steps", "within 20 s")


@pytest.mark.parametrize(
    "wrong",
    [{"last": 0}, {"last": True}, {"best": -1}, {"best": 1}, {"mode": "most"}, {"every": 0}, {"within_s": -1.0}],
)
def test_rules_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        Retention(**wrong)

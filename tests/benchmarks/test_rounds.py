from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest

from benchmarks.rounds import Cell, Rules, Run, Spread, good_rounds, interleave

RULES = Rules(num_rounds=3, max_noise=0.25)
COPY = (("copy", "s"),)


class Alone:
    """A team of one, without a process group."""

    rank = 0
    world_size = 1

    def barrier(self) -> None:
        pass

    def gather(self, value):
        return [value]

    def agree(self, value):
        return value


def run_of(*copies: float, **others: list[float]) -> Run:
    rounds = [
        {"copy": {"s": copy}, **{name: {"s": values[i]} for name, values in others.items()}}
        for i, copy in enumerate(copies)
    ]
    return Run(rounds=tuple(rounds), references=COPY, rules=RULES)


def counting(*values: float) -> Cell:
    given = itertools.cycle(values)
    return lambda: {"s": next(given)}


def test_a_spread_is_the_median_and_the_ends() -> None:
    spread = Spread.of([5.0, 1.0, 2.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 1.0, 5.0)
    assert Spread.of([1.0, 2.0, 3.0, 10.0]).median == 2.5


def test_a_round_in_which_a_reference_strays_counts_for_nobody() -> None:
    run = run_of(1.0, 1.2, 1.5, 0.9, 0.7, saver=[2.0, 4.0, 100.0, 3.0, 100.0])
    assert run.good == (0, 1, 3)
    found = run.spread("saver", "s")
    assert found is not None
    assert found.values == (2.0, 4.0, 3.0)


def test_a_contender_that_strays_is_still_counted() -> None:
    found = run_of(1.0, 1.0, 1.0, saver=[1.0, 9.0, 1.0]).spread("saver", "s")
    assert found is not None
    assert found.high == 9.0


def test_a_reference_may_stray_by_the_limit_and_no_more() -> None:
    rounds = [{"copy": {"s": value}} for value in (1.0, 1.25, 1.0, 1.26, 1.0)]
    assert good_rounds(rounds, COPY, max_noise=0.25) == (0, 1, 2, 4)


def test_every_reference_has_a_say() -> None:
    rounds = [{"copy": {"s": 1.0}, "write": {"s": value}} for value in (1.0, 1.0, 9.0)]
    assert good_rounds(rounds, (*COPY, ("write", "s")), max_noise=0.25) == (0, 1)


def test_a_run_with_too_few_still_rounds_is_too_noisy() -> None:
    assert run_of(1.0, 1.0, 2.0).is_too_noisy
    assert "too noisy: 2 of 3" in run_of(1.0, 1.0, 2.0).verdict
    assert not run_of(1.0, 1.0, 1.0).is_too_noisy


def test_a_run_that_its_time_limit_has_cut_short_is_content_with_three_rounds_and_says_so() -> None:
    def cut(*copies: float) -> Run:
        rules = Rules(num_rounds=5, max_noise=0.25)
        return Run(rounds=tuple({"copy": {"s": copy}} for copy in copies), references=COPY, rules=rules)

    assert not cut(1.0, 1.0, 1.0).is_too_noisy
    assert cut(1.0, 1.0, 1.0).verdict.endswith("cut short by its time limit")
    assert cut(1.0, 1.0, 9.0).is_too_noisy
    assert cut(*[1.0] * 4, *[9.0] * 3, *[0.1] * 3).is_too_noisy
    assert "cut short" not in cut(*[1.0] * 5).verdict


def test_no_round_begins_after_the_time_limit_but_the_first() -> None:
    cells = {"copy": counting(1.0)}
    run = interleave(cells, team=Alone(), rules=Rules(num_rounds=4, limit_s=0.0))  # type: ignore[arg-type]
    assert len(run.rounds) == 1


def test_a_ratio_pairs_what_was_measured_in_the_same_round() -> None:
    run = run_of(1.0, 1.0, 1.0, saver=[2.0, 20.0, 4.0], raw=[1.0, 10.0, 1.0])
    found = run.ratio("saver", "s", ("raw", "s"))
    assert found is not None
    assert found.values == (2.0, 2.0, 4.0)


def test_the_best_ceiling_is_the_least_that_is_above_nothing() -> None:
    run = run_of(1.0, 1.0, 1.0, slow=[3.0] * 3, quick=[2.0] * 3, impossible=[-1.0] * 3)
    candidates = [(name, "s") for name in ("slow", "quick", "impossible", "absent")]
    assert run.best(candidates) == ("quick", "s")
    assert run.best([("impossible", "s"), ("absent", "s")]) is None


def test_rounds_go_on_until_enough_are_still() -> None:
    cells = {"copy": counting(1.0, 5.0, 1.0, 1.0), "saver": counting(2.0)}
    run = interleave(cells, team=Alone(), rules=RULES, references=COPY)  # type: ignore[arg-type]
    assert len(run.rounds) == 4
    assert not run.is_too_noisy


def test_rounds_end_at_twice_as_many() -> None:
    cells = {"copy": counting(1.0, 2.0, 4.0)}
    run = interleave(cells, team=Alone(), rules=RULES, references=COPY)  # type: ignore[arg-type]
    assert len(run.rounds) == 2 * RULES.num_rounds
    assert run.is_too_noisy


def test_the_order_is_drawn_anew_each_round_and_again_from_the_same_seed() -> None:
    def orders(seed: int) -> list[str]:
        seen: list[str] = []

        def cell(name: str) -> Cell:
            def measure() -> Mapping[str, float]:
                seen.append(name)
                return {"s": 1.0}

            return measure

        cells = {name: cell(name) for name in "abcdef"}
        interleave(cells, team=Alone(), rules=Rules(num_rounds=4, seed=seed))  # type: ignore[arg-type]
        return ["".join(seen[i : i + 6]) for i in range(0, 24, 6)]

    assert all(sorted(order) == list("abcdef") for order in orders(0))
    assert len(set(orders(0))) > 1
    assert orders(0) == orders(0) != orders(1)


class Unusual(BaseException):
    """As some peers raise it: no Exception."""


@pytest.mark.parametrize("kind", [ValueError, Unusual])
def test_a_contender_that_raises_is_out_and_its_error_kept(kind: type[BaseException]) -> None:
    calls = []

    def failing() -> Mapping[str, float]:
        calls.append(1)
        raise kind("no room")

    run = interleave({"a": failing, "copy": counting(1.0)}, team=Alone(), rules=RULES, references=COPY)  # type: ignore[arg-type]
    assert len(calls) == 1
    assert run.failed == {"a": f"rank 0: {kind.__name__}: no room"}
    assert not run.is_too_noisy

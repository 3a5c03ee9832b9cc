from __future__ import annotations

import pytest

from benchmarks.rounds import Rules, Run
from benchmarks.targets import Column, Verdict, brief, judge


def run_of(**values: float) -> Run:
    rounds = [{name.replace("_", " "): {"s": value} for name, value in values.items()}] * 3
    return Run(rounds=tuple(rounds), references=(), rules=Rules(num_rounds=3))


def judged(run: Run, column: Column, *, own: tuple[str, ...] = ("distckpt",), limits: tuple[str, ...] = ("raw",)):
    names = list(run.rounds[0])
    return judge(run, [column], own=own, names=names, limits=limits)


AGAINST_RAW = Column(title="s", measure="s", ceiling=[("raw", "s")], target=1.2, aim=1.05)


@pytest.mark.parametrize(("seconds", "word"), [(1.0, "aim reached"), (1.1, "reached"), (1.3, "BEHIND")])
def test_a_target_is_missed_reached_or_more_than_reached(seconds: float, word: str) -> None:
    [verdict] = judged(run_of(raw=1.0, distckpt=seconds), AGAINST_RAW)
    assert (verdict.word, verdict.ratio) == (word, seconds)


@pytest.mark.parametrize(("peer", "place"), [(2.0, "ahead"), (1.01, "level"), (0.99, "level"), (0.5, "behind")])
def test_the_best_peer_is_the_quickest_that_is_neither_a_limit_nor_distckpt(peer: float, place: str) -> None:
    run = run_of(raw=0.1, distckpt=1.0, distckpt_load=0.01, peer=peer, slow=9.0)
    [verdict] = judged(run, AGAINST_RAW)
    assert (verdict.best_peer, verdict.place) == ("peer", place)
    assert verdict.against_peer == 1 / peer


def test_without_a_peer_there_is_no_place() -> None:
    [verdict] = judged(run_of(raw=1.0, distckpt=1.0), AGAINST_RAW)
    assert (verdict.best_peer, verdict.place) == (None, "")
    assert verdict.line.endswith("aim reached")


def test_without_a_ceiling_the_value_itself_is_compared() -> None:
    column = Column(title="bytes", measure="s", target=1000, figure="bytes on the wire")
    [verdict] = judged(run_of(distckpt=8712.0), column)
    assert verdict.line == "target  distckpt, bytes on the wire: 8,712 of at most 1,000: BEHIND"


def test_a_column_may_be_for_one_contender_alone() -> None:
    column = Column(title="s", measure="s", ceiling=[("raw", "s")], target=1.5, of=["distckpt prewarmed"])
    verdicts = judged(run_of(raw=1.0, distckpt=9.0, distckpt_prewarmed=1.0), column)
    assert [verdict.contender for verdict in verdicts] == ["distckpt prewarmed"]


def test_a_contender_without_the_measure_is_not_judged_by_it() -> None:
    run = run_of(raw=1.0, distckpt=1.0, distckpt_load=1.0)
    column = Column(title="t", measure="t", target=1.0)
    assert judged(run, column, own=("distckpt", "distckpt load")) == []


def test_a_run_that_was_too_noisy_has_targets_but_no_number() -> None:
    run = Run(rounds=run_of(raw=1.0, distckpt=1.0).rounds[:1], references=(), rules=Rules(num_rounds=3))
    assert run.is_too_noisy
    [verdict] = judged(run, AGAINST_RAW)
    assert (verdict.value, verdict.ratio, verdict.word) == (None, None, "no number")


def test_a_verdict_survives_its_way_through_json() -> None:
    [verdict] = judged(run_of(raw=1.0, distckpt=1.1, peer=2.0), AGAINST_RAW)
    assert Verdict.from_json(verdict.to_json()) == verdict


@pytest.mark.parametrize(("value", "text"), [(8712.4, "8,712"), (1.0113, "1.011"), (0.0725, "0.0725"), (21.84, "21.8")])
def test_a_number_has_the_digits_that_count(value: float, text: str) -> None:
    assert brief(value) == text

"""Whatever dies and whenever, every rank restores a whole checkpoint, none older than the last acknowledged one.

A sample of the states that crashes leave runs every time; all of them by

    python -m pytest -m slow -s -o faulthandler_timeout=0 tests/crash

What fails prints its seed, its operations, and the command that replays it alone.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import readers
import writers
from crashes import FULL_LIMIT, MODELS, Counts, Scenario, run, scenarios
from runs import silenced

from distckpt.manifest import Layout

SEED = 20_000
NAMES = [scenario.name for scenario in scenarios()]
PAIRS = list(writers.rivals())
FAILED_BEFORE = [
    ("both-clean-up", "s3", "stands, 14 -1, 1000000000"),
    ("both-clean-up", "s3", "stands, 30 -1, 1000000000"),
    ("both-clean-up", "disk", "stands, 433 143, 270"),
    ("both-start", "disk", "stands, 92 126 130 -1, 301"),
    ("both-start", "disk", "stands, 100 76, 454"),
    ("both-start", "disk", "stands, 99 104 142, 388"),
]
LIMITED = {("both-clean-up", "bucket")}  # a deletion there knows no condition: see `test_limits.py`


def named(name: str, layout: Layout, *, first: int = 0) -> Scenario:
    return next(scenario for scenario in scenarios(layout, first=first) if scenario.name == name)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_a_crash_loses_nothing(name: str, model: str) -> None:
    layout: Layout = "full" if (len(name) + len(model)) % 3 == 0 else "sharded"
    with silenced():
        counts = run(named(name, layout), model, seed=SEED, sample=8, nested=1)
    assert counts.checked >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("layout", ["sharded", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_no_crash_loses_anything(name: str, layout: Layout, first: int, model: str) -> None:
    with silenced():
        counts = run(named(name, layout, first=first), model, seed=SEED + first, nested=40, limit=FULL_LIMIT)
    print(f"\n{name}, {layout}, rank {first} ahead, {model}: {told(counts)}")
    assert counts.distinct >= 2


def told(counts: Counts) -> str:
    return f"{counts.replayed:,} states replayed, {counts.distinct:,} of them distinct, {counts.checked:,} checks"


@pytest.mark.parametrize("heal", [False, True], ids=["reads", "heals"])
@pytest.mark.parametrize("model", ["disk-kill", "bucket-kill"])
def test_readers_never_see_an_owner_at_work(model: str, heal: bool) -> None:
    with silenced():
        assert readers.run(MODELS[model][1], seed=SEED, sample=60, heal=heal) > 10


@pytest.mark.slow
@pytest.mark.parametrize("heal", [False, True], ids=["reads", "heals"])
@pytest.mark.parametrize("model", ["disk-kill", "bucket-kill"])
def test_no_reader_ever_sees_an_owner_at_work(model: str, heal: bool) -> None:
    with silenced():
        num_checked = readers.run(MODELS[model][1], seed=SEED, heal=heal)
    print(f"\nreaders, {model}, {'healing' if heal else 'reading'}: {num_checked:,} moments")


@pytest.mark.parametrize("place", writers.PLACES)
@pytest.mark.parametrize("name", PAIRS)
def test_of_two_writers_one_has_the_directory_and_the_other_is_told_who(name: str, place: str) -> None:
    with silenced():
        assert writers.run(name, place, seed=SEED, sample=8) == 8


@pytest.mark.parametrize(("name", "place", "order"), FAILED_BEFORE)
def test_an_order_of_two_writers_that_lost_something_before_loses_nothing(name: str, place: str, order: str) -> None:
    with silenced():
        assert writers.run(name, place, seed=SEED, only=[writers.Order.of(order)]) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "place"), [pair for pair in product(PAIRS, writers.PLACES) if pair not in LIMITED])
def test_wherever_a_writer_stands_still_the_other_one_loses_nothing(name: str, place: str) -> None:
    with silenced():
        num_checked = writers.run(name, place, seed=SEED)
    print(f"\n{name}, {place}: {num_checked:,} orders of two writers")


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_crash_of_another_number_of_ranks_loses_nothing(world_size: int) -> None:
    scenario = named("later-save", "sharded")
    resized = replace(scenario, job=replace(scenario.job, world_size=world_size))
    with silenced():
        run(resized, "bucket-kill", seed=SEED, sample=15)

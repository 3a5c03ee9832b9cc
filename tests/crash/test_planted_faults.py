"""The crash tests find what they are for: each fault that is planted into the protocol makes them fail."""

from __future__ import annotations

import re

import pytest
import readers
import writers
from crashes import MODELS, run
from planted import PLANTED, Place
from runs import silenced
from test_crashes import named

PLACES = [(fault, place) for fault, (_, places) in PLANTED.items() for place in places]

MOST_ORDERS = 1_000


def test_there_are_faults_enough() -> None:
    assert len(PLANTED) >= 10


@pytest.mark.parametrize(("fault", "place"), PLACES, ids=["-".join((fault, *place[:2])) for fault, place in PLACES])
def test_a_planted_fault_is_found(fault: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, _ = PLANTED[fault]
    plant(monkeypatch)
    with silenced(), pytest.raises(AssertionError) as found:
        search(*place)
    mistaken = re.search(r"\b(Type|Attribute|Name|Import)Error", str(found.value))
    assert not mistaken, f"the fault is planted in a wrong way: {found.value}"


def search(scenario: str, model: str, order: str | None = None) -> None:
    if scenario == "reader":
        readers.run(MODELS[model][1], seed=1)
    elif model in writers.PLACES:
        if order is not None:  # one that has found it, to save the search
            writers.run(scenario, model, seed=1, only=[writers.Order.of(order)])
            pytest.fail(
                f"{order!r} finds it no more: leave it out in planted.py, and note the order that is then named"
            )
        writers.run(scenario, model, seed=1, sample=MOST_ORDERS)
    else:
        run(named(scenario, "sharded"), model, seed=1)

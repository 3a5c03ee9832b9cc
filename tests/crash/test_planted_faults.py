"""The crash tests find what they are for: each fault that is planted into the protocol makes them fail."""

from __future__ import annotations

import re

import pytest
import readers
from crashes import MODELS, run
from planted import PLANTED
from runs import silenced
from test_crashes import named

PLACES = [(fault, *place) for fault, (_, places) in PLANTED.items() for place in places]


def test_there_are_faults_enough() -> None:
    assert len(PLANTED) >= 10


@pytest.mark.parametrize(("fault", "scenario", "model"), PLACES)
def test_a_planted_fault_is_found(fault: str, scenario: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, _ = PLANTED[fault]
    plant(monkeypatch)
    with silenced(), pytest.raises(AssertionError) as found:
        search(scenario, model)
    mistaken = re.search(r"\b(Type|Attribute|Name|Import)Error", str(found.value))
    assert not mistaken, f"the fault is planted in a wrong way: {found.value}"


def search(scenario: str, model: str) -> None:
    if scenario == "reader":
        readers.run(MODELS[model][1], seed=1)
    else:
        run(named(scenario, "sharded"), model, seed=1)

"""What a rank has told rank 0 is told again by its fingerprint, once rank 0 is sure to have it."""

from __future__ import annotations

import pytest

from distckpt.errors import UsageError
from distckpt.workspace import Told


def test_what_rank_0_has_read_is_told_by_its_fingerprint() -> None:
    teller, hearer = Told(), Told()
    first = teller.packed("blocks", "f" * 32, lambda: [1, 2])
    known = hearer.unpacked(3, "blocks", first)
    teller.settle()
    again = teller.packed("blocks", "f" * 32, lambda: [1, 2])
    assert again == ["f" * 16]
    assert hearer.unpacked(3, "blocks", again) is known


def test_what_has_changed_is_told_again_and_the_rest_within_it_is_not() -> None:
    teller, hearer = Told(), Told()

    def said(outer: str, inner: str, value: int) -> list[object]:
        return teller.packed("all", outer, lambda: teller.packed("part", inner, lambda: value))

    def heard(message: list[object]) -> int:
        return hearer.unpacked(1, "all", message, lambda body: hearer.unpacked(1, "part", body))

    assert heard(said("a", "p", 5)) == 5
    teller.settle()
    assert said("b", "p", 5) == ["b", ["p"]]
    assert heard(["b", ["p"]]) == 5


def test_what_a_save_that_failed_has_told_is_told_again() -> None:
    teller, hearer = Told(), Told()
    teller.packed("tree of gone", "f", lambda: 1)  # never read by rank 0
    teller.unsettle()
    teller.packed("blocks", "b", lambda: 2)
    teller.settle()
    message = teller.packed("tree of gone", "f", lambda: 1)
    assert hearer.unpacked(1, "tree of gone", message) == 1


def test_a_rank_that_takes_for_known_what_is_not_is_named() -> None:
    with pytest.raises(UsageError, match="rank 2 has told rank 0 nothing of its 'blocks'"):
        Told().unpacked(2, "blocks", ["f"])

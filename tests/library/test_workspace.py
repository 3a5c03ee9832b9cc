"""What one save leaves for the next: rank 0 is told only what it does not know."""

import pytest

from distckpt.errors import UsageError
from distckpt.values import Json
from distckpt.workspace import Told

FIRST, SECOND = "a" * 16, "b" * 16


def packed(rank: Told, fingerprint: str) -> Json:
    return rank.packed("state", fingerprint, lambda: {"is": fingerprint})


def test_what_rank_0_knows_is_not_sent_again():
    rank, rank_0 = Told(), Told()
    whole = packed(rank, FIRST)
    assert rank_0.unpacked(1, "state", whole) == {"is": FIRST}
    rank.settle()
    again = packed(rank, FIRST)
    assert again == [FIRST]
    assert rank_0.unpacked(1, "state", again) == {"is": FIRST}


def test_a_save_that_failed_may_have_told_rank_0_something_else():
    rank, rank_0 = Told(), Told()
    rank_0.unpacked(1, "state", packed(rank, FIRST))
    rank.settle()
    rank_0.unpacked(1, "state", packed(rank, SECOND))  # and then the save fails
    assert rank_0.unpacked(1, "state", packed(rank, FIRST)) == {"is": FIRST}


def test_what_rank_0_was_never_told_is_refused():
    with pytest.raises(UsageError, match="rank 1 has told rank 0 nothing of its 'state'"):
        Told().unpacked(1, "state", [FIRST])

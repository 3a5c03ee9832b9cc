"""Ranks that find a part of the store for themselves, whatever those before them have left in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch.distributed as dist

from distckpt.errors import RankTimeoutError
from distckpt.freshstore import fresh_place

NUM_RANKS = 4


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(NUM_RANKS) as executor:
        yield executor


def meet(
    threads: ThreadPoolExecutor, server: dist.TCPStore, ranks: list[int], *, world_size: int, timeout_s: float = 60.0
) -> list[Future[str]]:
    """Let ranks look for a place, each on a connection of its own, as if in a process of its own."""

    def find(rank: int) -> str:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        return fresh_place(client, rank=rank, world_size=world_size, timeout_s=timeout_s)

    return [threads.submit(find, rank) for rank in ranks]


def test_each_start_of_the_ranks_has_a_place_of_its_own(server: dist.TCPStore, threads: ThreadPoolExecutor) -> None:
    places = []
    for world_size in (4, 4, 2, 3, 4):
        found = {future.result() for future in meet(threads, server, list(range(world_size)), world_size=world_size)}
        assert len(found) == 1
        places += found
    assert len(set(places)) == 5


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_in_which_ranks_come_does_not_matter(
    server: dist.TCPStore, threads: ThreadPoolExecutor, order: tuple[int, ...]
) -> None:
    assert len({future.result() for future in meet(threads, server, list(order), world_size=3)}) == 1


def test_what_a_start_that_never_was_complete_has_left_misleads_nobody(
    server: dist.TCPStore, threads: ThreadPoolExecutor
) -> None:
    early = meet(threads, server, [1, 2], world_size=3, timeout_s=0.5)
    for future in early:
        with pytest.raises(RankTimeoutError, match="rank 0 did not arrive"):
            future.result()
    [lonely] = meet(threads, server, [0], world_size=3, timeout_s=0.5)
    with pytest.raises(RankTimeoutError, match="ranks 1, 2 did not arrive"):
        lonely.result()
    assert len({future.result() for future in meet(threads, server, [0, 1, 2], world_size=3)}) == 1

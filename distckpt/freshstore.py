"""A part of the job's store that nobody has used before, for ranks that have just been started.

Torchrun's agents keep one store for all starts of a job, and say to no process which start is its own: restarts are
counted by each agent for itself, and not at all where a node has joined. What the ranks of an earlier start said stays
in there, and would be taken for words of now: addresses of processes that are dead, verdicts on other saves.
So ranks find each other by names that are made up anew in each process, and rank 0 tells them where to go on.
Invariant: no rank goes on in a place that a process of an earlier start has written to.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from distckpt.errors import RankTimeoutError

ACTION = "meeting of the ranks"
_PAUSE_S = 0.005
_MOST_PAUSE_S = 0.1


def is_needed() -> bool:
    """Say whether the job's store may be one that was there before this process's start.

    Ranks: any.
    """
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def fresh_place(store: dist.distributed_c10d.Store, *, rank: int, world_size: int, timeout_s: float) -> str:
    """Return a prefix in the store that this start of the ranks has for itself, the same on all of them.

    Args:
        store: What all ranks of this start, and perhaps dead ones, are connected to.
        rank: This rank.
        world_size: The number of ranks.
        timeout_s: How long to wait for the others.

    Raises:
        RankTimeoutError: Ranks did not come; names them.

    Ranks: all (collective); rank 0 blocks until all have come, the others until rank 0 has.
    """
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        place = f"start-{uuid.uuid4().hex}"
        _welcome(store, place, set(range(1, world_size)), deadline, timeout_s)
        return place
    name = uuid.uuid4().hex
    store.set(f"hello/{rank}", name)
    try:
        store.wait([f"welcome/{name}"], timedelta(seconds=timeout_s))
    except dist.DistStoreError:
        raise RankTimeoutError(action=ACTION, missing=[0], timeout_s=timeout_s) from None
    place = store.get(f"welcome/{name}").decode()
    store.delete_key(f"welcome/{name}")
    store.set(f"{place}/here/{rank}", "")
    return place


def _welcome(
    store: dist.distributed_c10d.Store, place: str, missing: set[int], deadline: float, timeout_s: float
) -> None:
    """Rank 0: tell every name that ranks go by where to go on, until each rank is there."""
    told: dict[int, str] = {}
    pause_s = _PAUSE_S
    while missing:
        for rank in sorted(missing):
            if store.check([f"{place}/here/{rank}"]):
                missing.discard(rank)
            elif store.check([f"hello/{rank}"]):
                name = store.get(f"hello/{rank}").decode()
                if told.get(rank) != name:  # the first one may be that of a process that is dead
                    told[rank] = name
                    store.set(f"welcome/{name}", place)
        if missing and time.monotonic() > deadline:
            raise RankTimeoutError(action=ACTION, missing=sorted(missing), timeout_s=timeout_s)
        if missing:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)

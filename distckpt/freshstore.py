"""A part of the job's store that nobody has used before, for ranks that have just been started.

Torchrun's agents keep one store for all starts of a job, and say to no process which start is its own: restarts are
counted by each agent for itself, and not at all where a node has joined. What the ranks of an earlier start said stays
in there, and would be taken for words of now: addresses of processes that are dead, verdicts on other saves.
So ranks find each other by names that are made up anew in each process, and rank 0 tells them where to go on.
Invariant: no rank goes on in a place that a process of an earlier start has written to.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from distckpt.errors import RankTimeoutError

ACTION = "meeting of the ranks"
_GRACE_S = 2.0  # how much longer than rank 0 the others wait
_PAUSE_S = 0.005
_MOST_PAUSE_S = 0.1


def is_needed() -> bool:
    """Say whether the job's store may be one that was there before this process's start.

    Ranks: any.
    """
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def root(store: dist.distributed_c10d.Store) -> dist.distributed_c10d.Store:
    """Return the store below all prefixes.

    Ranks: any.
    """
    while isinstance(store, dist.distributed_c10d.PrefixStore):
        store = store.underlying_store
    return store


def short_place(root: dist.distributed_c10d.Store) -> str:
    """Return a prefix for the store below all prefixes that nobody else has been given; of a few characters.

    Ranks: any.
    """
    return f"dc{root.add('distckpt', 1)}"


def fresh_place(store: dist.distributed_c10d.Store, *, rank: int, world_size: int, timeout_s: float) -> str:
    """Return a prefix in the store that this start of the ranks has for itself, the same on all of them.

    Args:
        store: What all ranks of this start, and perhaps dead ones, are connected to.
        rank: This rank.
        world_size: The number of ranks.
        timeout_s: How long to wait for the others.

    Raises:
        RankTimeoutError: Ranks did not come; names them.

    Ranks: all (collective); blocks until all have come.
    """
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        place = f"start-{uuid.uuid4().hex}"
        missing = _welcome(store, place, set(range(1, world_size)), deadline)
        store.set(f"{place}/missing", json.dumps(missing))
    else:
        name = uuid.uuid4().hex
        store.set(f"hello/{rank}", name)
        place = _awaited(store, f"welcome/{name}", deadline, timeout_s)
        store.delete_key(f"welcome/{name}")
        store.set(f"{place}/here/{rank}", "")
        # Rank 0 knows who is missing, but only when its own time is up.
        missing = json.loads(_awaited(store, f"{place}/missing", deadline + _GRACE_S, timeout_s))
    if missing:
        raise RankTimeoutError(action=ACTION, missing=missing, timeout_s=timeout_s)
    return place


def _awaited(store: dist.distributed_c10d.Store, key: str, deadline: float, timeout_s: float) -> str:
    """Return what rank 0 sets under a key."""
    try:
        store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
    except dist.DistStoreError:
        raise RankTimeoutError(action=ACTION, missing=[0], timeout_s=timeout_s) from None
    return str(store.get(key).decode())


def _welcome(store: dist.distributed_c10d.Store, place: str, missing: set[int], deadline: float) -> list[int]:
    """Rank 0: tell every name that ranks go by where to go on, until each rank is there; return who did not come."""
    told: dict[int, str] = {}
    pause_s = _PAUSE_S
    while True:
        for rank in sorted(missing):
            if store.check([f"{place}/here/{rank}"]):
                missing.discard(rank)
            elif store.check([f"hello/{rank}"]):
                name = store.get(f"hello/{rank}").decode()
                if told.get(rank) != name:  # the first one may be that of a process that is dead
                    told[rank] = name
                    store.set(f"welcome/{name}", place)
        if not missing or time.monotonic() > deadline:
            return sorted(missing)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _MOST_PAUSE_S)

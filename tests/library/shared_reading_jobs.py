"""What ranks run in the tests of reading together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from distckpt import CheckpointManager
from distckpt.storage import CountingStorage, open_storage


def build() -> dict[str, Any]:
    torch.manual_seed(1)
    return {"large": torch.randn(3_000_000), "small": [torch.randn(10) for _ in range(20)], "rank": dist.get_rank()}


def save(url: str, options: dict[str, Any]) -> None:
    with CheckpointManager(url, storage_options=options, signals=()) as ckpt:
        ckpt.save(1, build())


def restore(url: str, options: dict[str, Any], only: list[str], again: bool) -> dict[str, Any]:
    """Restore, and return how many bytes this rank has read from the storage, and whether all is there."""
    storage = CountingStorage(open_storage(url, storage_options=options))
    state = {"large": torch.zeros(3_000_000), "small": [torch.zeros(10) for _ in range(20)], "rank": -1}
    with CheckpointManager(url, storage_options=options, signals=()) as ckpt:
        if again:
            ckpt.restore(dict(state))
        ckpt._home.storage = storage
        ckpt.restore(state, only=only)
    expected = build()
    good = torch.equal(state["large"], expected["large"])
    if not only:
        good = good and all(map(torch.equal, state["small"], expected["small"])) and state["rank"] == _saved_rank()
    return {"good": good, "num_bytes": storage.counted("read").num_bytes}


def _saved_rank() -> int:
    """Return what this rank takes of what two ranks saved: its own, or rank 0's."""
    return dist.get_rank() if dist.get_rank() < 2 else 0

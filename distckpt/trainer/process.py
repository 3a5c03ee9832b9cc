"""This process among the ranks of the training: its number, its device, its process group.

Invariant: a process group that was made here is destroyed here; one that was there before is left alone.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from distckpt import freshstore
from distckpt.errors import ConfigError
from distckpt.trainer.order import derive_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One rank of the training.

    Attributes:
        rank: This rank.
        world_size: The number of ranks.
        local_rank: This rank among those of its host.
        device: Where this rank computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone logs."""
        return self.rank == 0


@contextmanager
def joined(*, timeout_s: float) -> Iterator[Process]:
    """Give this process its place among the ranks: NCCL on GPUs, gloo on CPUs; alone without torchrun.

    Args:
        timeout_s: How long ranks wait for each other, here and in each step.

    Raises:
        ConfigError: There are more ranks on this host than GPUs.
        RankTimeoutError: Ranks did not come.

    Ranks: all (collective); blocks until every rank has joined.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            source="torchrun",
            problem=f"local rank {local_rank} has no GPU of its own; this host has {torch.cuda.device_count()}",
            fix=f"torchrun --nproc_per_node={torch.cuda.device_count()} ...",
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    ours = not dist.is_initialized() and "WORLD_SIZE" in os.environ
    if ours:
        _make_group("nccl" if cuda else "gloo", device if cuda else None, timeout_s)
    try:
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
            yield Process(rank=rank, world_size=world_size, local_rank=local_rank, device=device)
        else:
            yield Process(rank=0, world_size=1, local_rank=0, device=device)
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()


def _make_group(backend: str, device: torch.device | None, timeout_s: float) -> None:
    """Make the process group; where torchrun keeps the ranks' store over restarts, in a part of it that is new."""
    timeout = timedelta(seconds=timeout_s)
    if not freshstore.is_needed():
        dist.init_process_group(backend, timeout=timeout, device_id=device)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    meeting = dist.PrefixStore("distckpt", kept)  # type: ignore[attr-defined]
    place = freshstore.fresh_place(meeting, rank=rank, world_size=world_size, timeout_s=timeout_s)
    store = dist.PrefixStore(place, kept)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Refuse kernels that may differ from run to run, while the context lasts; nothing if not wanted.

    Ranks: any.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix is multiplied
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def seed_everything(*parts: int | str) -> None:
    """Seed Python, NumPy and torch (CPU and GPUs) from all parts together.

    Ranks: any.
    """
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)

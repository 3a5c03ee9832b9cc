"""What ranks run in the test of torchdata's loader: top-level functions, sent by name."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import distckpt

SAMPLES, BATCH, STEPS = 40, 4, 17


def epochs(loader: StatefulDataLoader, sampler: DistributedSampler, place: dict[str, int]):  # type: ignore[type-arg]
    while True:
        sampler.set_epoch(place["epoch"])
        yield from loader
        place["epoch"] += 1


def see(directory: str, *, until: int, workers: int) -> list[int]:
    """Go through the samples from where the last call ended, and return those of this one."""
    warnings.simplefilter("ignore")  # torchdata's use of what torch has deprecated
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    dataset = torch.arange(SAMPLES)
    sampler = DistributedSampler(dataset, num_replicas=world, rank=rank)  # type: ignore[arg-type]
    loader = StatefulDataLoader(dataset, batch_size=BATCH, sampler=sampler, num_workers=workers)  # type: ignore[arg-type]
    place = {"epoch": 0}
    state = {"place": place, "data": distckpt.PerRank(loader)}
    seen: list[int] = []
    with distckpt.CheckpointManager(directory, every=100) as manager:
        batches = None
        for _ in manager.steps(state, until=until):
            batches = batches or epochs(loader, sampler, place)
            seen += next(batches).tolist()
    return seen

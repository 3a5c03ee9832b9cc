"""Contenders that save while training waits, and load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from benchmarks.ceilings import NUM_THREADS
from benchmarks.contenders.dcp import Dcp
from benchmarks.contenders.libraries import TorchCheckpointing, Torchsnapshot
from benchmarks.contenders.opening import opened
from benchmarks.contenders.ours import Distckpt
from benchmarks.contenders.plain_files import Accelerate, LightningFabric, Safetensors, TorchSave
from benchmarks.states import State
from benchmarks.team import Team


class Saver(Protocol):
    """Saves and loads one state, on all ranks together; is made outside of what is timed."""

    def save(self, path: Path) -> None:
        """Save to a path that is new; every byte is durable when this returns."""

    def load(self, path: Path) -> None:
        """Load all of what `save` wrote into the state."""

    def other_loads(self) -> Mapping[str, Callable[[Path], object]]:
        """Return other ways to load the same, by the name under which they are measured."""

    def close(self) -> None:
        """Give back what it holds."""


SAVERS: Mapping[str, Callable[[State, Team], Saver]] = {
    "distckpt": Distckpt,
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "Lightning Fabric": LightningFabric,
    "Accelerate": Accelerate,
    "DCP": Dcp,
    "DCP, plan cache and threads": partial(Dcp, tuned=True),
    "torchsnapshot": Torchsnapshot,
    "torch_checkpointing": partial(TorchCheckpointing, direct=True),
    "torch_checkpointing, buffered": TorchCheckpointing,
    "torch_checkpointing, buffered, threads": partial(TorchCheckpointing, num_writers=NUM_THREADS),
}


def open_savers(state: State, team: Team, only: list[str] | None = None) -> tuple[dict[str, Saver], dict[str, str]]:
    """Return the savers, and why each of the others is not there.

    Args:
        state: What they save.
        team: The ranks.
        only: The names of the only ones wanted; None is all.
    """
    return opened(SAVERS, state, team, only)

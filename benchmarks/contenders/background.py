"""Contenders that save in the background: training waits for the start, and goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from benchmarks.contenders.dcp import DcpAsync
from benchmarks.contenders.libraries import TorchCheckpointingAsync, TorchsnapshotAsync
from benchmarks.contenders.opening import opened
from benchmarks.contenders.ours import DistckptInBackground, RawCopyAndWrite
from benchmarks.contenders.plain_files import LightningAsync, TorchSaveOnAThread
from benchmarks.states import State
from benchmarks.team import Team


class BackgroundSaver(Protocol):
    """Saves one state, on all ranks together; is made outside of what is timed, and then has saved nothing yet."""

    def prepare(self, directory: Path) -> None:
        """Do what a job does before its training begins; checkpoints will stand in `directory`, which is there."""

    def start(self, path: Path) -> None:
        """Begin a save to a path that is new; when this returns, training may go on."""

    def finish(self) -> None:
        """Return once what was begun is durable; called on another thread."""

    def close(self) -> None:
        """Give back what it holds."""


Maker = Callable[[State, Team], BackgroundSaver]

RAW = "raw copy and direct write"
BACKGROUND_SAVERS: Mapping[str, Maker] = {
    RAW: RawCopyAndWrite,
    "distckpt": DistckptInBackground,
    "distckpt, no overlap": partial(DistckptInBackground, overlap=False),
    "torch.save of a clone, on a thread": TorchSaveOnAThread,
    "Lightning AsyncCheckpointIO": LightningAsync,
    "DCP async": DcpAsync,
    "DCP async, kept stager, plan cache, threads": partial(DcpAsync, tuned=True),
    "DCP async, the same in a process": partial(DcpAsync, tuned=True, process=True),
    "torchsnapshot": TorchsnapshotAsync,
    "torch_checkpointing": TorchCheckpointingAsync,
    "torch_checkpointing, staging in the background": partial(TorchCheckpointingAsync, background_staging=True),
}
# Only their first save is measured: those that follow are as above.
PREWARMED: Mapping[str, Maker] = {
    "distckpt, prewarmed": partial(DistckptInBackground, prewarm=True),
    "torch_checkpointing, prewarmed": partial(TorchCheckpointingAsync, prewarm=True),
}


def openable(
    state: State, team: Team, only: list[str] | None = None, *, makers: Mapping[str, Maker] = BACKGROUND_SAVERS
) -> tuple[dict[str, Maker], dict[str, str]]:
    """Return the makers of those that can be made here, and why each of the others cannot."""
    made, absent = opened(makers, state, team, only)
    for each in made.values():
        each.close()
    return {name: makers[name] for name in made}, absent

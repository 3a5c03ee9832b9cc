"""What ranks run in the tests of events."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch.distributed as dist

from distckpt import CheckpointManager
from distckpt.events import EventLog


def run(directory: str, *, until: int, signalled: int | None = None, options: dict[str, Any] | None = None) -> Any:
    """Run a loop of steps with callbacks on each rank; the last rank gets a signal in step `signalled`."""
    told: list[dict[str, Any]] = []
    last = dist.get_rank() == dist.get_world_size() - 1
    log = EventLog(f"{directory}/log-{dist.get_rank()}.jsonl")
    callbacks = [log, lambda event: told.append(event.to_json())]
    with CheckpointManager(directory, every=2, keep=1, timeout_s=60, callbacks=callbacks, **(options or {})) as ckpt:
        for step in ckpt.steps({"x": 1}, until=until):
            dist.barrier()
            if last and step == signalled:
                os.kill(os.getpid(), signal.SIGTERM)
        return told, ckpt.job

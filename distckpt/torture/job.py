"""One rank of the job that is tortured: a small model, trained so that its state at a step can be told beforehand.

Every batch comes from the rank's own random numbers, so a resume that misses anything, on any rank, shows in the state.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, though not in its __all__

from distckpt.checksum import digest
from distckpt.events import EventLog
from distckpt.logfolder import EVENTS_NAME
from distckpt.manager import CheckpointManager
from distckpt.manifest import Layout
from distckpt.slots import PerRank
from distckpt.torture.journal import Journal

TIMEOUT_S = 60.0
BATCH = 4
KEEP = 2
POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What each rank is told.

    Attributes:
        directory: The run's directory.
        storage_options: What fsspec's file system of it takes.
        folder: Where journals and logs go; on this machine.
        leg: Which of the job's starts this is.
        num_ranks: How many ranks there are.
        layout: Who writes.
        background: Whether to save in the background.
        seed: Of the model and the batches.
        width: The model's width; its state takes 24 bytes times the square of that.
        every: Save each so many steps.
        most_steps: Leave after so many.
        memory_tier: Whether to keep the newest checkpoint in this machine's memory.
    """

    directory: str
    storage_options: Mapping[str, Any] | None
    folder: Path
    leg: int
    num_ranks: int
    layout: Layout
    background: bool
    seed: int
    width: int
    every: int
    most_steps: int
    memory_tier: bool = False


def run_rank(task: Task, rank: int) -> None:
    """Train, save and tell the journal, until killed or done.

    Ranks: all (collective).
    """
    log = os.open(task.folder / f"leg-{task.leg}-rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here; the host's name may lead nowhere
    torch.set_num_threads(1)
    _meet(task, rank)
    torch.manual_seed(task.seed)
    model = nn.Sequential(nn.Linear(task.width, task.width), nn.Tanh(), nn.Linear(task.width, task.width))
    state: dict[str, Any] = {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=1e-3)}
    torch.manual_seed(task.seed + rank + 1)
    state["sum"] = PerRank(torch.zeros(task.width))
    with CheckpointManager(
        task.directory,
        keep=KEEP,
        layout=task.layout,
        background=task.background,
        timeout_s=TIMEOUT_S,
        storage_options=task.storage_options,
        signals=(),
        memory_tier=task.memory_tier,
        callbacks=[EventLog(task.folder / EVENTS_NAME)],
    ) as checkpoints:
        _train(task, state, checkpoints, Journal(task.folder, leg=task.leg, rank=rank))
    dist.destroy_process_group()


def _meet(task: Task, rank: int) -> None:
    """Join the other ranks, by the port that rank 0 has found free."""
    told = task.folder / f"leg-{task.leg}.port"
    timeout = timedelta(seconds=TIMEOUT_S)
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, task.num_ranks, is_master=True, timeout=timeout, wait_for_workers=False)
        fresh = told.with_suffix(".new")
        fresh.write_text(str(store.port))
        fresh.rename(told)
    else:
        deadline = time.monotonic() + TIMEOUT_S
        while not told.exists():
            if time.monotonic() > deadline:
                raise TimeoutError("rank 0 never told its port")
            time.sleep(POLL_S)
        store = TCPStore("127.0.0.1", int(told.read_text()), task.num_ranks, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=task.num_ranks, timeout=timeout)


def _train(task: Task, state: dict[str, Any], checkpoints: CheckpointManager, journal: Journal) -> None:
    done = checkpoints.restore(state)
    journal.write("resumed", done, _digest(state))
    unsaved: int | None = None
    for step in range(done + 1, done + task.most_steps + 1):
        _step(state, task.width)
        if step % task.every == 0:
            if unsaved is not None:
                checkpoints.wait()
                journal.write("saved", unsaved)
            journal.write("saving", step, _digest(state))
            checkpoints.save(step, state)
            unsaved = step
            if not task.background:
                journal.write("saved", step)
                unsaved = None
    checkpoints.wait()
    if unsaved is not None:
        journal.write("saved", unsaved)
    journal.write("ended", done + task.most_steps)


def _step(state: dict[str, Any], width: int) -> None:
    batch = torch.randn(BATCH, width)
    model, optimizer = state["model"], state["optimizer"]
    optimizer.zero_grad()
    (model(batch) - batch.roll(1, dims=1)).square().mean().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    optimizer.step()
    state["sum"].value.add_(batch.sum(0))


def _digest(state: Mapping[str, Any]) -> str:
    """Return the digest of all that a resume has to bring back on this rank."""
    tensors = {f"model.{name}": tensor for name, tensor in state["model"].state_dict().items()}
    for index, slot in state["optimizer"].state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": tensor for name, tensor in slot.items()})
    tensors["sum"], tensors["rng"] = state["sum"].value, torch.get_rng_state()
    return digest(
        json.dumps(
            [[name, digest(tensor.detach().numpy().tobytes())] for name, tensor in sorted(tensors.items())]
        ).encode()
    )

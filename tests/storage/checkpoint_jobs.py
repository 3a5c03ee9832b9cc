"""What ranks run in the tests of faults and of traffic: a job that saves twice, and one that restores."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

import distckpt
from distckpt.errors import DistckptError

KEPT, NEWEST = 1, 2


def build(step: int, num_numbers: int) -> dict[str, Any]:
    return {"weight": torch.full((num_numbers,), float(step)), "step": step}


def save(url: str, options: dict[str, Any], num_numbers: int) -> None:
    """Save two checkpoints, a small and a large one; the second makes the first superfluous."""
    with distckpt.CheckpointManager(url, keep=KEPT, background=False, storage_options=options, signals=()) as manager:
        manager.save(1, build(1, 8))
        manager.save(NEWEST, build(NEWEST, num_numbers))


def restore(url: str, options: dict[str, Any], num_numbers: int) -> int:
    """Restore into a fresh state, which must be one of those that were saved, whole; return its step, or 0."""
    state = build(0, num_numbers)
    with distckpt.CheckpointManager(url, storage_options=options, signals=()) as manager:
        step = manager.restore(state, only=["step"])
        if step == 0:
            return 0
        fresh = build(0, num_numbers if step == NEWEST else 8)
        assert manager.restore(fresh, step=step) == step
    assert state["step"] == step
    assert torch.equal(fresh["weight"], build(step, len(fresh["weight"]))["weight"])
    return step


def try_all(url: str, options: dict[str, Any], num_numbers: int) -> list[str]:
    """Save and restore; return the error of each that failed, in its own words, or ""."""
    said = []
    for work in (save, restore):
        try:
            work(url, options, num_numbers)
            said.append("")
        except DistckptError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def save_and_be_killed(url: str, options: dict[str, Any], num_numbers: int) -> None:
    """Save as above, with a memory tier, and end without a word."""
    manager = distckpt.CheckpointManager(url, keep=KEPT, memory_tier=True, storage_options=options, signals=())
    for step in (1, NEWEST):
        manager.save(step, build(step, num_numbers))
        manager.wait()
    os.kill(os.getpid(), signal.SIGKILL)


def restore_whole(url: str, options: dict[str, Any], num_numbers: int, memory_tier: bool = False) -> None:
    """Restore the newest checkpoint as a job does that starts again."""
    state = build(0, num_numbers)
    with distckpt.CheckpointManager(url, storage_options=options, memory_tier=memory_tier, signals=()) as manager:
        assert manager.restore(state) == NEWEST
    assert torch.equal(state["weight"], build(NEWEST, num_numbers)["weight"])

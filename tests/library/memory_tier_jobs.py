"""What ranks run in the tests of restarts from the memory tier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from distckpt import CheckpointManager, PerRank
from distckpt.events import Event, Restored
from distckpt.storage import CountingStorage, StepwiseStorage, open_storage

NUM_NUMBERS = 3_000_000
STATE_BYTES = 4 * (NUM_NUMBERS + 20 * 10)


def build(step: int) -> dict[str, Any]:
    """Return the state that the job has after a step."""
    torch.manual_seed(step)
    large, small = torch.randn(NUM_NUMBERS), [torch.randn(10) for _ in range(20)]
    rank = dist.get_rank() if dist.is_initialized() else 0
    return {"large": large, "small": small, "rank": PerRank(rank), "step": step}


def save_and_fail(
    url: str, options: dict[str, Any] | None, steps: list[int], settings: dict[str, Any] | None = None
) -> None:
    """Save some steps, and end as a job does that fails: it leaves the tier behind, as one that is killed does."""
    chosen = {"memory_tier": True, "storage_options": options, "signals": (), **(settings or {})}
    try:
        with CheckpointManager(url, every=1000, **chosen) as ckpt:
            for step in steps:
                ckpt.save(step, build(step))
                ckpt.wait()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return


class OpeningStorage(CountingStorage):
    """A storage that counts files that are opened, too, where it opens files."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        if isinstance(inner, StepwiseStorage):
            self.reading = self._reading

    def _reading(self, name: str) -> Any:
        self._count("read", num_calls=1)
        return self.inner.reading(name)


def restore(url: str, options: dict[str, Any] | None, memory_tier: bool = True, again: bool = False) -> dict[str, Any]:
    """Restore as a job that goes on does; return what was read from where, and whether it is all right."""
    storage = OpeningStorage(open_storage(url, storage_options=options))
    told: list[Restored] = []
    note: Callable[[Event], None] = lambda event: told.append(event) if isinstance(event, Restored) else None  # noqa: E731
    state = {**build(0), "rank": PerRank(-1)}
    try:
        with CheckpointManager(
            url, every=1000, memory_tier=memory_tier, storage_options=options, signals=(), callbacks=[note]
        ) as ckpt:
            if again:
                ckpt.restore(build(0))
            ckpt._home.storage = storage
            step = ckpt.restore(state)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    expected = build(step)
    good = torch.equal(state["large"], expected["large"]) and all(map(torch.equal, state["small"], expected["small"]))
    return {
        "step": step,
        "good": good and state["step"] == step,
        "rank": state["rank"].value,
        "reads": storage.counted("read").num_calls,
        "storage_bytes": told[-1].storage_bytes if told else None,
        "memory_bytes": told[-1].memory_bytes if told else None,
        "num_bytes": told[-1].num_bytes if told else None,
    }


def save_and_end(url: str, stop: bool) -> bool:
    """Save, and end in good order: complete, or asked to stop."""
    with CheckpointManager(url, memory_tier=True, every=1000, signals=()) as ckpt:
        ckpt.save(1, build(1))
        ckpt.wait()
        if stop:
            ckpt.step(2, build(2), stop=True)
        return ckpt.preempted

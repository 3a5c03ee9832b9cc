"""A training process that starts again, as far as its first new step; it says when it had come how far.

    python -m benchmarks.restarted DIRECTORY --how ahead

It is started by `restart`, which tells it in RESTART_BEGUN when, on the clock that all processes share.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HOWS = ("build", "plain", "ahead", "memory")
STORED = "bytes from the storage"  # of data files
_ACTIONS = {
    "restore: choosing": "find",
    "restore: checking": "match",
    "restore: reading": "read and verify",
    "restore: loading": "apply",
}


class Marks:
    """Seconds that each part has taken, from one call of `end` to the next."""

    def __init__(self) -> None:
        self._last = float(os.environ.get("RESTART_BEGUN", time.monotonic()))
        self.seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        """Count what has passed since the last call as `name`."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def main() -> int:
    """Come as far as the first step, or, with `--how build`, as far as a model; print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--how", choices=HOWS, default="plain")
    options = parser.parse_args()
    marks = Marks()
    marks.end("start Python")
    with contextlib.ExitStack() as stack:
        if options.how in ("ahead", "memory"):
            from distckpt import prefetch

            stack.enter_context(prefetch(options.directory, memory_tier=options.how == "memory"))
        import torch
        import torchvision

    marks.end("import torch")
    model = torchvision.models.get_model(options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    marks.end("build the model")
    read = {}
    if options.how != "build":
        read[STORED] = _restart(state, options.directory, marks, memory_tier=options.how == "memory")
    print(json.dumps({**marks.seconds, "total": sum(marks.seconds.values()), **read}))
    sys.stdout.flush()
    os._exit(0)  # what comes after the first step does not count, and is the same for all


def _restart(state: dict[str, Any], directory: Path, marks: Marks, *, memory_tier: bool) -> int:
    """Restore, do a step, and return how many bytes of data files came from the storage."""
    import torch
    import torch.distributed as dist

    from distckpt import CheckpointManager
    from distckpt.events import Event, Restored
    from distckpt.ranks import Ranks

    marks.end("import distckpt")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    marks.end("rendezvous")
    agree = Ranks.agree

    def noted(ranks: Ranks, action: str, *args: Any) -> Any:
        marks.end("other")
        verdict = agree(ranks, action, *args)
        marks.end(next((part for begin, part in _ACTIONS.items() if action.startswith(begin)), "other"))
        return verdict

    Ranks.agree = noted  # type: ignore[method-assign]  # the parts of a restore are what it agrees on
    restored: list[Event] = []
    manager = CheckpointManager(directory, every=1000, memory_tier=memory_tier, callbacks=[restored.append])
    step = manager.restore(state)
    marks.end("other")
    if not step:
        raise SystemExit(f"there is no checkpoint in {directory}")
    batch = torch.randn(2, 3, 32, 32)
    marks.end("first batch")
    torch.autograd.backward(state["model"](batch).square().mean())
    state["optimizer"].step()
    marks.end("first step")
    [read] = [event.storage_bytes for event in restored if isinstance(event, Restored)]
    return read


if __name__ == "__main__":
    sys.exit(main())

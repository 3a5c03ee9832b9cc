"""One of two ranks on two machines, whose link is cut in the middle of what it does; prints what came of it.

    python tests/machines/cut_link_job.py RANK HOST:PORT FOLDER PHASE

In the PHASE, "save", "commit" or "restore", both ranks say so by a file, and go on when the test has cut the link.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distckpt

TIMEOUT_S = 4.0


class Place:
    """A part of the state that stands still in its `state_dict` or `load_state_dict`, if it is told to."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.stops_at = ""
        self._folder = folder
        self._rank = rank

    def state_dict(self) -> dict[str, Any]:
        self.reach("save")
        return {"value": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reach("restore")

    def reach(self, phase: str) -> None:
        if self.stops_at == phase:
            self.stops_at = ""
            (self._folder / f"at-{self._rank}").touch()
            while not (self._folder / "cut").exists():
                time.sleep(0.01)


def main() -> None:
    rank, meeting, folder, phase = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    dist.init_process_group("gloo", init_method=f"tcp://{meeting}", rank=rank, world_size=2)
    place = Place(folder, rank)
    state = {"place": place, "weights": torch.arange(1 << 20)}
    manager = distckpt.CheckpointManager(folder / "run", timeout_s=TIMEOUT_S)
    manager.save(1, state)
    manager.wait()
    place.stops_at, error = phase, ""
    begun = time.monotonic()
    try:
        if phase == "restore":
            manager.restore(state)
        else:
            manager.save(2, state)
            place.reach("commit")
            manager.wait()
    except distckpt.errors.DistckptError as raised:
        error = f"{type(raised).__name__}: {raised}"
    print(json.dumps({"error": error, "took_s": time.monotonic() - begun}), flush=True)
    os._exit(0)  # a process group whose link is cut cannot be taken down


if __name__ == "__main__":
    main()

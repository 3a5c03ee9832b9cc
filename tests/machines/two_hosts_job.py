"""What two ranks on two machines do: each case is tried, and what came of it is printed as one line of JSON.

python tests/machines/two_hosts_job.py RANK HOST:PORT SHARED_FOLDER OWN_FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import distckpt

TIMEOUT_S = 60.0

DEAD_OWNER = """
import os, sys
from distckpt.lease import Lease
from distckpt.storage import open_storage

Lease(open_storage(sys.argv[1]), duration_s=3000.0).acquire()
os._exit(0)
"""


def state() -> dict[str, torch.Tensor]:
    return {"weights": torch.arange(4096.0)}


def save_by_manager(directory: Path, layout: distckpt.manifest.Layout) -> None:
    with distckpt.CheckpointManager(directory, layout=layout, timeout_s=TIMEOUT_S) as manager:
        manager.save(1, state())


def save_alone(directory: Path, layout: distckpt.manifest.Layout) -> None:
    distckpt.save(directory, state(), layout=layout, timeout_s=TIMEOUT_S)


def begin_run(directory: Path) -> None:
    """Restore with a manager that saves by itself, as a job does before its first step."""
    with distckpt.CheckpointManager(directory, every=10, timeout_s=TIMEOUT_S) as manager:
        manager.restore(state())


def take_over(directory: Path, rank: int) -> None:
    """Save to a directory whose owner has died, on rank 1's machine and without a word."""
    if rank == 1:
        subprocess.run([sys.executable, "-c", DEAD_OWNER, str(directory)], check=True)
    dist.barrier()
    save_by_manager(directory, "sharded")


def told(work: Callable[[], None]) -> str:
    try:
        work()
    except distckpt.errors.DistckptError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def main() -> None:
    rank, meeting = int(sys.argv[1]), sys.argv[2]
    shared, own = Path(sys.argv[3]), Path(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"tcp://{meeting}", rank=rank, world_size=2)
    found = {"own/begin": told(lambda: begin_run(own / "begin"))}
    for where, folder in {"own": own, "shared": shared}.items():
        for layout in ("sharded", "full"):
            for save in (save_by_manager, save_alone):
                name = f"{where}/{save.__name__}/{layout}"
                found[name] = told(partial(save, folder / name.replace("/", "-"), layout))
    found["shared/take_over"] = told(lambda: take_over(shared / "taken", rank))
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

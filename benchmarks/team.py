"""The ranks of a benchmark: one process, or several that torchrun starts on this machine, with gloo or NCCL.

The team meets in a group of its own: a peer that saves on a thread may use the default group at the same time.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

LONGEST_WAIT_S = 600.0  # for a rank: a peer that fails on one of them only has left the others waiting

Value = TypeVar("Value")
Backend = Literal["gloo", "nccl"]
BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}


class Team:
    """All ranks of this run. Every method is called by all of them.

    Args:
        backend: What the default process group speaks, which is the training's, and the peers'.

    Attributes:
        rank: This rank.
        world_size: The number of ranks.
    """

    def __init__(self, backend: Backend = "gloo") -> None:
        if is_rank_of_a_team():
            dist.init_process_group(BACKENDS[backend])
        else:  # alone; DCP and others want a group all the same
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                port = sock.getsockname()[1]
            dist.init_process_group(BACKENDS[backend], init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=LONGEST_WAIT_S))

    def barrier(self) -> None:
        """Return once every rank is here."""
        if self.world_size > 1:
            dist.barrier(group=self._group)

    def gather(self, value: Value) -> list[Value]:
        """Return what every rank gave, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [value] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def agree(self, value: Value) -> Value:
        """Return on every rank what rank 0 gave."""
        return self.gather(value)[0]

    def all(self, fact: bool) -> bool:
        """Say on every rank whether it is so on all; quick enough for every step of a training."""
        if self.world_size == 1:
            return fact
        flag = torch.tensor(int(fact))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        return bool(flag.item())

    def close(self) -> None:
        """End the process group."""
        dist.destroy_process_group()


def relaunch(module: str, arguments: list[str], *, num_ranks: int) -> int:
    """Run a benchmark's module on several ranks of this machine; return its exit status."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [sys.executable, *launcher, f"--nproc_per_node={num_ranks}", "-m", module, *arguments]
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    return subprocess.run(command, check=False, env=environment).returncode


def is_rank_of_a_team() -> bool:
    """Say whether torchrun has started this process."""
    return "RANK" in os.environ

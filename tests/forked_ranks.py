"""Ranks that start in a moment, for trials that kill or stop them by the hundred.

They are forked from a server that has imported torch once; the store is this process's, as it is torchrun's otherwise,
so that the others live on when one dies, as they do on other hosts. What a rank finds it tells in lines of JSON, in a
file of its own, which no kill can reach.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

POLL_S = 0.01


class Pen:
    """What a rank tells with."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._fd = os.open(folder / f"rank-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def tell(self, event: str, **facts: Any) -> None:
        """Append a line, with the moment in seconds of a clock that all processes share; SIGKILL loses none."""
        os.write(self._fd, json.dumps({"event": event, "moment": time.monotonic(), **facts}).encode() + b"\n")


class ForkedRanks:
    """Ranks that run `function(rank, pen, *args)`, in a process group with gloo; none outlives the context.

    Args:
        num_ranks: How many.
        folder: Where they tell, and where their output goes; an empty one.
        function: A top-level function.
        args: What it takes.
        joins: Whether to make the process group; without it the function finds torchrun's environment.
    """

    def __init__(
        self, num_ranks: int, folder: Path, function: Callable[..., None], *args: Any, joins: bool = True
    ) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, though not in __all__

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["distckpt.trainer", __name__])
        # The name of its module would otherwise be looked for where the server was started.
        target = (function.__module__, function.__qualname__, [*sys.path])
        self.processes: list[BaseProcess] = [
            context.Process(target=_live, args=(rank, num_ranks, self._store.port, folder, joins, target, args))
            for rank in range(num_ranks)
        ]

    def __enter__(self) -> Self:
        # When a wait has been in vain, torch tells its log the peer's name, and asks a name server for it. If that does
        # not answer, it takes five seconds more: the server that the ranks are forked from starts without that log.
        before = os.environ.get("TORCH_CPP_LOG_LEVEL")
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        try:
            for process in self.processes:
                process.start()
        except BaseException:
            self.kill()
            raise
        finally:
            del os.environ["TORCH_CPP_LOG_LEVEL"]
            if before is not None:
                os.environ["TORCH_CPP_LOG_LEVEL"] = before
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End every rank with SIGKILL, in their order."""
        started = [process for process in self.processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()

    def kill_one(self, rank: int) -> None:
        """End one rank with SIGKILL, whatever state it is in."""
        self.processes[rank].kill()
        self.processes[rank].join()

    def join(self, ranks: Sequence[int], *, timeout_s: float) -> list[int]:
        """Wait for ranks to end; return those that have not."""
        deadline = time.monotonic() + timeout_s
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [rank for rank in ranks if self.processes[rank].exitcode is None]

    def wait_until(self, holds: Callable[[], bool], *, timeout_s: float) -> bool:
        """Return once a condition holds, or a rank has ended, or the time is over; say whether it holds."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline or any(process.exitcode is not None for process in self.processes):
                return holds()
            time.sleep(POLL_S)
        return True

    def told(self, rank: int) -> list[dict[str, Any]]:
        """Return what a rank has told so far; a last line that is not whole is left out."""
        file = self._folder / f"rank-{rank}.jsonl"
        with suppress(FileNotFoundError):
            return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return []

    def log(self, rank: int) -> str:
        """Return what a rank has printed."""
        file = self._folder / f"rank-{rank}.log"
        return file.read_text(errors="replace") if file.exists() else ""


def _live(
    rank: int,
    num_ranks: int,
    port: int,
    folder: Path,
    joins: bool,
    target: tuple[str, str, list[str]],
    args: Sequence[Any],
) -> None:
    """Run in a process of the rank's own."""
    import importlib
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    module, name, path = target
    sys.path[:] = path
    if joins:
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    else:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ.update({key: str(value) for key, value in {**places, **rendezvous}.items()})
    try:
        getattr(importlib.import_module(module), name)(rank, Pen(folder, rank), *args)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

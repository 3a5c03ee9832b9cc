"""Pools of real ranks for tests: processes that torchrun started, with gloo on 127.0.0.1, reused between tests.

Importing torch takes seconds a process, so a pool stays alive and runs one function after another; every run gets
a process group of its own, and the ranks' environment, directory, seeds, signals, warnings and the repository's
modules are reset before it.
No run outlives its timeout: what hangs has its stacks dumped, fails, and is replaced at the next run.
"""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import psutil
from rank_server import STACKS_SIGNAL, Hello, Reply, Request

SERVER = Path(__file__).with_name("rank_server.py")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
GRACE_S = 20.0  # once one rank has failed, the others are waited for this long at most
POLL_S = 0.2
SHOWN_LOG_CHARACTERS = 4000

Launcher = Literal["torchrun", "pool"]


class RanksFailedError(AssertionError):
    """A function failed on at least one rank; the message holds each failing rank's traceback and output.

    Attributes:
        outcomes: What came of every rank, by rank.
    """

    def __init__(self, message: str, outcomes: Sequence[Outcome]) -> None:
        super().__init__(message)
        self.outcomes = list(outcomes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one rank's run.

    Attributes:
        rank: The rank.
        value: What the function returned.
        error: The exception that it raised; a RuntimeError with its text if it could not be pickled.
        trace: The exception's traceback.
        died: The process ended.
        hung: The process had not ended when the time was over.
        log: What the rank printed during the run, and its stacks if it hung.
    """

    rank: int
    value: Any = None
    error: BaseException | None = None
    trace: str | None = None
    died: bool = False
    hung: bool = False
    log: str = ""

    @property
    def ok(self) -> bool:
        """Whether the function returned."""
        return self.error is None and not self.died and not self.hung


class RankPool:
    """Ranks that run functions; they start at the first run, and again at the next one after a death or a hang.

    Args:
        num_ranks: How many ranks.
        filters: Warning filters as pytest writes them; by default every warning is an error.
        launcher: "torchrun", or "pool": processes without an agent, so that the others live on when one is killed,
            as they do on other hosts; the store is then the test process's, as it is torchrun's otherwise.
    """

    def __init__(self, num_ranks: int, *, filters: Sequence[str] = ("error",), launcher: Launcher = "torchrun") -> None:
        self.num_ranks = num_ranks
        self._filters = filters
        self._launcher: Launcher = launcher
        self._live: _LiveRanks | None = None

    @property
    def pids(self) -> list[int]:
        """The ranks' process ids; empty before the first run and after a death or a hang."""
        return [] if self._live is None else [process.pid for process in self._live.processes]

    def outcomes(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], *, timeout_s: float
    ) -> list[Outcome]:
        """Run a top-level function on every rank and return what came of each; raise nothing for their failures."""
        if "<" in function.__qualname__:
            raise TypeError(f"{function.__qualname__} is no top-level function; other processes cannot import it")
        arguments = pickle.dumps((args, kwargs))
        live = self._live = self._live or _LiveRanks(self.num_ranks, self._launcher)
        try:
            live.send(function, arguments, self._filters)
            found = live.collect(timeout_s=timeout_s)
        except BaseException:
            self._live = None
            live.kill()
            raise
        if any(outcome.died or outcome.hung for outcome in found):
            self._live = None
            live.kill()
        return found

    def close(self) -> None:
        """End the ranks."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledRanks:
    """A pool as a test sees it: with a time limit for each run."""

    pool: RankPool
    timeout_s: float

    @property
    def pids(self) -> list[int]:
        """The ranks' process ids; empty before the first run and after a death or a hang."""
        return self.pool.pids

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Run a top-level function on every rank and return the results, by rank.

        Raises:
            RanksFailedError: The function raised, ended the process or was not done in time, on any rank.
        """
        found = self.outcomes(function, *args, **kwargs)
        failed = [outcome for outcome in found if not outcome.ok]
        if failed:
            head = f"{function.__qualname__} failed on {len(failed)} of {len(found)} ranks"
            raise RanksFailedError("\n".join([head, *map(_describe, failed)]), found)
        return [outcome.value for outcome in found]

    def outcomes(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Outcome]:
        """Run a top-level function on every rank and return what came of each, deaths included."""
        return self.pool.outcomes(function, args, kwargs, timeout_s=self.timeout_s)


class RankPools:
    """All pools of a test session, one for each number of ranks, made when first asked for.

    Args:
        filters: Warning filters as pytest writes them.
    """

    def __init__(self, *, filters: Sequence[str] = ("error",)) -> None:
        self._filters = filters
        self._shared: dict[int, RankPool] = {}
        self._fresh: list[RankPool] = []

    def __call__(self, num_ranks: int, *, timeout_s: float = 60.0) -> PooledRanks:
        """Return ranks that other tests use as well."""
        pool = self._shared.setdefault(num_ranks, RankPool(num_ranks, filters=self._filters))
        return PooledRanks(pool=pool, timeout_s=timeout_s)

    def fresh(self, num_ranks: int, *, timeout_s: float = 60.0) -> PooledRanks:
        """Return ranks for one test alone, for it to kill; the others live on when one dies."""
        pool = RankPool(num_ranks, filters=self._filters, launcher="pool")
        self._fresh.append(pool)
        return PooledRanks(pool=pool, timeout_s=timeout_s)

    def close_fresh(self) -> None:
        """End the ranks that belonged to one test."""
        while self._fresh:
            self._fresh.pop().close()

    def close(self) -> None:
        """End all ranks."""
        self.close_fresh()
        while self._shared:
            self._shared.popitem()[1].close()


class _LiveRanks:
    """The processes of a pool, from their start to their end."""

    def __init__(self, num_ranks: int, launcher: Launcher) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))  # not tmp_path: a socket's path is short
        self._started_in = dict(os.environ)
        self._launched: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._num_requests = 0
        self._log_starts = [0] * num_ranks
        self._store: object = None
        self.processes: list[psutil.Process] = []
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(self._folder / "socket"))
                listener.listen(num_ranks)
                if launcher == "torchrun":
                    self._start_torchrun(num_ranks)
                else:
                    self._start_processes(num_ranks)
                self._accept(listener, num_ranks)
        except BaseException:
            self.kill()
            raise

    def _start_torchrun(self, num_ranks: int) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        self._launch([*command, f"--nproc_per_node={num_ranks}"], {})

    def _start_processes(self, num_ranks: int) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, though not in __all__

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._store = store
        for rank in range(num_ranks):
            facts = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": num_ranks,
                "LOCAL_WORLD_SIZE": num_ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": store.port,
                "TORCHELASTIC_USE_AGENT_STORE": True,
            }
            self._launch([sys.executable], {name: str(value) for name, value in facts.items()})

    def _launch(self, command: list[str], environment: dict[str, str]) -> None:
        local = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if sys.platform == "linux":
            local["GLOO_SOCKET_IFNAME"] = "lo"
        with (self._folder / "launcher.log").open("ab") as log:
            self._launched.append(
                subprocess.Popen(
                    [*command, str(SERVER), str(self._folder / "socket"), str(self._folder)],
                    env={**self._started_in, **local, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _accept(self, listener: socket.socket, num_ranks: int) -> None:
        """Wait until every rank has said hello."""
        deadline = time.monotonic() + START_TIMEOUT_S
        listener.settimeout(POLL_S)
        found: dict[int, tuple[Connection, psutil.Process]] = {}
        while len(found) < num_ranks:
            with suppress(TimeoutError):
                peer, _ = listener.accept()
                peer.setblocking(True)
                connection = Connection(peer.detach())
                self._connections.append(connection)
                hello: Hello = connection.recv()
                found[hello.rank] = connection, psutil.Process(hello.pid)
            ended = [process.returncode for process in self._launched if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(file.read_text(errors="replace") for file in sorted(self._folder.glob("*.log")))
                raise RuntimeError(f"{num_ranks} ranks did not start (ended: {ended}):\n{logs}")
        self._connections = [found[rank][0] for rank in range(num_ranks)]
        self.processes = [found[rank][1] for rank in range(num_ranks)]

    def send(self, function: Callable[..., Any], arguments: bytes, filters: Sequence[str]) -> None:
        """Ask every rank to run a function."""
        names = os.environ.keys() | self._started_in.keys()
        self._num_requests += 1
        request = Request(
            number=self._num_requests,
            module=function.__module__,
            name=function.__qualname__,
            arguments=arguments,
            path=tuple(sys.path),
            directory=str(Path.cwd()),
            environment={n: os.environ.get(n) for n in names if os.environ.get(n) != self._started_in.get(n)},
            filters=tuple(filters),
        )
        self._log_starts = [self._log(rank).stat().st_size for rank in range(len(self.processes))]
        for connection in self._connections:
            with suppress(BrokenPipeError):  # `collect` says who is gone
                connection.send(request)

    def collect(self, *, timeout_s: float) -> list[Outcome]:
        """Return what came of every rank, when all are done or the time is over."""
        deadline = time.monotonic() + timeout_s
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < len(self.processes) and (now := time.monotonic()) < deadline:
            ready = wait(
                [link for rank, link in enumerate(self._connections) if rank not in outcomes],
                timeout=min(POLL_S, deadline - now),
            )
            for rank, connection in enumerate(self._connections):
                if rank in outcomes or not (connection in ready or self._is_gone(rank)):
                    continue
                outcomes[rank] = self._outcome(rank)
                if outcomes[rank].error is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        hung = [rank for rank in range(len(self.processes)) if rank not in outcomes]
        self._write_stacks(hung)
        for rank in hung:
            outcomes[rank] = Outcome(rank=rank, hung=True, log=self._read_log(rank))
        return [outcomes[rank] for rank in range(len(self.processes))]

    def _outcome(self, rank: int) -> Outcome:
        """Return what a rank answers; that it died if nothing comes."""
        connection = self._connections[rank]
        try:
            if not connection.poll(0):
                raise EOFError
            reply: Reply = connection.recv()
        except (EOFError, ConnectionError):
            return Outcome(rank=rank, died=True, log=self._read_log(rank))
        log = self._read_log(rank)
        if reply.value is not None:
            return Outcome(rank=rank, value=pickle.loads(reply.value), log=log)
        text = (reply.trace or "").rstrip()
        error = RuntimeError(text.splitlines()[-1]) if reply.error is None else pickle.loads(reply.error)
        return Outcome(rank=rank, error=error, trace=text, log=log)

    def _is_gone(self, rank: int) -> bool:
        """Whether a rank's process ended; its forked children may hold its socket open."""
        with suppress(psutil.NoSuchProcess):
            return bool(self.processes[rank].status() == psutil.STATUS_ZOMBIE)
        return True

    def _write_stacks(self, ranks: Sequence[int]) -> None:
        """Make ranks write the stacks of all their threads to their logs, and wait for the end of that."""
        sizes = {rank: self._log(rank).stat().st_size for rank in ranks}
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                self.processes[rank].send_signal(STACKS_SIGNAL)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for rank, before in sizes.items():
            last = before
            while time.monotonic() < deadline:
                time.sleep(POLL_S)  # the end of writing cannot be waited for: it is when nothing more comes
                size = self._log(rank).stat().st_size
                if size == last != before:
                    break
                last = size

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.log"

    def _read_log(self, rank: int) -> str:
        """Return what a rank has printed in this run, the last of it if it is long."""
        with self._log(rank).open("rb") as file:
            file.seek(self._log_starts[rank])
            return file.read().decode(errors="replace")[-SHOWN_LOG_CHARACTERS:]

    def stop(self) -> None:
        """Let the ranks end by themselves; kill what does not, and what they leave."""
        family = self._family()
        for connection in self._connections:
            with suppress(OSError):
                connection.send_bytes(b"")
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in self._launched:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._end(family)

    def kill(self) -> None:
        """End every process at once."""
        self._end(self._family())

    def _family(self) -> list[psutil.Process]:
        """Return the processes that were started here, and theirs, such as a loader's workers."""
        roots = list(self.processes)
        roots += [psutil.Process(process.pid) for process in self._launched if process.poll() is None]
        family = []
        for root in roots:
            with suppress(psutil.NoSuchProcess):
                family += [*root.children(recursive=True), root]
        return family

    def _end(self, family: Sequence[psutil.Process]) -> None:
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        for process in self._launched:
            process.wait()
        psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        for connection in self._connections:
            connection.close()
        self._store = None
        shutil.rmtree(self._folder, ignore_errors=True)


def _describe(outcome: Outcome) -> str:
    """Say what came of a rank that failed, with what it printed."""
    if outcome.hung:
        head = "was not done in time; its stacks are at the end of its output"
    elif outcome.died:
        head = "died"
    else:
        head = f"raised\n{outcome.trace}"
    log = f"\n--- output of rank {outcome.rank} ---\n{outcome.log.rstrip()}" if outcome.log.strip() else ""
    return f"\n=== rank {outcome.rank} {head}{log}"

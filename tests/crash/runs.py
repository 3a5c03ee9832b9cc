"""Runs of a tiny job on a storage in memory: what the crash tests crash, and what they recover with."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from bucket import Objects
from crew import Crew, CrewRanks
from disk import Tree
from recording import Ack, Log

from distckpt import CheckpointManager, catalog, names
from distckpt.background import Pruner, Writing
from distckpt.lease import Lease
from distckpt.manifest import Layout
from distckpt.owner import Fate, Machine, Owner
from distckpt.retention import Retention
from distckpt.storage import Storage, local

State = MutableMapping[str, Any]
Contents = Tree | Objects
KEEP = 1


def content(ack: Ack) -> State:
    """Return a state that tells what it is of."""
    value = ack.step * 10 + ack.generation
    return {
        "weights": torch.full((4, 2), value, dtype=torch.int64),
        "bias": torch.full((3,), float(value)),
        "count": value,
    }


def told(state: State) -> Ack:
    """Return what a state is of, all of it."""
    values = {int(state["count"]), *state["weights"].flatten().tolist(), *map(int, state["bias"].tolist())}
    assert len(values) == 1, f"a mixed state: {sorted(values)}"
    return Ack(*divmod(values.pop(), 10))


class PromptPruner(Pruner):
    """Prunes before it returns, for only one rank runs at a time; the log takes it for work on a thread of its own."""

    def __init__(self, log: Log, retention: Retention, *, insist: Callable[[], None]) -> None:
        super().__init__(retention, insist=insist)
        self._log = log

    def _launch(self, thread: threading.Thread) -> None:
        with self._log.beside("pruning"):
            self._work()

    def wait(self) -> None:
        super().wait()
        self._log.join("pruning")


class PromptWriting(Writing):
    """Writes before it returns, as `PromptPruner` prunes."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def start(self, work: Callable[[], None], *, tell: bool) -> None:
        with self._log.beside("writing"):
            self._work_quietly(work, tell)

    def join(self) -> None:
        super().join()
        self._log.join("writing")


class Clock:
    """Time, which goes by only for who waits."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.now_s += seconds


class Timed(Protocol):
    """Says how late it is."""

    def now(self) -> float: ...


def own_machine(clock: Timed, fate: Fate, *, pause: Callable[[float], None]) -> Machine:
    """Return a machine on which a job is a process that no other one is; of all others it says the same."""
    pid = 1 + int(names.secrets.token_hex(2), 16)  # type: ignore[attr-defined]  # counted, where runs are repeatable
    return Machine(me=Owner(host="host", pid=pid), now=clock.now, pause=pause, fate=lambda _owner: fate)


class StoredManager(CheckpointManager):
    """The real manager, but for where it stores, where its ranks meet, and what it sees of other jobs."""

    def __init__(self, storage: Storage, crew: Crew, rank: int, job: Job, machine: Machine) -> None:
        super().__init__("unused", keep=job.keep, layout=job.layout, background=job.background, rng=False, signals=())
        self._owns = job.owns
        self._home.storage = self._saver.storage = storage
        self._tenure._new_lease = partial(Lease, background=False, machine=machine)
        self._saver._pruner = PromptPruner(crew.log, Retention.of(job.keep), insist=self._tenure.insist)
        self._saver._writing = PromptWriting(crew.log)
        self._channels = CrewRanks(crew, rank, "training"), CrewRanks(crew, rank, "writing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run: restore the newest good checkpoint, then save these steps.

    Attributes:
        world_size: The number of ranks.
        steps: The steps to save; those that the restored one is not older than are left out.
        layout: Who writes.
        generation: Whose content the saved steps have.
        restores: Whether to restore first, as every run does.
        keep: How many checkpoints retention keeps.
        first: The rank that is ahead of the others.
        background: Whether to write in the background.
        owns: Whether it takes the directory before it restores, as a job does whose manager decides when to save.
    """

    world_size: int = 2
    steps: tuple[int, ...] = ()
    layout: Layout = "sharded"
    generation: int = 0
    restores: bool = True
    keep: int = KEEP
    first: int = 0
    background: bool = False
    owns: bool = False

    def run(self, opener: Callable[[], Storage], log: Log, machine: Machine | None = None) -> list[Ack | BaseException]:
        """Run, each rank with a storage of its own; return what each restored, or the error that ended it.

        A job on two ranks knows nothing of the one before, and waits until its lease is over; others know that it died.
        """
        crew = Crew(self.world_size, log, first=self.first)
        if machine is None:
            clock = Clock()
            machine = own_machine(clock, "unknown" if self.world_size == 2 else "gone", pause=clock.pause)

        def work(rank: int) -> Ack:
            restored = Ack(0, 0)
            with StoredManager(opener(), crew, rank, self, machine) as manager:
                if self.restores:
                    state = content(restored)
                    step = manager.restore(state)
                    restored = told(state)
                    assert restored.step == step, f"restore says step {step}, the state is of {restored}"
                self._save(manager, restored, log)
            return restored

        return crew.run(work)

    def _save(self, manager: CheckpointManager, restored: Ack, log: Log) -> None:
        """Save the steps that are left; one that is written in the background is acknowledged by the next call."""
        under_way: int | None = None
        for step in self.steps:
            if step > restored.step:
                manager.save(step, content(Ack(step, self.generation)))
                done, under_way = (under_way, step) if self.background else (step, None)
                if done is not None:
                    log.acknowledge(done, self.generation)
        if under_way is not None:
            manager.wait()
            log.acknowledge(under_way, self.generation)


def succeed(job: Job, contents: Contents, log: Log | None = None) -> Ack:
    """Run a job that has to succeed; return what all its ranks have restored."""
    machine = contents.machine(log)
    with machine.opened() as opener:
        results = job.run(opener, machine.log)
    assert machine.num_open == 0, f"{machine.num_open} files were left open"
    for rank, result in enumerate(results):
        if isinstance(result, BaseException):
            raise AssertionError(f"rank {rank} of {job.world_size}: {type(result).__name__}: {result}") from result
    assert len(set(results)) == 1, f"ranks restored different checkpoints: {results}"
    [first, *_] = results
    assert not isinstance(first, BaseException)
    return first


@contextmanager
def repeatable() -> Iterator[None]:
    """Count where the library draws random names, so that a run is the same every time."""
    before = names.secrets, local.secrets  # type: ignore[attr-defined]
    counter = itertools.count()
    names.secrets = local.secrets = SimpleNamespace(token_hex=lambda size: f"{next(counter):0{2 * size}x}")  # type: ignore[attr-defined,assignment]
    try:
        yield
    finally:
        names.secrets, local.secrets = before  # type: ignore[attr-defined]


def strays(storage: Storage) -> dict[str, set[str]]:
    """Return, for each folder of a checkpoint, what no manifest in it vouches for: attempts and temporary files.

    Files of checkpoints that were put aside as damaged do not count.
    """
    found: dict[str, set[str]] = {}
    for folder in catalog.scan(storage):
        if folder.damaged and not folder.committed:
            continue
        vouched = {names.MANIFEST}
        if folder.committed:
            vouched |= {file.name for file in catalog.read_manifest(storage, folder.name).files}
        inner = {file.name.partition("/")[2] for file in folder.files}
        others = {name.partition("/")[0] for name in inner - vouched if not names.is_quarantine(name)}
        if others:
            found[folder.name] = others
    return found


@contextmanager
def silenced() -> Iterator[None]:
    """Keep the library's warnings, of which every second crash brings one, out of the tests' output."""
    logger = logging.getLogger("distckpt")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before

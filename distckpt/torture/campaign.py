"""A campaign: start the job, kill it, look at what lies there, start it again, and judge what it came back to.

Invariant: it touches nothing on the user's storage but one fresh folder, and ends every process that it started.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from distckpt import catalog, verification
from distckpt.errors import DistckptError
from distckpt.logfolder import EVENTS_NAME
from distckpt.manifest import Layout
from distckpt.memorytier import MemoryTier
from distckpt.names import join
from distckpt.storage import Storage, open_storage
from distckpt.torture.journal import Line, judge, read

START_LIMIT_S = 600.0  # a rank that waits for another gives up long before; a starved machine may need it
POLL_S = 0.001
MOST_FAILURES = 3  # a resume that fails will fail again
AIMED = 0.6  # of the kills are aimed into a save, more if too few hit; the others come at any moment
EARLY = 0.1  # come before the job has resumed
MOST_GAP_S = 0.01  # between the kills of two ranks
SHOWN_LOG_CHARS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a campaign is told.

    Attributes:
        url: Where; a fresh folder below it is used.
        kills: How often to kill; None: until the time is over.
        minutes: For how long; None: until all kills are done.
        num_ranks: How many ranks the job has.
        layout: Who writes.
        megabytes: The size of the state.
        every: Save each so many steps.
        seed: Of everything that is random.
        keep: Whether to leave the folder.
        storage_options: What fsspec's file system of the URL takes.
        memory_tier: Whether the job keeps its newest checkpoint in this machine's memory.
    """

    url: str
    kills: int | None
    minutes: float | None = None
    num_ranks: int = 2
    layout: Layout = "sharded"
    megabytes: float = 4.0
    every: int = 3
    seed: int = 0
    keep: bool = False
    storage_options: Mapping[str, Any] | None = None
    memory_tier: bool = False


@dataclass(kw_only=True)
class Report:
    """What a campaign found; it grows while it goes on.

    Attributes:
        directory: The folder that was used.
        kills: How often the job was killed.
        kills_in_save: How many of these left a save that had begun and was not committed.
        acknowledged: Saves that the job was told are committed.
        lost: Acknowledged checkpoints that the job did not come back to, nor to a newer one.
        wrong: States that are not those that were saved, in words.
        failed: Starts that came to nothing, with the end of a rank's log.
        damaged: Checkpoints at the end that are not whole, in words.
        most_abandoned: The largest number of abandoned saves that lay there after a kill.
        from_memory: How many starts read all data from this machine's memory.
        most_in_memory: The largest number of saves of which something lay there after a kill.
        left_over: What lay there at the end besides the checkpoints: abandoned saves and temporary files.
        duration_s: How long it took, in seconds.
        is_kept: Whether the folder is still there.
    """

    directory: str
    kills: int = 0
    kills_in_save: int = 0
    acknowledged: int = 0
    lost: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    most_abandoned: int = 0
    from_memory: int = 0
    most_in_memory: int = 0
    left_over: int = 0
    duration_s: float = 0.0
    is_kept: bool = True

    @property
    def is_fine(self) -> bool:
        """Whether nothing was lost, wrong, failed or damaged."""
        return not (self.lost or self.wrong or self.failed or self.damaged)


def run(
    settings: Settings, *, after_kill: Callable[[Report, Storage], None] = lambda _report, _storage: None
) -> Report:
    """Carry out a campaign and return what it found.

    Args:
        settings: What to do.
        after_kill: Called after each kill, with the report so far, and the job's storage.

    Raises:
        ConfigError: The URL is malformed.
        StorageError: The storage cannot be listed.

    Ranks: none; it starts them, and blocks until all is done.
    """
    begun = time.monotonic()
    name = f"torture-{secrets.token_hex(4)}"
    outer = open_storage(settings.url, storage_options=settings.storage_options)
    outer.list(name)  # refuses early what cannot be read at all
    report = Report(directory=join(outer.url.rstrip("/"), name))
    folder = Path(tempfile.mkdtemp(prefix="distckpt-torture-"))
    campaign = _Campaign(settings, report, folder)
    try:
        campaign.go_on(until=None if settings.minutes is None else begun + 60 * settings.minutes, after_kill=after_kill)
        if len(report.failed) < MOST_FAILURES:
            campaign.finish()
    finally:
        report.duration_s = time.monotonic() - begun
        MemoryTier(report.directory).leave(in_good_order=True)
        if report.is_fine and not settings.keep:
            _remove(outer, name)
            report.is_kept = False
        if report.is_fine:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            report.failed.append(f"the ranks' journals and logs are in {folder}")
    return report


class _Campaign:
    """The state of a campaign between two kills."""

    def __init__(self, settings: Settings, report: Report, folder: Path) -> None:
        self._settings, self._report, self._folder = settings, report, folder
        self._random = random.Random(settings.seed)
        self._storage = open_storage(report.directory, storage_options=settings.storage_options)
        # One server imports torch, once; each rank is a child of it.
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["distckpt.torture.job"])
        self._leg = 0
        self._save_s = 0.05

    def go_on(self, *, until: float | None, after_kill: Callable[[Report, Storage], None]) -> None:
        """Start and kill, again and again."""
        report = self._report
        most = math.inf if self._settings.kills is None else self._settings.kills
        while report.kills < most and (until is None or time.monotonic() < until):
            self._leg += 1
            with self._started(most_steps=10_000) as ranks:
                early = self._random.random() < EARLY
                came = self._await_moment(ranks, early=early)
                self._kill(ranks)
            if came:
                report.kills += 1
            self._judge(must_resume=not (came and early), ranks=ranks)
            self._look()
            if came:
                after_kill(report, self._storage)
            if len(report.failed) >= MOST_FAILURES:
                return

    def finish(self) -> None:
        """Let the job come to an end of its own, then read every byte that it has left."""
        self._leg += 1
        with self._started(most_steps=2 * self._settings.every) as ranks:
            deadline = time.monotonic() + START_LIMIT_S
            for rank in ranks:
                rank.join(max(0.0, deadline - time.monotonic()))
            if any(rank.exitcode != 0 for rank in ranks):
                self._failed("the last start did not come to its end")
        self._judge(must_resume=True, ranks=ranks)
        self._report.from_memory = self._count_from_memory()
        self._report.left_over = self._count_abandoned() + sum(f.name.endswith(".tmp") for f in self._storage.list())
        for folder in catalog.scan(self._storage):
            if folder.damaged:
                self._report.damaged.append(f"step {folder.step}: put aside as damaged")
            if not folder.committed:
                continue
            try:
                manifest = catalog.read_manifest(self._storage, folder.name)
                problems = [
                    f"{p.file} {p.problem}" for p in verification.verify(self._storage, manifest, folder=folder.name)
                ]
            except DistckptError as error:
                problems = [str(error)]
            self._report.damaged += [f"step {folder.step}: {problem}" for problem in problems]

    @contextmanager
    def _started(self, *, most_steps: int) -> Iterator[list[BaseProcess]]:
        """Start every rank; whatever happens, none is left."""
        task = self._task(most_steps=most_steps)
        ranks: list[BaseProcess] = []
        try:
            for rank in range(self._settings.num_ranks):
                process = self._processes.Process(target=_run_rank, args=(task, rank), daemon=True)
                process.start()
                ranks.append(process)
            yield ranks
        finally:
            for started in ranks:
                started.kill()
            for started in ranks:
                started.join()

    def _task(self, *, most_steps: int) -> dict[str, Any]:
        settings = self._settings
        return {
            "directory": self._report.directory,
            "storage_options": settings.storage_options,
            "folder": self._folder,
            "leg": self._leg,
            "num_ranks": settings.num_ranks,
            "layout": settings.layout,
            "background": self._leg % 2 == 0,
            "seed": settings.seed,
            "width": max(4, round(math.sqrt(settings.megabytes * 1e6 / 24))),
            "every": settings.every,
            "most_steps": most_steps,
            "memory_tier": settings.memory_tier,
        }

    def _await_moment(self, ranks: list[BaseProcess], *, early: bool) -> bool:
        """Return at the moment to kill; False if a rank has ended before."""
        if early:
            return self._wait(ranks, self._random.uniform(0.0, 1.0), lambda: False)
        if not self._wait(ranks, START_LIMIT_S, lambda: self._heard("resumed") > 0, must_hold=True):
            return False
        num_saves = self._random.randint(1, 4)
        if not self._wait(ranks, START_LIMIT_S, lambda: self._heard("saving") >= num_saves, must_hold=True):
            return False
        self._learn_pace()
        is_aimed = self._random.random() < AIMED or 2 * self._report.kills_in_save < self._report.kills
        most_s = self._save_s if is_aimed else 5 * self._save_s
        return self._wait(ranks, self._random.uniform(0.0, most_s), lambda: False)

    def _wait(
        self, ranks: list[BaseProcess], most_s: float, holds: Callable[[], bool], *, must_hold: bool = False
    ) -> bool:
        """Wait until something holds or the time is over; return False if a rank ends, or it had to hold."""
        deadline = time.monotonic() + most_s
        while not holds():
            if any(rank.exitcode is not None for rank in ranks):
                return False
            if time.monotonic() >= deadline:
                return not must_hold
            time.sleep(POLL_S)
        return True

    def _heard(self, event: str) -> int:
        return sum(line.leg == self._leg and line.event == event for line in read(self._folder, 0))

    def _learn_pace(self) -> None:
        """Learn from the journal how long a save takes here, so that kills can be aimed into one."""
        begun: dict[tuple[int, int], float] = {}
        took = []
        for line in read(self._folder, 0):
            if line.event == "saving":
                begun[line.leg, line.step] = line.moment
            elif line.event == "saved" and (line.leg, line.step) in begun:
                took.append(line.moment - begun[line.leg, line.step])
        if took:
            self._save_s = sorted(took)[len(took) // 4]  # in the background it is told late

    def _kill(self, ranks: list[BaseProcess]) -> None:
        """Kill every rank, in any order, and not quite at once."""
        for rank in self._random.sample(ranks, len(ranks)):
            rank.kill()
            time.sleep(self._random.uniform(0.0, MOST_GAP_S))

    def _lines(self) -> list[Line]:
        return [line for rank in range(self._settings.num_ranks) for line in read(self._folder, rank)]

    def _judge(self, *, must_resume: bool, ranks: list[BaseProcess]) -> None:
        lines, report = self._lines(), self._report
        verdict = judge(lines, leg=self._leg, num_ranks=self._settings.num_ranks)
        report.acknowledged = len({(line.leg, line.step) for line in lines if line.rank == 0 and line.event == "saved"})
        report.lost += [step for step in verdict.lost if step not in report.lost]
        report.wrong += verdict.wrong
        # A rank that ended by itself has failed, also if that was because another one had.
        ended = [rank.exitcode for rank in ranks if rank.exitcode not in (0, -9)]
        if must_resume and verdict.step is None:
            self._failed("it never resumed")
        elif ended and not any(rank.exitcode == -9 for rank in ranks):
            self._failed(f"all ranks ended by themselves, with exit code {ended[0]}")

    def _failed(self, what: str) -> None:
        logs = [self._folder / f"leg-{self._leg}-rank-{rank}.log" for rank in range(self._settings.num_ranks)]
        said = [log.read_text(errors="replace")[-SHOWN_LOG_CHARS:] for log in logs if log.exists()]
        self._report.failed.append(f"start {self._leg}: {what}:\n" + "\n".join(filter(None, said)))

    def _look(self) -> None:
        """See what the kill has left."""
        self._report.most_abandoned = max(self._report.most_abandoned, self._count_abandoned())
        self._report.most_in_memory = max(self._report.most_in_memory, len(MemoryTier(self._storage.url).attempts()))
        mine = [line for line in read(self._folder, 0) if line.leg == self._leg]
        begun = {line.step for line in mine if line.event == "saving"}
        committed = {folder.step for folder in catalog.scan(self._storage) if folder.committed}
        told = {line.step for line in mine if line.event == "saved"}
        self._report.kills_in_save += bool(begun - committed - told)

    def _count_abandoned(self) -> int:
        """Return how many saves left something without being committed."""
        num_abandoned = 0
        for folder in catalog.scan(self._storage):
            parts = {file.name.split("/")[1] for file in folder.files if file.name.count("/") > 1}
            num_abandoned += max(0, len(parts) - folder.committed)
        return num_abandoned

    def _count_from_memory(self) -> int:
        """Return how many starts have read all data from this machine's memory."""
        events = self._folder / EVENTS_NAME
        lines = [json.loads(line) for line in events.read_text().splitlines() if line.endswith("}")]
        return sum(bool(line.get("memory_bytes")) and line["storage_bytes"] == 0 for line in lines)


def _remove(outer: Storage, name: str) -> None:
    """Remove the folder; on a local disk with the empty folders in it, which are no files."""
    outer.delete(file.name for file in outer.list(name))
    local = Path(outer.url) / name
    if local.is_absolute():
        for folder in sorted((path for path in [local, *local.rglob("*")] if path.is_dir()), reverse=True):
            folder.rmdir()


def _run_rank(task: dict[str, Any], rank: int) -> None:
    """Run in a process of the rank's own."""
    from distckpt.torture.job import Task, run_rank

    run_rank(Task(**task), rank)

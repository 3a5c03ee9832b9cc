"""The jobs of a run: each start of the training until it ended, or was killed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from distckpt.catalog import Checkpoint
from distckpt.leasefiles import Standing
from distckpt.outcome import Ending as Said
from distckpt.report.records import Event

Ending = Said | Literal["killed", "running", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job.

    Attributes:
        number: Its place among the run's jobs, from 1.
        name: Its name in the event log; "" if it is known by its checkpoints alone.
        host: The host of its rank 0; None if nobody said.
        pid: The process of its rank 0.
        world_size: Its number of ranks.
        version: Of distckpt.
        started: When it started, or gave its first sign, in seconds since 1970.
        ended: When it ended, or gave its last sign.
        first_step: The step that it went on from; None if nobody said.
        last_step: The last step that it told of.
        num_saves: Checkpoints that it committed.
        restore_s: How long its restore took, in seconds; None if it restored nothing.
        restore_bytes: How much it restored.
        restore_memory: Whether all that it read for that came from its nodes' memory; False if only some did, or none.
        ending: How it ended; "killed": without a word; "unknown": it cannot be told.
        reason: Why, in a few words.
    """

    number: int
    name: str
    host: str | None
    pid: int | None
    world_size: int | None
    version: str | None = None
    started: float
    ended: float
    first_step: int | None
    last_step: int | None
    num_saves: int
    restore_s: float | None = None
    restore_bytes: int | None = None
    restore_memory: bool = False
    ending: Ending
    reason: str | None = None


def jobs_of(events: Sequence[Event], standing: Standing | None) -> list[Job]:
    """Return the jobs that an event log tells of, in the order in which they started.

    Args:
        events: The events, oldest first.
        standing: How the latest job stands, as the storage says.
    """
    grouped: dict[str, list[Event]] = {}
    for event in events:
        grouped.setdefault(event.job, []).append(event)
    jobs = [_job(number, name, group) for number, (name, group) in enumerate(grouped.items(), start=1)]
    if jobs and standing is not None and standing.state == "running":
        last = jobs[-1]
        if last.ending == "killed" and (last.pid is None or last.pid == standing.record.owner.pid):
            jobs[-1] = replace(last, ending="running")
    return jobs


def _job(number: int, name: str, events: list[Event]) -> Job:
    kinds = {event.kind: event for event in events}  # of each kind the last
    nothing = Event(time=0.0, job=name, kind="", step=None)
    start, restored, end = (kinds.get(kind, nothing) for kind in ("started", "restored", "ended"))
    ending = end.text("ending")
    steps = [event.step for event in events if event.step is not None and event.kind not in ("quarantined", "pruned")]
    return Job(
        number=number,
        name=name,
        host=start.text("host"),
        pid=start.whole("pid"),
        world_size=start.whole("world_size"),
        version=start.text("version"),
        started=events[0].time,
        ended=events[-1].time,
        first_step=restored.step,
        last_step=steps[-1] if steps else None,
        num_saves=sum(event.kind == "saved" for event in events),
        restore_s=restored.number("seconds") if restored.step else None,
        restore_bytes=restored.whole("num_bytes") if restored.step else None,
        restore_memory=bool(restored.whole("memory_bytes")) and restored.whole("storage_bytes") == 0,
        ending=ending if ending in get_args(Said) else "killed",  # type: ignore[arg-type]
        reason=end.text("reason"),
    )


def jobs_by_checkpoints(checkpoints: Iterable[Checkpoint], standing: Standing | None) -> list[Job]:
    """Return the jobs that the checkpoints which are still there were committed by, and how the latest one stands.

    Where a job went on from is known if that checkpoint is there, and another job's.
    """
    jobs: list[Job] = []
    theirs: set[tuple[object, object]] = set()  # the checkpoints of the jobs before
    own: set[tuple[object, object]] = set()
    for checkpoint in sorted(checkpoints, key=lambda one: one.created):
        host, pid = checkpoint.writer.get("host"), checkpoint.writer.get("pid")
        last = jobs[-1] if jobs else None
        if last is None or (last.host, last.pid) != (host, pid):
            theirs, own = theirs | own, set()
            parent = checkpoint.parent or {}
            is_others = (parent.get("step"), parent.get("attempt")) in theirs
            last = Job(
                number=len(jobs) + 1,
                name="",
                host=host if isinstance(host, str) else None,
                pid=pid if isinstance(pid, int) else None,
                world_size=checkpoint.world_size,
                version=checkpoint.versions.get("distckpt"),
                started=checkpoint.created,
                ended=checkpoint.created,
                first_step=parent["step"] if is_others else None,
                last_step=None,
                num_saves=0,
                ending="unknown",
            )
            jobs.append(last)
        own.add((checkpoint.step, checkpoint.attempt))
        jobs[-1] = replace(last, ended=checkpoint.created, last_step=checkpoint.step, num_saves=last.num_saves + 1)
    return [*jobs[:-1], _as_it_stands(jobs[-1], standing)] if jobs else []


def _as_it_stands(job: Job, standing: Standing | None) -> Job:
    """Return the latest job with what its lease says."""
    if standing is None or standing.record.owner.pid != job.pid:
        return job
    outcome = standing.record.outcome
    return replace(
        job,
        started=min(job.started, standing.record.acquired),
        ended=max(job.ended, outcome.time if outcome else standing.record.renewed),
        ending="killed" if standing.state == "unknown" else standing.state,
        reason=outcome.reason if outcome else None,
    )

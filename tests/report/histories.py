"""Histories of runs that never ran: manifests without data files, and the logs that go with them."""

from __future__ import annotations

import base64
import json
import math
import random
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distckpt.logfolder import EVALUATION_NAME, EVENTS_NAME, LOG_NAME
from distckpt.manifest import DataFile, Manifest, Segment, serialize
from distckpt.names import MANIFEST, step_name

BEGUN = 1_700_000_000.0
DIGITS = tuple("0123456789")


def checkpoint(folder: Path, step: int, *, created: float = BEGUN, pid: int = 1, **changes: Any) -> Manifest:
    """Write the manifest of a checkpoint of 3,000 bytes; its data file is not there."""
    attempt = f"{step:016x}"
    segments = (Segment(num_bytes=3000, digest="0" * 32),)
    file = DataFile(name=f"{attempt}/rank-00000.safetensors", rank=0, num_bytes=3000, segments=segments)
    facts: dict[str, Any] = {
        "step": step,
        "run": "made",
        "attempt": attempt,
        "layout": "sharded",
        "world_size": 2,
        "created": created,
        "writer": {"host": "gpu-03", "pid": pid},
        "files": (file,),
        "tensors": {},
        "objects": {},
        "metrics": {"val/loss": 1 / (step + 1), "val/top1": 1 - 1 / (step + 2)},
        "versions": {"distckpt": "0.1.0", "torch": "2.15.0", "python": "3.11.2"},
        "timings": {"stage_s": 0.002, "write_s": 0.03},
    }
    manifest = Manifest(**{**facts, **changes})
    (folder / step_name(step)).mkdir(parents=True, exist_ok=True)
    (folder / step_name(step) / MANIFEST).write_bytes(serialize(manifest))
    return manifest


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def picture(shade: int, *, size: int = 8) -> str:
    """Return a grey PNG in base64."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes([shade]) * size for _ in range(size))
    header = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def evaluation(step: int, *, classes: Sequence[str] = DIGITS, **changes: Any) -> dict[str, Any]:
    """Return the record of an evaluation in which each class is taken for the next one now and then."""
    num = len(classes)
    confusion = [[one, one, 30 + one % 7] for one in range(num)] + [
        [one, (one + 1) % num, 1] for one in range(0, num, 3)
    ]
    totals = [sum(count for true, _, count in confusion if true == one) for one in range(num)]
    return {
        "format": 1,
        "step": step,
        "classes": list(classes),
        "num_samples": totals,
        "num_right": [30 + one % 7 for one in range(num)],
        "confusion": confusion,
        "samples": [
            {"png": picture(20 * one), "true": one % num, "predicted": (one + (one < 3)) % num, "probability": 0.9}
            for one in range(12)
        ],
        **changes,
    }


@dataclass
class Job:
    """One job of a history: it goes on from `first`, and is over after `last`."""

    first: int
    last: int
    ending: str | None  # None: killed
    facts: dict[str, Any] = field(default_factory=dict)


FIVE_RESTARTS = (
    Job(0, 130, None),
    Job(120, 300, "preempted"),
    Job(300, 410, None),
    Job(360, 480, "failed", {"reason": "StorageError: no space left on '/scratch'"}),
    Job(480, 555, None),
    Job(540, 900, "complete"),
)


def write_history(
    folder: Path, jobs: Sequence[Job] = FIVE_RESTARTS, *, every: int = 60, keep: int = 3, log_every: int = 10
) -> None:
    """Write a run of several jobs: a save every so many steps, the checkpoint 400 damaged, the newest ones left."""
    chance = random.Random(7)
    now = BEGUN
    events: list[dict[str, Any]] = []
    alive: list[int] = []
    times: dict[int, float] = {}

    def tell(job: str, kind: str, step: int | None = None, **facts: Any) -> None:
        events.append({"time": now, "job": job, "kind": kind, "step": step, **facts})

    for number, job in enumerate(jobs, start=1):
        name = f"j{number}"
        where = {"directory": str(folder), "version": "0.1.0"}
        tell(name, "started", world_size=2, host="gpu-03", pid=1000 + number, **where)
        now += 4
        if alive and alive[-1] > job.first:
            tell(name, "quarantined", alive.pop(), reason="'rank-00001.safetensors' has wrong bytes")
        tell(name, "restored", job.first, seconds=0.21, num_bytes=3000 if job.first else 0)
        for step in range(job.first + 1, job.last + 1):
            now += 0.25
            if step % every == 0 or (step == job.last and job.ending in ("complete", "preempted")):
                cost = {"stall_s": 0.01 + 0.01 * chance.random(), "write_s": 0.2 + chance.random() ** 4}
                where = {"num_bytes": 3000, "world_size": 2, "layout": "sharded"}
                tell(name, "saved", step, durable_s=cost["write_s"] + 0.02, **cost, **where)
                alive.append(step)
                times[step] = now
                now += 0.1
                if gone := alive[:-keep]:
                    tell(name, "pruned", step, steps=gone, num_bytes=3000 * len(gone))
                    alive = alive[-keep:]
        if job.ending == "preempted":
            tell(name, "preempted", job.last, signal="SIGTERM", left_s=28.0, choice="saved")
        if job.ending is not None:
            tell(name, "ended", job.last, ending=job.ending, reason=job.facts.get("reason"))
        now += 25
    for step in alive:
        config = {"checkpoint": {"keep": keep}}
        checkpoint(folder, step, created=times[step], pid=1000 + len(jobs), config=config)
    write_lines(folder / EVENTS_NAME, events)
    write_lines(folder / LOG_NAME, list(log_lines(jobs[-1].last, log_every=log_every)))
    (folder / EVALUATION_NAME).write_text(json.dumps(evaluation(jobs[-1].last)))


def log_lines(last: int, *, log_every: int = 1) -> list[dict[str, Any]]:
    """Return the lines of a training whose loss falls."""
    chance = random.Random(3)
    lines: list[dict[str, Any]] = []
    for step in range(log_every, last + 1, log_every):
        share = step / last
        loss = 2.3 * math.exp(-5 * share) * (0.8 + 0.4 * chance.random()) + 0.01
        lr = 0.025 * (1 + math.cos(math.pi * share))
        lines.append({"kind": "train", "step": step, "epoch": 1, "loss": loss, "lr": lr, "samples": 64 * step})
        if step % (30 * log_every) == 0 or step == last:
            top1 = 1 - math.exp(-4 * share) * 0.9
            figures = {"val/loss": loss * 1.1 + 0.02, "val/top1": top1, "val/top5": (1 + top1) / 2}
            lines.append({"kind": "eval", "step": step, "epoch": 1, **figures})
    return lines

"""The files of a lease: what they say, and how the run's latest job stands by them.

They lie in the folder `lease`, are numbered, and never change: the highest number counts.
What they say is checked, as everything that comes from a storage is.
"""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import dataclass
from typing import Any, Literal

from distckpt.errors import DirectoryBusyError, StorageError
from distckpt.outcome import Ending, Outcome, checked_moment, checked_text
from distckpt.owner import Machine, Owner
from distckpt.storage import Storage

logger = logging.getLogger("distckpt")

FOLDER = "lease"
MOST_DURATION_S = 3600.0
MAX_BYTES = 1 << 16
LOOK_TRIES = 20  # an owner that renews its lease while it is looked at makes one look fail

_FILE = re.compile(rf"{FOLDER}/(\d{{12,18}})\.json(\.[0-9a-f]+\.tmp)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one file of the lease says.

    Attributes:
        job: The owner's name, new at each of its starts: 16 hex digits.
        owner: Its rank 0.
        acquired: When it took the directory, in seconds since 1970, by its own clock; so is `renewed`.
        renewed: When it last renewed the lease.
        duration_s: How long a lease may go without renewal before others take it over.
        run: The run's name; None if it was not known.
        released: Whether it has given the directory back.
        outcome: How it ended; None if it has not said so.
    """

    job: str
    owner: Owner
    acquired: float
    renewed: float
    duration_s: float
    run: str | None = None
    released: bool = False
    outcome: Outcome | None = None

    def to_bytes(self) -> bytes:
        """Return this as a file's content, for `parse`."""
        body = {
            "format": 1,
            "job": self.job,
            "host": self.owner.host,
            "pid": self.owner.pid,
            "started": self.owner.started,
            "boot": self.owner.boot,
            "namespace": self.owner.namespace,
            "acquired": self.acquired,
            "renewed": self.renewed,
            "duration_s": self.duration_s,
            "run": self.run,
            "released": self.released,
            "outcome": None if self.outcome is None else self.outcome.to_json(),
        }
        return json.dumps(body, sort_keys=True, indent=1).encode() + b"\n"


def parse(data: bytes) -> Record:
    """Return what a file of the lease says; what it says is checked, and keys that are not known are left out.

    Raises:
        ValueError: It is not the content of such a file.
    """
    try:
        body = json.loads(data)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if not isinstance(body, dict):
        raise ValueError("is no JSON object")
    duration_s = checked_moment(body, "duration_s")
    if not 0 < duration_s <= MOST_DURATION_S:
        raise ValueError(f"has duration_s {duration_s}")
    return Record(
        job=checked_text(body, "job"),
        owner=Owner(
            host=checked_text(body, "host"),
            pid=_whole(body, "pid", least=1, most=2**31 - 1),
            started=None if body.get("started") is None else _whole(body, "started", least=0, most=2**63),
            boot=None if body.get("boot") is None else checked_text(body, "boot"),
            namespace=None if body.get("namespace") is None else checked_text(body, "namespace"),
        ),
        acquired=checked_moment(body, "acquired"),
        renewed=checked_moment(body, "renewed"),
        duration_s=duration_s,
        run=None if body.get("run") is None else checked_text(body, "run"),
        released=body.get("released") is True,
        outcome=None if body.get("outcome") is None else Outcome.from_json(body["outcome"]),
    )


def _whole(body: dict[str, Any], key: str, *, least: int, most: int) -> int:
    value = body.get(key)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"has {key} {value!r:.40}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one look at the lease's files showed.

    Attributes:
        number: The highest number; 0 if there is none.
        record: What that file says; None if there is none, or it makes no sense.
        files: All files of leases, by name, with their numbers.
    """

    number: int
    record: Record | None
    files: dict[str, int]


def look(storage: Storage) -> Seen:
    """Return what the lease's files say now.

    Raises:
        StorageError: They could not be read.
    """
    for _ in range(LOOK_TRIES):
        matches = [match for file in storage.list(FOLDER) if (match := _FILE.fullmatch(file.name)) is not None]
        files = {match[0]: int(match[1]) for match in matches}
        number = max((int(match[1]) for match in matches if match[2] is None), default=0)
        if number == 0:
            return Seen(number=0, record=None, files=files)
        try:
            data = storage.read_all(file_name(number), limit_bytes=MAX_BYTES)
        except FileNotFoundError:
            continue  # there is a newer one by now
        try:
            return Seen(number=number, record=parse(data), files=files)
        except ValueError as error:
            logger.warning("%s/%s %s", storage.url, file_name(number), error)
            return Seen(number=number, record=None, files=files)
    raise StorageError(path=f"{storage.url}/{FOLDER}", action="read", cause="it changes faster than it can be read")


def file_name(number: int) -> str:
    """Return the name of the lease's file with this number."""
    return f"{FOLDER}/{number:012d}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a run's latest job stands.

    Attributes:
        state: Its outcome, or "running", or "unknown": it ended without a word, or cannot be told.
        record: What its lease says.
    """

    state: Ending | Literal["running", "unknown"]
    record: Record


def standing(storage: Storage, *, machine: Machine | None = None, now: float | None = None) -> Standing | None:
    """Return how the latest job that owned a directory stands; None if none ever did, or its lease cannot be read.

    Whether a job on another host runs is guessed from when it last renewed its lease, by its clock and this one's.

    Args:
        storage: The run's directory.
        machine: What is known of this machine.
        now: The present, in seconds since 1970.

    Raises:
        StorageError: The directory could not be read.
    """
    record = look(storage).record
    if record is None:
        return None
    if record.outcome is not None:
        return Standing(state=record.outcome.ending, record=record)
    fate = (machine or Machine()).fate(record.owner)
    if fate == "unknown":
        age_s = (time.time() if now is None else now) - record.renewed
        fate = "runs" if age_s < 2 * record.duration_s else "gone"
    is_running = fate == "runs" and not record.released
    return Standing(state="running" if is_running else "unknown", record=record)


def refuse_running(storage: Storage) -> None:
    """Return if no job is known to own a directory, so that others may add checkpoints to it.

    Nothing is taken by that: whoever comes later may own it.

    Raises:
        DirectoryBusyError: A job owns it, and runs.
        StorageError: The directory could not be read.
    """
    found = standing(storage)
    if found is not None and found.state == "running":
        owner = found.record.owner
        fix = "take a directory of its own, or come back when that job has ended"
        raise DirectoryBusyError(path=storage.url, host=owner.host, pid=owner.pid, since=found.record.acquired, fix=fix)


def named(record: Record | None) -> str:
    """Return in words whose lease a file is."""
    if record is None:
        return "a job that does not say who it is"
    return f"process {record.owner.pid} on host {record.owner.host!r}"

"""Diagnosis: whether a place can hold checkpoints, tried rather than believed.

Everything is tried on throw-away files in a folder of its own, which is removed afterwards, also when something fails.
Invariant: nothing that was there before is written to, moved or deleted; no secret is in what is found.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distckpt import names
from distckpt.checksum import digest
from distckpt.errors import DistckptError
from distckpt.storage import LocalStorage, Storage, room_of

Verdict = Literal["good", "warning", "bad", "unknown"]

BLOCK_BYTES = 4 << 20
TEST_BYTES = 64 << 20
TEST_S = 5.0  # a slow place gets a smaller file, so that writing it takes about this long
NUM_RACERS = 4
CLOCK_S = 2.0  # what a clock that is read over a network may be off, and what object stores round to
IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}

Advance = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        name: The check.
        verdict: "bad": checkpoints are not safe here, or not possible; "warning": look at it; "unknown": this cannot
            be told from here.
        text: In words.
        facts: In numbers.
    """

    name: str
    verdict: Verdict
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class _Patient:
    """What is examined, and what was measured of it so far."""

    storage: Storage
    folder: str
    advance: Advance
    write_rate: float | None = None
    publish_s: float | None = None
    test_bytes: int = TEST_BYTES
    content: str = ""

    def name(self, name: str) -> str:
        return names.join(self.folder, name)


def examine(
    storage: Storage,
    *,
    test_bytes: int = TEST_BYTES,
    save_bytes: int | None = None,
    advance: Advance = lambda num_bytes: None,
) -> Iterator[Finding]:
    """Yield what each check of a place finds, as it is found.

    Args:
        storage: The place.
        test_bytes: How much to write and read at most to measure the rates.
        save_bytes: The size of a checkpoint, whose save is then estimated.
        advance: Is told of bytes of the test file that were written or read.
    """
    patient = _Patient(storage=storage, folder=f"doctor-{secrets.token_hex(8)}", advance=advance)
    patient.test_bytes = test_bytes
    with _cleaned(patient):
        listed = _tried("list", lambda: _list(storage))
        yield listed
        if listed.verdict == "bad":
            return
        checks: dict[str, Callable[[], Finding]] = {
            "publish": lambda: _publish(patient),
            "race": lambda: _race(patient),
            "write": lambda: _write(patient),
            "read": lambda: _read(patient),
            "clock": lambda: _clock(patient),
            "delete": lambda: _delete(patient),
        }
        for name, check in checks.items():
            found = _tried(name, check)
            yield found
            if found.verdict == "bad" and name in ("publish", "write"):
                break
    if patient.publish_s is not None:
        yield _durability(patient)
    yield _room(storage, save_bytes)
    yield _sharing(storage)
    if save_bytes is not None:
        yield _save(patient, save_bytes)


def _tried(name: str, check: Callable[[], Finding]) -> Finding:
    """Return what a check finds; that it cannot be carried out is a finding too."""
    try:
        return check()
    except (DistckptError, OSError, EOFError) as error:
        return Finding(name=name, verdict="bad", text=str(error).partition("\nFix:")[0], facts=_fix(error))


def _fix(error: Exception) -> dict[str, Any]:
    fix = getattr(error, "fix", None)
    return {"fix": fix} if fix else {}


@contextmanager
def _cleaned(patient: _Patient) -> Iterator[None]:
    """Remove the folder of the examination afterwards, and the directories that it had to make."""
    root = patient.storage.root if isinstance(patient.storage, LocalStorage) else None
    made = [] if root is None else [path for path in (root, *root.parents) if not path.exists()]
    try:
        yield
    finally:
        with suppress(DistckptError, OSError):
            patient.storage.delete([file.name for file in patient.storage.list(patient.folder)])
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _list(storage: Storage) -> Finding:
    begun = time.monotonic()
    files = storage.list()
    seconds = time.monotonic() - begun
    num_bytes = sum(file.num_bytes for file in files)
    text = (
        f"{len(files):,} files, {num_bytes / 1e9:.3g} GB, listed in {seconds:.3f} s" if files else "nothing there yet"
    )
    return Finding(
        name="list", verdict="good", text=text, facts={"files": len(files), "bytes": num_bytes, "seconds": seconds}
    )


def _publish(patient: _Patient) -> Finding:
    """Check that a small file appears whole, and that the same name is refused afterwards."""
    name, first = patient.name("publish"), b"first"
    begun = time.monotonic()
    patient.storage.publish(name, first)
    seconds = patient.publish_s = time.monotonic() - begun
    facts = {"seconds": seconds}
    if patient.storage.read_all(name, limit_bytes=99) != first:
        return Finding(name="publish", verdict="bad", text="what was published reads otherwise", facts=facts)
    with suppress(FileExistsError):
        patient.storage.publish(name, b"second")
        return Finding(name="publish", verdict="bad", text="an existing file was replaced", facts=facts)
    if patient.storage.read_all(name, limit_bytes=99) != first:
        return Finding(name="publish", verdict="bad", text="a refused file changed the one that was there", facts=facts)
    text = f"a small file is durable in {1e3 * seconds:.3g} ms, and never replaced"
    return Finding(name="publish", verdict="good", text=text, facts=facts)


def _race(patient: _Patient) -> Finding:
    """Check that of several that publish one name at once just one wins."""

    def publish(number: int) -> bool:
        try:
            patient.storage.publish(patient.name("race"), f"{number}".encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(NUM_RACERS) as pool:
        won = [number for number, has_won in enumerate(pool.map(publish, range(NUM_RACERS))) if has_won]
    found = patient.storage.read_all(patient.name("race"), limit_bytes=99)
    facts = {"racers": NUM_RACERS, "winners": len(won)}
    if len(won) != 1 or found != f"{won[0]}".encode():
        text = f"{len(won)} of {NUM_RACERS} writers of one name were told that it is theirs"
        return Finding(name="race", verdict="bad", text=text, facts=facts)
    if not patient.storage.capabilities.exclusive_publish:
        text = "one writer won, but the storage does not promise that; never let two jobs share a directory here"
        return Finding(name="race", verdict="warning", text=text, facts=facts)
    text = f"of {NUM_RACERS} writers of one name one won"
    return Finding(name="race", verdict="good", text=text, facts=facts)


def _write(patient: _Patient) -> Finding:
    block = os.urandom(BLOCK_BYTES)
    seconds = _put(patient, "probe", block[: min(BLOCK_BYTES, patient.test_bytes)], 1)
    affordable = int(TEST_S / max(seconds, 1e-9))
    num_blocks = max(1, min(patient.test_bytes // BLOCK_BYTES, affordable))
    patient.test_bytes = num_blocks * BLOCK_BYTES
    patient.content = digest(block)
    seconds = _put(patient, "data", block, num_blocks)
    patient.advance(patient.test_bytes)
    rate = patient.write_rate = patient.test_bytes / seconds
    text = f"{_size(rate)}/s, durable: {_size(patient.test_bytes)} in {seconds:.3g} s by one writer"
    facts = {"bytes": patient.test_bytes, "seconds": seconds, "bytes_per_s": rate}
    return Finding(name="write", verdict="good", text=text, facts=facts)


def _put(patient: _Patient, name: str, block: bytes, count: int) -> float:
    """Write a file of so many blocks, durably, and return the seconds that it took."""
    begun = time.monotonic()
    patient.storage.put(patient.name(name), (block for _ in range(count)), num_bytes=count * len(block))
    patient.storage.sync([patient.name(name)])
    return time.monotonic() - begun


def _read(patient: _Patient) -> Finding:
    is_cold = _dropped_from_cache(patient)
    offsets = range(0, patient.test_bytes, BLOCK_BYTES)

    def read(offset: int) -> bool:
        into = memoryview(bytearray(BLOCK_BYTES))
        patient.storage.read(patient.name("data"), offset, into)
        patient.advance(len(into))
        return digest(into) == patient.content

    begun = time.monotonic()
    with ThreadPoolExecutor(patient.storage.capabilities.num_readers) as pool:
        is_same = all(pool.map(read, offsets))
    seconds = time.monotonic() - begun
    rate = patient.test_bytes / seconds
    facts = {"bytes": patient.test_bytes, "seconds": seconds, "bytes_per_s": rate, "cold": is_cold}
    if not is_same:
        return Finding(name="read", verdict="bad", text="other bytes came back than were written", facts=facts)
    how = "by the server"
    if is_cold is not None:
        how = "after the system was asked to drop it from memory" if is_cold else "perhaps from this host's memory"
    return Finding(name="read", verdict="good", text=f"{_size(rate)}/s, {how}", facts=facts)


def _dropped_from_cache(patient: _Patient) -> bool | None:
    """Ask the system to forget the test file, where it is one of this system's; None where it is not."""
    if not isinstance(patient.storage, LocalStorage):
        return None
    try:
        fd = os.open(patient.storage.root / patient.name("data"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _clock(patient: _Patient) -> Finding:
    """Compare the storage's clock with this host's, by the time of a file that is written now."""
    before = time.time()
    patient.storage.put(patient.name("clock"), [b"now"])
    after = time.time()
    [modified] = [file.modified for file in patient.storage.list(patient.folder) if file.name == patient.name("clock")]
    if not modified:
        return Finding(name="clock", verdict="unknown", text="the storage does not say when a file was written")
    skew = modified - before if modified < before else max(0.0, modified - after)
    facts = {"skew_s": skew}
    if abs(skew) > CLOCK_S:
        text = f"the storage's clock is {skew:+.1f} s off this host's; ages of checkpoints are off by as much"
        return Finding(name="clock", verdict="warning", text=text, facts=facts)
    text = f"the storage's clock and this host's differ by less than {CLOCK_S:g} s"
    return Finding(name="clock", verdict="good", text=text, facts=facts)


def _delete(patient: _Patient) -> Finding:
    patient.storage.delete([file.name for file in patient.storage.list(patient.folder)])
    left = patient.storage.list(patient.folder)
    if left:
        text = f"{len(left)} files are there after they were deleted"
        return Finding(name="delete", verdict="bad", text=text, facts={"left": [file.name for file in left]})
    return Finding(name="delete", verdict="good", text="what was deleted is gone")


def _durability(patient: _Patient) -> Finding:
    storage = patient.storage
    kind = _file_system(storage.root) if isinstance(storage, LocalStorage) else None
    facts = {"file_system": kind} if kind else {}
    if kind in IN_MEMORY or not storage.capabilities.survives_power_loss:
        text = (
            "it lies in memory, and is gone with it" if kind is None else f"{kind} lies in memory, and is gone with it"
        )
        return Finding(name="durability", verdict="warning", text=text, facts=facts)
    if isinstance(storage, LocalStorage):
        of = f" of {kind}" if kind else ""
        text = f"files and folders are fsynced before a checkpoint counts; that the disk{of} keeps its word is its own"
    else:
        text = "what the server has acknowledged is in its care"
    return Finding(name="durability", verdict="good", text=text, facts=facts)


def _file_system(path: Path) -> str | None:
    """Return the kind of file system that a path lies on, as Linux says."""
    with suppress(OSError):
        path = path.resolve()
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        found = [
            (len(fields[1]), fields[2]) for fields in mounts if path.is_relative_to(fields[1].replace("\\040", " "))
        ]
        return max(found)[1] if found else None
    return None


def _room(storage: Storage, save_bytes: int | None) -> Finding:
    room = room_of(storage)
    if room is None:
        return Finding(name="room", verdict="unknown", text="this storage does not say how much room is left")
    free = room.num_bytes
    text = f"{_size(free)} free for this user; a quota may be lower"
    if save_bytes is not None and free < 2 * save_bytes:
        needs = "one checkpoint" if free < save_bytes else "a second one beside it, which a save needs,"
        verdict: Verdict = "bad" if free < save_bytes else "warning"
        return Finding(name="room", verdict=verdict, text=f"{text}; {needs} does not fit", facts={"free_bytes": free})
    return Finding(name="room", verdict="good", text=text, facts={"free_bytes": free})


def _sharing(storage: Storage) -> Finding:
    match storage.capabilities.shared:
        case True:
            return Finding(
                name="sharing", verdict="good", text="every host that reaches the server sees the same files"
            )
        case False:
            text = "no other process sees these files"
            return Finding(name="sharing", verdict="warning", text=text)
        case _:
            text = (
                "whether ranks on other hosts see this directory cannot be told from here: a job on several hosts "
                "needs one that is mounted on all"
            )
            return Finding(name="sharing", verdict="unknown", text=text)


def _save(patient: _Patient, save_bytes: int) -> Finding:
    if patient.write_rate is None:
        return Finding(name="save", verdict="unknown", text="nothing could be written, so no rate was measured")
    seconds = save_bytes / patient.write_rate + (patient.publish_s or 0.0)
    text = f"{_size(save_bytes)} take one writer about {seconds:.3g} s at the rate above; training goes on meanwhile"
    return Finding(name="save", verdict="good", text=text, facts={"bytes": save_bytes, "seconds": seconds})


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"

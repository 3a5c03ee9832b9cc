"""Every call that a save, a restore and a prune make fails in turn, once and for ever, as in SQLite's I/O-error tests.

A sample runs every time; all of it by: python -m pytest -m slow tests/crash/test_io_errors.py
"""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
from bucket import Objects
from disk import Tree
from recording import Ack, Log
from runs import Contents, Job, repeatable, silenced, strays, succeed
from s3_model import S3Objects, answered

from distckpt.errors import CheckpointExistsError, DistckptError
from distckpt.manifest import Layout

KINDS: dict[str, type[Contents]] = {"disk": Tree, "bucket": Objects, "s3": S3Objects}
FEWEST_CALLS = 3  # of a restore from an object store on one rank: it lists, and reads a manifest and data
STRIDE = 4  # a sample tries each call in one of its four combinations of layout and ranks


def of_system(number: int) -> Callable[[], Exception]:
    return lambda: OSError(number, os.strerror(number))


# What a call may fail with, by the words that the user has to be told.
NUMBERS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT)
OF_SYSTEM = {os.strerror(number): of_system(number) for number in NUMBERS}
OF_SERVER: dict[str, Callable[[], Exception]] = {
    "SlowDown": lambda: answered("SlowDown", 503),
    "InternalError": lambda: answered("InternalError", 500),
    "AccessDenied": lambda: answered("AccessDenied", 403),
    "XMinioStorageFull": lambda: answered("XMinioStorageFull", 507),
    "Connection reset": of_system(errno.ECONNRESET),
    "TimeoutError": TimeoutError,
}
ERRORS = {"disk": OF_SYSTEM, "bucket": OF_SYSTEM, "s3": OF_SERVER}


@dataclass(slots=True)
class Fault:
    """A call that fails: the `at`-th, and if `lasting` all after it, until it is `gone`."""

    words: str
    error: Callable[[], Exception]
    at: int
    lasting: bool
    seen: int = 0
    call: str = ""

    def __call__(self, call: str, name: str) -> None:
        index, self.seen = self.seen, self.seen + 1
        if index == self.at or (self.lasting and index > self.at):
            self.call = self.call or f"{call} {name}"
            raise self.error()


Faults = Iterator[list[Fault]]


def faults(kind: str, first: int | None) -> Faults:
    """Yield for each call the faults to try there: all, or from the `first` on for some calls one that changes."""
    for at in itertools.count(first or 0, step=1 if first is None else STRIDE):
        all_of_them = [Fault(*told, at, lasting) for told in ERRORS[kind].items() for lasting in (False, True)]
        yield all_of_them if first is None else [all_of_them[(at // STRIDE + at) % len(all_of_them)]]


def attempt(job: Job, contents: Contents, fault: Fault) -> tuple[list[Ack | BaseException], Ack | None]:
    """Run a job while a call fails; return what its ranks say, and what was acknowledged."""
    machine = contents.machine(Log())
    machine.on_call = fault
    with machine.opened() as opener:
        results = job.run(opener, machine.log)
    assert machine.num_open == 0, "files were left open"
    return results, max((op.ack for op in machine.log.ops if op.ack), default=None)


def check_told(results: list[Ack | BaseException], fault: Fault) -> bool:
    """Say whether the ranks failed; all have to, or none, and each has to know who met what, and where."""
    failed = [result for result in results if isinstance(result, BaseException)]
    if not failed:
        return False
    assert len(failed) == len(results), f"some ranks failed, others did not: {results}"
    for error in failed:
        assert isinstance(error, DistckptError), f"{type(error).__name__}: {error}"
        assert fault.words in str(error), error
        assert "/run" in str(error), error
        assert len(results) == 1 or re.search(r"\brank \d", str(error)), error
    return True


def check_saves(base: Contents, job: Job, faults: Faults) -> int:
    """Fail each call of a save of step 30 that prunes; return how many failures were tried."""
    num_tried = 0
    for tries in faults:
        for fault in tries:
            contents = base.copy()
            results, acked = attempt(replace(job, steps=(30,), restores=False), contents, fault)
            failed = check_told(results, fault)
            if not fault.call:
                assert not failed
                return num_tried
            num_tried += 1
            restored = succeed(job, contents.copy())
            assert restored == Ack(30, 0) if not failed else restored in (Ack(20, 0), Ack(30, 0)), fault
            assert failed == (acked is None), fault
            succeed(replace(job, steps=(40,), generation=1, keep=1), contents)
            assert succeed(job, contents) == Ack(40, 1), fault
            with contents.machine().opened() as opener:
                left = {name for found in strays(opener()).values() for name in found}
            # A temporary file may stay in a checkpoint that is committed; it goes when that goes.
            assert all(name.endswith(".tmp") for name in left), (fault, left)
            assert len(left) <= 1, (fault, left)
    raise AssertionError("unreachable")


def check_restores(base: Contents, job: Job, faults: Faults) -> int:
    """Fail each call of a restore; a checkpoint that is good may never be put aside for it."""
    num_tried = 0
    for tries in faults:
        for fault in tries:
            contents = base.copy()
            results, _ = attempt(job, contents, fault)
            if not check_told(results, fault):
                assert set(results) == {Ack(20, 0)}, fault
            if not fault.call:
                return num_tried
            num_tried += 1
            assert contents.key() == base.key(), f"{fault}: a restore has changed something"
            assert succeed(job, contents) == Ack(20, 0), fault
    raise AssertionError("unreachable")


def check_clean_ups(base: Contents, job: Job, faults: Faults) -> int:
    """Fail each call of a restore that puts a damaged checkpoint aside, and of the next save of its step."""
    num_tried = 0
    damaged = base.copy()
    [path, *_] = [path for path, data in base.listing() if "0020/" in path and path.endswith(".safetensors")]
    damaged.replace(path, b"")
    for tries in faults:
        for fault in tries:
            contents = damaged.copy()
            again = replace(job, steps=(20,), generation=1, keep=9)
            results, acked = attempt(again, contents, fault)
            # A damaged one that could not be put aside keeps its step until the next run does it.
            if not all(isinstance(result, CheckpointExistsError) for result in results):
                check_told(results, fault)
            if not fault.call:
                assert acked == Ack(20, 1)
                return num_tried
            num_tried += 1
            restored = succeed(job, contents)
            assert restored in (acked, Ack(10, 0), Ack(20, 1)), fault
            assert restored >= (acked or Ack(10, 0)), fault
            succeed(replace(again, steps=(30,)), contents)
            assert succeed(job, contents) == Ack(30, 1), fault
    raise AssertionError("unreachable")


CHECKS = {"save": check_saves, "restore": check_restores, "clean-up": check_clean_ups}


def run(kind: str, layout: Layout, world_size: int, what: str, *, every: bool) -> int:
    job = Job(layout=layout, world_size=world_size)
    base: Contents = KINDS[kind]()
    first = None if every else 2 * world_size - 2 + (layout == "full")
    with silenced(), repeatable():
        succeed(replace(job, steps=(10, 20), keep=9, restores=False), base)
        return CHECKS[what](base, job, faults(kind, first))


@pytest.mark.parametrize("what", CHECKS)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("layout", ["sharded", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_call_is_told_to_all_ranks_and_loses_nothing(
    kind: str, layout: Layout, world_size: int, what: str
) -> None:
    assert run(kind, layout, world_size, what, every=False) > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", CHECKS)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("layout", ["sharded", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_fails_in_every_way(kind: str, layout: Layout, world_size: int, what: str) -> None:
    num_tried = run(kind, layout, world_size, what, every=True)
    print(f"\n{what}, {kind}, {layout}, {world_size} ranks: {num_tried:,} failures of a call")
    assert num_tried >= FEWEST_CALLS * 2 * len(ERRORS[kind])

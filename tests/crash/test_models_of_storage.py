"""The disk and the bucket in memory behave as the real ones do, and their crashes are the ones that can happen."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bucket import Bucket, Objects
from crew import Crew, CrewRanks
from disk import Disk, Tree, after_kill, after_power_loss
from recording import Log, cuts
from runs import Job
from s3_model import Server, answered

from distckpt.errors import DistckptError, RankFailedError
from distckpt.storage import LocalStorage, Storage, open_storage

NAMES = ("a", "b", "in/a", "in/b", "in/deeper/a", "out/a", "a/below-a-file")
NUM_CALLS = 150
Call = Callable[[Storage], object]


def called(verb: str, storage: Storage, **arguments: object) -> object:
    return getattr(storage, verb)(**arguments)


def calls(seed: int) -> Iterator[Call]:
    """Yield calls of every verb, some of which fail."""
    rng = random.Random(seed)
    for _ in range(NUM_CALLS):
        name, other = rng.choice(NAMES), rng.choice(NAMES)
        data = rng.randbytes(rng.randint(1, 30))
        verbs: list[Call] = [
            partial(called, "put", name=name, chunks=[data, data], num_bytes=2 * len(data)),
            partial(called, "publish", name=name, data=data[:2]),
            partial(called, "sync", names=[name]),
            partial(called, "read_all", name=name, limit_bytes=25),
            partial(called, "read", name=name, offset=3, into=memoryview(bytearray(8))),
            partial(called, "delete", names=[name, other]),
        ]
        yield rng.choice(verbs)


def outcome(call: Call, storage: Storage) -> object:
    """Return what a call gives, or the kind of its error, and what lies there afterwards."""
    result: object
    try:
        result = call(storage)
    except (DistckptError, OSError, EOFError) as error:
        result = type(error), getattr(error, "errno", None)
    return result, [(info.name, info.num_bytes) for info in storage.list()]


@pytest.mark.parametrize("seed", range(4))
def test_the_disk_answers_as_the_kernel_does(seed: int, tmp_path: Path) -> None:
    real, disk = LocalStorage(tmp_path / "run"), Disk()
    with disk.opened() as opener:
        pass
    for call in calls(seed):
        expected = outcome(call, real)
        with disk.opened() as opener:
            assert outcome(call, opener()) == expected
    assert disk.num_open == 0


@pytest.mark.parametrize("model", [Bucket, Server])
def test_the_bucket_answers_as_a_server_does(model: type[Bucket | Server], s3_bucket: str) -> None:
    real, bucket = open_storage(f"s3://{s3_bucket}/run"), model()
    with bucket.opened() as opener:
        for call in calls(seed=5):
            expected = outcome(call, real)
            assert outcome(call, opener()) == expected


def test_a_disk_refuses_a_call_that_it_does_not_know() -> None:
    with pytest.raises(AttributeError, match=r"no os\.truncate"):
        _ = Disk().truncate


def outcomes_in_a_removed_folder(system: Any, root: str) -> list[int | None]:
    """Return how calls end that put something into a folder which was removed after it had been opened."""
    system.mkdir(f"{root}/gone")
    root_fd, gone_fd = (system.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (root, f"{root}/gone"))
    system.close(system.open("file", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=root_fd))
    system.rmdir("gone", dir_fd=root_fd)
    link = partial(system.link, "file", "file", src_dir_fd=root_fd, dst_dir_fd=gone_fd, follow_symlinks=False)
    ends: list[int | None] = []
    for call in (
        partial(system.mkdir, "inner", dir_fd=gone_fd),
        partial(system.open, "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=gone_fd),
        link,
        partial(system.fsync, gone_fd),
    ):
        try:
            call()
            ends.append(None)
        except OSError as error:
            ends.append(error.errno)
    system.close(gone_fd)
    system.close(root_fd)
    return ends


def test_nothing_can_be_put_into_a_folder_that_was_removed(tmp_path: Path) -> None:
    disk = Disk()
    disk.mkdir("/run")
    found = outcomes_in_a_removed_folder(disk, "/run")
    assert found == outcomes_in_a_removed_folder(os, str(tmp_path)) == [errno.ENOENT] * 3 + [None]


def written(*, synced: bool) -> Log:
    disk = Disk()
    with disk.opened() as opener:
        opener().put("a", [b"12345678"], num_bytes=8)
        if synced:
            opener().sync(["a"])
    return disk.log


def test_what_is_not_synced_may_be_lost_and_what_is_may_not() -> None:
    def seen(log: Log) -> set[bytes | None]:
        [*_, last] = cuts(log.ops)
        states = after_power_loss(Tree(), last, limit=1000, rng=random.Random(0))
        return {dict(tree.listing()).get("/run/a") for tree, _ in states}

    assert seen(written(synced=False)) == {b"12345678", None}
    assert seen(written(synced=True)) == {b"12345678"}


def test_a_file_that_is_not_synced_may_be_short_or_garbled() -> None:
    log = written(synced=False)
    [cut] = [cut for cut in cuts(log.ops) if cut.done and cut.done[-1].kind == "write"]
    seen = {
        dict(tree.listing()).get("/run/a")
        for tree, _ in after_power_loss(Tree(), cut, limit=1000, rng=random.Random(0))
    }
    assert {None, b"", bytes(8), b"1234", b"12345678"} < seen
    assert dict(after_kill(Tree(), cut.done).listing())["/run/a"] == b"12345678"


def test_a_cut_holds_what_each_of_its_operations_waited_for() -> None:
    bucket = Bucket(Objects())
    crew = Crew(2, bucket.log)

    def work(rank: int) -> None:
        ranks = CrewRanks(crew, rank, "test")
        bucket.request("put", f"{rank}-before")
        ranks.barrier("meeting")
        bucket.request("put", f"{rank}-after")

    crew.run(work)
    found = [{op.name for op in cut.done} for cut in cuts(bucket.log.ops)]
    before = {"0-before", "1-before"}
    assert len(found) == 4 + 3
    assert all(before <= names for names in found if names - before)


def test_ranks_of_a_crew_learn_of_each_others_failures() -> None:
    log = Log()
    crew = Crew(3, log)

    def fail(rank: int) -> None:
        if rank == 1:
            raise ValueError("rank 1 is ill")

    results = crew.run(lambda rank: CrewRanks(crew, rank, "test").agree("working", lambda: fail(rank), lambda _: None))
    assert [type(result) for result in results] == [RankFailedError] * 3
    assert all("rank 1 is ill" in str(result) for result in results)


@pytest.mark.parametrize("first", [0, 1])
def test_the_rank_that_is_to_be_ahead_makes_the_folders(first: int) -> None:
    disk = Disk()
    with disk.opened() as opener:
        Job(steps=(10,), first=first).run(opener, disk.log)
    folders = [op for op in disk.log.ops if op.kind == "mkdir" and (op.name.startswith("step-") or len(op.name) == 16)]
    assert {op.rank for op in folders} == {first}


def test_a_server_is_not_taken_for_one_without_conditions_because_another_job_deletes_between(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Server()
    num_creates = iter(range(9))

    def delete_before_the_second(call: str, name: str) -> None:
        if call == "create" and next(num_creates) == 1:
            del server.contents.objects[name]

    with server.opened() as opener:
        storage = opener()
        server.on_call = delete_before_the_second
        storage.publish("lease/1.json", b"mine")
        assert next(num_creates) == 3
        assert storage.capabilities.exclusive_publish
    assert not caplog.records


def test_a_server_that_refuses_for_another_reason_is_asked_again() -> None:
    server = Server()
    requests: list[str] = []

    def fail_the_second(call: str, name: str) -> None:
        if call == "create":
            requests.append(name)
            if len(requests) == 2:
                raise answered("AccessDenied", 403)

    with server.opened() as opener:
        storage = opener()
        server.on_call = fail_the_second
        for name in "abc":
            storage.publish(name, b"mine")
    assert [name[-1] for name in requests] == ["a", "a", "b", "b", "c"]


def test_the_server_answers_many_threads() -> None:
    server = Server()
    with server.opened() as opener, ThreadPoolExecutor(8) as threads:
        storage = opener()
        storage.publish("a", b"content")
        reads = [threads.submit(storage.read_all, "a", limit_bytes=9) for _ in range(2000)]
        assert {read.result(timeout=60) for read in reads} == {b"content"}

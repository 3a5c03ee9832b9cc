"""Every kind of fault at every request of jobs that save, prune and restore, on one and on several ranks."""

from __future__ import annotations

import re
from typing import Any

import checkpoint_jobs
import pytest
import s3fs
import torch
from fault_proxy import Fault, FaultProxy, Seen
from rank_pool import RankPools
from test_s3_faults import FAULTS, READ_TIMEOUT_S

import distckpt
from distckpt.storage.parts import LEAST_PART

SMALL = 64
FEWEST_REQUESTS = 20  # of such a job; else the test tries less than it says
SLOW = pytest.mark.slow
_ANY_ATTEMPT = re.compile(r"[0-9a-f]{16}")


def options(engine: str, *, kind: str = "", tries: int | None = None) -> dict[str, Any]:
    """Return storage options with the patience that a kind of fault needs, and on a busy machine a long one else."""
    retries = {} if tries is None else {"retries": {"total_max_attempts": tries}}
    read_timeout = READ_TIMEOUT_S if kind == "answer late" else 30
    return {"engine": engine, "config_kwargs": {"connect_timeout": 30, "read_timeout": read_timeout, **retries}}


def in_parts(num_ranks: int) -> int:
    """Return how many numbers make each rank upload two parts."""
    return num_ranks * (LEAST_PART // 4 + 1000)


def left_in(s3_filesystem: s3fs.S3FileSystem, url: str) -> set[str]:
    """Return the folders of a run's directory."""
    return {path.removeprefix(url.removeprefix("s3://")).split("/")[1] for path in s3_filesystem.find(url)}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "num_ranks", "engine", "stride"),
    [
        ("answer lost", 1, "s3fs", 5),
        ("request cut", 2, "s3fs", 15),
        *(pytest.param(kind, num_ranks, "s3fs", 1, marks=SLOW) for kind in FAULTS for num_ranks in (1, 2)),
        *(pytest.param(kind, 2, "obstore", 1, marks=SLOW) for kind in ("503", "answer lost", "request cut")),
    ],
)
def test_one_fault_at_any_request_of_saving_pruning_and_restoring_is_mended(
    ranks: RankPools,
    proxy: FaultProxy,
    s3_filesystem: s3fs.S3FileSystem,
    s3_bucket: str,
    kind: str,
    num_ranks: int,
    engine: str,
    stride: int,
) -> None:
    pytest.importorskip(engine)
    num_numbers = SMALL if stride > 1 else in_parts(num_ranks)
    job = ranks(num_ranks, timeout_s=120)
    fail_at, has_failed = 0, True
    while has_failed:  # until there are no more requests than went well
        proxy.reset()
        fault = FAULTS[kind]()
        fault.skip = fail_at
        proxy.fail(fault)
        url = f"s3://{s3_bucket}/run-{fail_at}"
        job.run(checkpoint_jobs.save, url, options(engine, kind=kind), num_numbers)
        assert (
            job.run(checkpoint_jobs.restore, url, options(engine, kind=kind), num_numbers)
            == [checkpoint_jobs.NEWEST] * num_ranks
        )
        has_failed = fault.times == 0
        assert left_in(s3_filesystem, url) == {"lease", f"step-{checkpoint_jobs.NEWEST:012d}"}, f"fault at {fail_at}"
        assert s3_filesystem.list_multipart_uploads(s3_bucket) == [], f"fault at {fail_at}"
        fail_at += stride
    assert fail_at > FEWEST_REQUESTS
    num_tried = len(range(0, fail_at - stride, stride))
    print(f"\n{kind}, {num_ranks} ranks, {engine}: failed at {num_tried} requests, one at a time; nothing is left")


def kinds_of(seen: list[Seen]) -> list[tuple[str, str]]:
    """Return method and target of all requests, those that differ only in the save's name counted once."""
    found = {}
    for each in seen:
        where = _ANY_ATTEMPT.split(each.target.partition("&")[0])[-1]
        found.setdefault((each.method, where.partition("uploadId=")[0]), None)
    return list(found)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "num_ranks", "stride"),
    [
        ("503", 2, 8),
        *(pytest.param(kind, num_ranks, 1, marks=SLOW) for kind in ("503", "answer lost") for num_ranks in (1, 2)),
    ],
)
def test_a_request_that_always_fails_is_told_on_all_ranks_and_nothing_wrong_is_visible(
    ranks: RankPools,
    proxy: FaultProxy,
    s3_filesystem: s3fs.S3FileSystem,
    s3_bucket: str,
    kind: str,
    num_ranks: int,
    stride: int,
) -> None:
    num_numbers = SMALL if stride > 1 else in_parts(num_ranks)
    job = ranks(num_ranks, timeout_s=120)
    job.run(checkpoint_jobs.try_all, f"s3://{s3_bucket}/run-0", options("s3fs"), num_numbers)
    kinds = kinds_of(proxy.seen)
    assert len(kinds) > 10
    for number, (method, where) in enumerate(kinds[::stride], start=1):
        proxy.reset()
        fault = FAULTS[kind]()
        fault.method, fault.where, fault.times = method, where.replace("run-0", f"run-{number}"), 100_000
        proxy.fail(fault)
        url, case = f"s3://{s3_bucket}/run-{number}", f"{method} {where}"
        told = job.run(checkpoint_jobs.try_all, url, options("s3fs", tries=2), num_numbers)
        for said in zip(*told, strict=True):
            assert len({bool(each) for each in said}) == 1, f"{case}: not told on all ranks: {said}"
            assert all("\nFix: " in each for each in said if each), f"{case}: {said}"
        assert fault.times < 100_000, f"{case} was not asked for"
        proxy.reset()
        if any(folder.startswith("step-") for folder in left_in(s3_filesystem, url)):
            found = job.run(checkpoint_jobs.restore, url, options("s3fs"), num_numbers)
            assert set(found) <= {0, 1, checkpoint_jobs.NEWEST}, case
        assert method == "DELETE" or s3_filesystem.list_multipart_uploads(s3_bucket) == [], case
    print(f"\n{kind}, {num_ranks} ranks: {len(kinds[::stride])} kinds of requests failed for ever")


@pytest.mark.parametrize("code", ["SlowDown", "AccessDenied"])
def test_a_save_that_the_server_refuses_fails_and_the_older_checkpoint_stays(
    proxy: FaultProxy, s3_bucket: str, code: str
) -> None:
    url = f"s3://{s3_bucket}/run"
    with distckpt.CheckpointManager(url, keep=1, background=False, storage_options=options("s3fs", tries=2)) as manager:
        manager.save(1, {"weight": torch.ones(4)})
        status = 503 if code == "SlowDown" else 403
        proxy.fail(Fault(method="PUT", action="answer", status=status, code=code, times=1000))
        with pytest.raises(distckpt.errors.DistckptError, match=code):
            manager.save(2, {"weight": torch.zeros(4)})
        proxy.reset()
        assert manager.latest is not None
        assert manager.latest.step == 1

"""Ranks of one node read each byte of an object store once."""

from __future__ import annotations

import pytest
import shared_reading_jobs
from rank_pool import RankPools
from s3_server import S3Server

from distckpt import sharedmemory

STATE_BYTES = 4 * (3_000_000 + 20 * 10)
pytestmark = pytest.mark.skipif(sharedmemory.place() is None, reason="no shared memory")


@pytest.fixture
def place(s3_server: S3Server, s3_bucket: str) -> tuple[str, dict[str, object]]:
    return f"s3://{s3_bucket}/run", {
        "key": s3_server.key,
        "secret": s3_server.secret,
        "endpoint_url": s3_server.endpoint,
    }


@pytest.mark.parametrize("only", [[], ["large"]], ids=["all", "a part"])
@pytest.mark.parametrize("again", [False, True], ids=["after a restart", "later"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_restore_reads_each_byte_once(
    ranks: RankPools, place: tuple[str, dict[str, object]], num_ranks: int, again: bool, only: list[str]
) -> None:
    ranks(2).run(shared_reading_jobs.save, *place)
    before = set(sharedmemory.SHARED_MEMORY.glob("distckpt-*"))
    found = ranks(num_ranks).run(shared_reading_jobs.restore, *place, only, again)
    assert all(each["good"] for each in found)
    total = sum(each["num_bytes"] for each in found)
    assert STATE_BYTES <= total <= 1.01 * STATE_BYTES + 40_000  # headers, and each rank's generators
    if num_ranks > 1:
        assert max(each["num_bytes"] for each in found) < 0.8 * STATE_BYTES
    assert set(sharedmemory.SHARED_MEMORY.glob("distckpt-*")) == before

"""What every test may ask for: ranks that are real processes, an S3 server, and a visible skip without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import pytest
from rank_pool import RankPools
from s3_server import s3_bucket, s3_server

__all__ = ["s3_bucket", "s3_server"]

# torch looks up the names of its peers; a name server that does not answer would cost each rank 5 s at a time.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a real S3 server be tested against."""
    parser.addoption(
        "--s3-endpoint",
        metavar="URL",
        help="an S3 server to test against instead of moto's, with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY set",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` on a machine without one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def session_ranks(pytestconfig: pytest.Config) -> Iterator[RankPools]:
    """Keep the ranks of all tests alive until the last test is done."""
    with closing(RankPools(filters=pytestconfig.getini("filterwarnings"))) as pools:
        yield pools


@pytest.fixture
def ranks(session_ranks: RankPools) -> Iterator[RankPools]:
    """Give real ranks: `ranks(2).run(function, ...)` returns the results by rank; `ranks.fresh(2)` may be killed."""
    yield session_ranks
    session_ranks.close_fresh()

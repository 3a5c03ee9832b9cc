"""What a save, a restore and a listing cost, in requests and bytes, as a proxy counts them."""

from __future__ import annotations

from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import checkpoint_jobs
import pytest
import torch
from fault_proxy import FaultProxy, Seen
from rank_pool import RankPools
from typer.testing import CliRunner

import distckpt
from distckpt import sharedmemory
from distckpt.cli.application import application
from distckpt.memorytier import MemoryTier
from distckpt.storage.parts import LEAST_PART

NUM_CHECKPOINTS = 100
OPTIONS: dict[str, Any] = {"config_kwargs": {"connect_timeout": 30, "read_timeout": 30}}


@pytest.mark.skipif(sharedmemory.place() is None, reason="no shared memory")
@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_restart_after_a_kill_downloads_no_data_that_the_nodes_memory_keeps(
    ranks: RankPools, proxy: FaultProxy, s3_bucket: str, num_ranks: int
) -> None:
    url, num_numbers = f"s3://{s3_bucket}/run", 1_000_000
    killed = ranks.fresh(2).outcomes(checkpoint_jobs.save_and_be_killed, url, OPTIONS, num_numbers)
    assert all(outcome.died for outcome in killed)
    proxy.reset()
    ranks(num_ranks).run(checkpoint_jobs.restore_whole, url, OPTIONS, num_numbers, True)
    read = [seen for seen in without_lease(proxy) if seen.method == "GET"]
    assert [seen.target for seen in read if ".safetensors" in urlsplit(seen.target).path] == []
    # What says which checkpoint there is, and what its bytes are: a listing, and the manifest, by each rank.
    whats = Counter("manifest" if seen.target.endswith("manifest.json") else "listing" for seen in read)
    assert whats == {"listing": 1, "manifest": num_ranks}
    assert proxy.num_downloaded() < 0.01 * 4 * num_numbers
    MemoryTier(url).leave(in_good_order=True)


def folder_of(target: str) -> str:
    """Return which folder of the run a request is about: "step-...", "lease", or "" for the whole."""
    path = urlsplit(target).path.split("/")
    return path[3] if len(path) > 3 else ""


def without_lease(proxy: FaultProxy) -> list[Seen]:
    """Return the requests that are not those of a job that renews its lease meanwhile."""
    return [seen for seen in proxy.seen if "lease" not in seen.target]


def test_a_listing_of_100_checkpoints_is_one_request_and_one_for_each(proxy: FaultProxy, s3_bucket: str) -> None:
    url = f"s3://{s3_bucket}/run"
    with distckpt.CheckpointManager(url, keep=NUM_CHECKPOINTS, background=False, storage_options=OPTIONS) as manager:
        for step in range(1, NUM_CHECKPOINTS + 1):
            manager.save(step, {"weight": torch.ones(4)})
        manager.wait()  # for pruning, which lists too
        proxy.reset()
        assert len(manager.checkpoints) == NUM_CHECKPOINTS
        assert len(without_lease(proxy)) == NUM_CHECKPOINTS + 1
        proxy.reset()
        assert manager.latest is not None
        assert len(without_lease(proxy)) == 2
    proxy.reset()
    result = CliRunner().invoke(application, ["ls", url], catch_exceptions=False)
    assert len(result.stdout.splitlines()) == NUM_CHECKPOINTS + 1
    assert len(proxy.seen) <= NUM_CHECKPOINTS + 6


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_save_uploads_the_state_once_and_a_restore_downloads_it_once(
    ranks: RankPools, proxy: FaultProxy, s3_bucket: str, num_ranks: int
) -> None:
    url = f"s3://{s3_bucket}/run"
    num_numbers = 2 * (LEAST_PART // 4 + 100_000)
    state_bytes = 4 * num_numbers
    ranks(2).run(checkpoint_jobs.save, url, OPTIONS, num_numbers)
    newest = [seen for seen in proxy.seen if folder_of(seen.target) == f"step-{checkpoint_jobs.NEWEST:012d}"]
    methods = Counter(seen.method for seen in newest)
    # Each rank begins and ends an upload of two parts; the manifest is looked for and published. Nothing is copied.
    assert methods == {"POST": 4, "PUT": 2 * 2 + 1, "GET": 1}
    assert not any("copy-source" in header for seen in proxy.seen for header in seen.headers)
    assert state_bytes <= sum(seen.num_bytes for seen in newest) <= 1.01 * state_bytes
    proxy.reset()
    ranks(num_ranks).run(checkpoint_jobs.restore_whole, url, OPTIONS, num_numbers)
    assert state_bytes <= proxy.num_downloaded() <= 1.01 * state_bytes

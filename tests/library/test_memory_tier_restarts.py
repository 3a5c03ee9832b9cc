"""Restarts from the memory tier: nothing is read from the storage but what says which checkpoint there is."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import memory_tier_jobs
import pytest
from memory_tier_jobs import STATE_BYTES
from rank_pool import RankPools
from s3_server import S3Server

from distckpt import catalog, names, sharedmemory
from distckpt.memorytier import MemoryTier
from distckpt.storage import open_storage

pytestmark = pytest.mark.skipif(sharedmemory.place() is None, reason="no shared memory")

Place = tuple[str, dict[str, Any] | None]


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Place]:
    yield str(tmp_path / "run"), None
    MemoryTier(str(tmp_path / "run")).leave(in_good_order=True)


@pytest.fixture
def remote(s3_server: S3Server, s3_bucket: str) -> Iterator[Place]:
    url = f"s3://{s3_bucket}/run"
    yield url, {"key": s3_server.key, "secret": s3_server.secret, "endpoint_url": s3_server.endpoint}
    MemoryTier(url).leave(in_good_order=True)


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


def kept(place: Place) -> list[Path]:
    """Return the files in the tier."""
    return sorted(file for file in MemoryTier(place[0]).path.rglob("*") if file.is_file())


def is_good(found: list[dict[str, Any]], step: int, *, saved_by: int = 2) -> bool:
    ranks = [rank if rank < saved_by else -1 for rank in range(len(found))]
    return [(one["good"], one["step"], one["rank"]) for one in found] == [(True, step, rank) for rank in ranks]


def cases() -> Iterator[Any]:
    """Yield each place, numbers of ranks before and after, and whether it is the first restore; most are slow."""
    few = {("local", 2, 1, False), ("remote", 1, 2, False), ("remote", 2, 2, True)}
    for kind, before, after, again in itertools.product(["local", "remote"], [1, 2], [1, 2], [False, True]):
        marks = () if (kind, before, after, again) in few else pytest.mark.slow
        yield pytest.param(kind, before, after, again, marks=marks)


@pytest.mark.parametrize(("place", "before", "after", "again"), list(cases()), indirect=["place"])
def test_a_restart_reads_no_data_from_the_storage(
    ranks: RankPools, place: Place, before: int, after: int, again: bool
) -> None:
    ranks(before).run(memory_tier_jobs.save_and_fail, *place, [1, 2])
    assert len(kept(place)) == before
    found = ranks(after).run(memory_tier_jobs.restore, *place, True, again)
    assert is_good(found, 2, saved_by=before)
    assert [one["reads"] for one in found] == [0] * after
    assert found[0]["storage_bytes"] == 0
    assert found[0]["memory_bytes"] >= after * STATE_BYTES
    assert len(kept(place)) == before, "the next restart finds it, too"


@pytest.mark.parametrize(("layout", "background"), [("sharded", False), ("full", True)])
def test_every_way_to_save_fills_the_tier(ranks: RankPools, local: Place, layout: str, background: bool) -> None:
    ranks(2).run(memory_tier_jobs.save_and_fail, *local, [1], {"layout": layout, "background": background})
    found = ranks(2).run(memory_tier_jobs.restore, *local)
    assert is_good(found, 1)
    assert found[0]["storage_bytes"] == 0


def test_off_it_is_neither_filled_nor_read_nor_left(ranks: RankPools, local: Place) -> None:
    ranks(1).run(memory_tier_jobs.save_and_fail, *local, [1])
    assert kept(local)
    found = ranks(1).run(memory_tier_jobs.restore, *local, False)
    assert is_good(found, 1)
    assert found[0]["memory_bytes"] == 0
    assert not kept(local)
    ranks(1).run(memory_tier_jobs.save_and_fail, *local, [2], {"memory_tier": False})
    assert not kept(local)


def test_what_the_storage_no_longer_has_is_not_restored(ranks: RankPools, local: Place) -> None:
    ranks(2).run(memory_tier_jobs.save_and_fail, *local, [1, 2])
    (Path(local[0]) / names.step_name(2) / names.MANIFEST).unlink()
    found = ranks(2).run(memory_tier_jobs.restore, *local)
    assert is_good(found, 1)
    assert found[0]["memory_bytes"] == 0


def test_another_saves_files_are_refused_whatever_their_name(ranks: RankPools, local: Place, tmp_path: Path) -> None:
    ranks(2).run(memory_tier_jobs.save_and_fail, *local, [1])
    stale = tmp_path / "stale"
    shutil.copytree(kept(local)[0].parent, stale)
    ranks(2).run(memory_tier_jobs.save_and_fail, *local, [2])
    newest = kept(local)[0].parent
    shutil.rmtree(newest)
    shutil.copytree(stale, newest)
    newest.chmod(0o700)
    found = ranks(2).run(memory_tier_jobs.restore, *local)
    assert is_good(found, 2)
    assert found[0]["storage_bytes"] >= STATE_BYTES


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_flipped_bit_is_read_from_the_storage_instead_and_told(
    ranks: RankPools, place: Place, num_ranks: int
) -> None:
    ranks(2).run(memory_tier_jobs.save_and_fail, *place, [1])
    bad = kept(place)[1]
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    [first, *_] = ranks(num_ranks).outcomes(memory_tier_jobs.restore, *place)
    assert is_good([first.value], 1)
    assert 0 < first.value["storage_bytes"] < num_ranks * STATE_BYTES
    said = [line for line in first.log.splitlines() if "in the memory tier has wrong bytes" in line]
    assert len(said) == 1
    storage = open_storage(place[0], storage_options=place[1])
    assert [folder.damaged for folder in catalog.scan(storage)] == [False]


@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_of_another_nodes_files_each_byte_comes_once_from_an_object_store(
    ranks: RankPools, remote: Place, num_ranks: int
) -> None:
    ranks(2).run(memory_tier_jobs.save_and_fail, *remote, [1])
    gone = kept(remote)[1]
    num_bytes = gone.stat().st_size
    gone.unlink()
    found = ranks(num_ranks).run(memory_tier_jobs.restore, *remote)
    assert is_good(found, 1)
    assert 0.99 * num_bytes <= found[0]["storage_bytes"] <= num_bytes
    assert found[0]["memory_bytes"] >= num_ranks * 0.49 * STATE_BYTES


@pytest.mark.parametrize("stop", [False, True], ids=["complete", "preempted"])
def test_a_job_that_ends_in_good_order_takes_its_tier_along(ranks: RankPools, local: Place, stop: bool) -> None:
    assert ranks(2).run(memory_tier_jobs.save_and_end, local[0], stop) == [stop] * 2
    assert not MemoryTier(local[0]).path.exists()

"""torchdata's StatefulDataLoader in the state: a resumed run sees the samples that the undisturbed one would have."""

from __future__ import annotations

from pathlib import Path

import loader_jobs as jobs
import pytest
from rank_pool import RankPools

pytestmark = [pytest.mark.filterwarnings("ignore")]  # of forks in a process with threads, which workers are


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 10, 14], ids=["inside", "at the end of an epoch", "inside the second epoch"])
def test_no_sample_is_lost_or_seen_twice(tmp_path: Path, stop: int, workers: int):
    whole = jobs.see(str(tmp_path / "whole"), until=jobs.STEPS, workers=workers)
    seen = jobs.see(str(tmp_path / "run"), until=stop, workers=workers)
    seen += jobs.see(str(tmp_path / "run"), until=jobs.STEPS, workers=workers)
    assert seen == whole
    assert sorted(whole[: jobs.SAMPLES]) == list(range(jobs.SAMPLES))


def test_each_of_two_ranks_goes_on_at_its_own_place(ranks: RankPools, tmp_path: Path):
    pool = ranks(2)
    whole = pool.run(jobs.see, str(tmp_path / "whole"), until=9, workers=1)
    begun = pool.run(jobs.see, str(tmp_path / "run"), until=7, workers=1)
    ended = pool.run(jobs.see, str(tmp_path / "run"), until=9, workers=1)
    assert [first + second for first, second in zip(begun, ended, strict=True)] == whole
    assert sorted(whole[0][:20] + whole[1][:20]) == list(range(jobs.SAMPLES))

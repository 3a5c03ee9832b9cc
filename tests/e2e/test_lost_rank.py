"""One rank of three is killed, stopped or raises, in a save, in a restore or between: the others soon know which.

A sample runs every time; all trials by: python -m pytest -m slow tests/e2e/test_lost_rank.py
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import lost_rank_jobs
import pytest
from forked_ranks import ForkedRanks
from lost_rank_jobs import How, Trial, What

NUM_RANKS = 3
TIMEOUT_S = 5.0
GRACE_S = 5.0  # how much later than that a rank may know
START_LIMIT_S = 120.0
AT_ONCE = 4  # they mostly wait
MOST_POINTS = 12
LONGEST_S = 0.5


def trials(what: What, how: How, directory: Path, *, num: int, seed: int = 0) -> Iterator[Trial]:
    """Yield trials: every second one strikes at a point, the others at any moment; raising needs a point."""
    rng = random.Random(f"{what} {how} {seed}")
    kinds = itertools.cycle(itertools.product(("sharded", "full"), (True, False)))
    for number, (layout, background) in zip(range(num), kinds, strict=False):
        by_point = what == "between" or how == "raising" or number // 4 % 2 == 0
        yield Trial(
            directory=str(directory / f"{what}-{how}-{number}" / "run"),
            what=what,
            how=how,
            victim=rng.randrange(NUM_RANKS),
            at=rng.randrange(MOST_POINTS) if by_point else rng.uniform(0, LONGEST_S),
            layout=layout,  # type: ignore[arg-type]
            background=background,
            timeout_s=TIMEOUT_S,
        )


def carry_out(some: Iterable[Trial]) -> Counter[str]:
    """Carry out trials, a few at once; return how often which rank's end was told how."""
    found: Counter[str] = Counter()
    left = list(some)
    while left:
        batch, left = left[:AT_ONCE], left[AT_ONCE:]
        with ExitStack() as stack:
            started = [
                (
                    trial,
                    stack.enter_context(
                        ForkedRanks(NUM_RANKS, Path(trial.directory).parent, lost_rank_jobs.live, trial)
                    ),
                )
                for trial in batch
            ]
            for trial, ranks in started:
                found.update(judged(trial, ranks))
    return found


def judged(trial: Trial, ranks: ForkedRanks) -> list[str]:
    """Wait for a trial's end, and return what its live ranks raised; they have to, in time, and name the victim."""
    alive = [rank for rank in range(NUM_RANKS) if rank != trial.victim]

    def struck() -> list[dict[str, Any]]:
        return [line for line in ranks.told(trial.victim) if line["event"] == "struck"]

    ranks.wait_until(lambda: bool(struck()), timeout_s=START_LIMIT_S)
    assert struck(), f"{trial}: it was never struck:\n{logs(ranks)}"
    # A rank that has raised may still have to see a save in flight fail.
    hung = ranks.join(alive, timeout_s=2 * (TIMEOUT_S + GRACE_S))
    assert not hung, f"{trial}: ranks {hung} hang, struck at {struck()}:\n{logs(ranks)}"
    ranks.kill_one(trial.victim)
    return [told_in_time(trial, rank, ranks, struck()[0]) for rank in alive]


def told_in_time(trial: Trial, rank: int, ranks: ForkedRanks, struck: dict[str, Any]) -> str:
    said = ranks.told(rank)
    [raised] = [line for line in said if line["event"] == "raised"] or [None]
    assert raised is not None, f"{trial}: rank {rank} raised nothing:\n{logs(ranks)}"
    entered = max(line["moment"] for line in said if line["event"] == "entered")
    took_s = raised["moment"] - max(struck["moment"], entered)
    assert took_s <= TIMEOUT_S + GRACE_S, f"{trial}: rank {rank} knew only after {took_s:.1f} s: {raised}"
    assert raised["named"] == [trial.victim], f"{trial}, struck at {struck}: rank {rank} was told {raised}"
    assert f"rank {trial.victim} " in raised["text"], raised
    is_silent = trial.how != "raising" or trial.what == "between"
    assert raised["error"] == ("RankTimeoutError" if is_silent else "RankFailedError"), raised
    assert said[-1]["event"] == "left"
    assert ranks.processes[rank].exitcode == 0
    return str(raised["error"])


def logs(ranks: ForkedRanks) -> str:
    parts: Sequence[str] = [f"--- rank {rank} ---\n{ranks.log(rank)[-3000:]}" for rank in range(NUM_RANKS)]
    return "\n".join(parts)


def test_the_others_are_told_in_time_who_is_missing(tmp_path: Path) -> None:
    kinds = [(what, how) for what in ("save", "restore") for how in get_args(How)]
    found = carry_out(next(trials(what, how, tmp_path, num=1, seed=7)) for what, how in [*kinds, ("between", "killed")])
    assert found.total() == 2 * 7
    assert set(found) == {"RankTimeoutError", "RankFailedError"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", get_args(How))
@pytest.mark.parametrize("what", get_args(What))
def test_the_others_are_told_in_time_wherever_it_happens(tmp_path: Path, what: What, how: How) -> None:
    num = 20 if what != "between" else 8
    found = carry_out(trials(what, how, tmp_path, num=num))
    print(f"{what}, one rank {how}: {num} trials; the others raised {dict(found)}")
    assert found.total() == 2 * num

"""The pools that the distributed tests stand on: they run, isolate, report and end."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any, Never

import psutil
import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPools, RanksFailedError
from rank_server import set_warning_filters

_count = itertools.count()


def sum_of_ranks() -> tuple[int, int, float]:
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def pid() -> int:
    return os.getpid()


def echo(value: object, *, other: object) -> tuple[object, object, int]:
    return value, other, dist.get_rank()


def change_everything(directory: Path) -> None:
    next(_count)
    os.chdir(directory)
    os.environ["LEFT_BEHIND"] = "yes"
    os.environ["OMP_NUM_THREADS"] = "3"
    random.seed(99)
    torch.manual_seed(99)
    torch.set_default_dtype(torch.float64)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    dist.new_group([0])
    dist.distributed_c10d._get_default_store().set("left", "behind")


def surroundings() -> dict[str, Any]:
    return {
        "count": next(_count),
        "directory": Path.cwd(),
        "left": os.environ.get("LEFT_BEHIND"),
        "threads": os.environ["OMP_NUM_THREADS"],
        "random": random.random(),
        "torch": torch.rand(1).item(),
        "dtype": torch.get_default_dtype(),
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "store": dist.distributed_c10d._get_default_store().check(["left"]),
    }


def variable(name: str) -> str | None:
    return os.environ.get(name)


def warn() -> None:
    warnings.warn("a warning", UserWarning, stacklevel=1)


def fail_on(rank: int) -> None:
    print(f"output of {dist.get_rank()}", flush=True)
    if dist.get_rank() == rank:
        raise FileNotFoundError("no such thing")


class UnpicklableError(Exception):
    def __reduce__(self) -> Never:
        raise TypeError("stays here")


def fail_unpicklably() -> None:
    raise UnpicklableError("but its text travels")


def return_a_lock() -> object:
    return threading.Lock()


def wait_for_all_but(rank: int) -> None:
    if dist.get_rank() != rank:
        dist.barrier()
    else:
        the_place_where_it_hangs()


def the_place_where_it_hangs() -> None:
    threading.Event().wait()


def die_on(rank: int) -> str:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return "lives"


def exit_on_every_rank() -> Never:
    raise SystemExit(3)


def leave_a_thread_and_a_child() -> int:
    threading.Thread(target=threading.Event().wait).start()
    child = os.fork()
    if child == 0:
        time.sleep(600)
    return child


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_rank_runs_the_function_in_one_process_group(ranks: RankPools, num_ranks: int) -> None:
    total = sum(range(num_ranks))
    assert ranks(num_ranks).run(sum_of_ranks) == [(rank, num_ranks, total) for rank in range(num_ranks)]


def test_ranks_are_processes_reused_from_run_to_run(ranks: RankPools) -> None:
    pids = ranks(2).run(pid)
    assert len({*pids, os.getpid()}) == 3
    assert ranks(2).run(pid) == pids == ranks(2).pids


def test_arguments_and_results_travel(ranks: RankPools) -> None:
    [first, second] = ranks(2).run(echo, torch.arange(3), other={"path": Path("x")})
    assert torch.equal(first[0], torch.arange(3))
    assert second[1:] == ({"path": Path("x")}, 1)


def test_a_run_sees_nothing_of_the_run_before(ranks: RankPools, tmp_path: Path) -> None:
    before = ranks(2).run(surroundings)
    ranks(2).run(change_everything, tmp_path)
    assert ranks(2).run(surroundings) == before
    assert before[0]["directory"] == Path.cwd()
    assert before[0]["sigterm"]


def test_a_run_sees_the_directory_and_the_environment_of_the_test(
    ranks: RankPools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(2).run(pid)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_THE_TEST", "yes")
    assert ranks(2).run(variable, "OF_THE_TEST") == ["yes", "yes"]
    assert ranks(2).run(surroundings)[1]["directory"] == tmp_path
    monkeypatch.delenv("OF_THE_TEST")
    assert ranks(2).run(variable, "OF_THE_TEST") == [None, None]


def test_a_failure_shows_the_traceback_and_the_output_of_its_rank(ranks: RankPools) -> None:
    with pytest.raises(RanksFailedError) as raised:
        ranks(2).run(fail_on, 1)
    message = str(raised.value)
    assert "fail_on failed on 1 of 2 ranks" in message
    assert 'raise FileNotFoundError("no such thing")' in message
    assert "output of 1" in message
    assert "output of 0" not in message
    first, second = raised.value.outcomes
    assert first.ok
    assert isinstance(second.error, FileNotFoundError)


def test_ranks_that_answered_are_kept_after_a_failure(ranks: RankPools) -> None:
    pids = ranks(2).run(pid)
    ranks(2).outcomes(fail_on, 0)
    assert ranks(2).run(pid) == pids


def test_a_warning_is_an_error_unless_it_is_exempted(ranks: RankPools) -> None:
    [outcome] = ranks(1).outcomes(warn)
    assert isinstance(outcome.error, UserWarning)
    with warnings.catch_warnings():
        set_warning_filters(["error", "ignore:a warn:UserWarning"])
        warn()


def test_what_cannot_be_pickled_is_told_as_text(ranks: RankPools) -> None:
    [outcome] = ranks(1).outcomes(fail_unpicklably)
    assert isinstance(outcome.error, RuntimeError)
    assert "but its text travels" in str(outcome.error)
    with pytest.raises(RanksFailedError, match="cannot pickle"):
        ranks(1).run(return_a_lock)


def test_only_functions_that_others_can_import_are_run(ranks: RankPools) -> None:
    with pytest.raises(TypeError, match="no top-level function"):
        ranks(1).run(lambda: None)


def test_a_hang_shows_the_stacks_and_fails(ranks: RankPools) -> None:
    with pytest.raises(RanksFailedError) as raised:
        ranks.fresh(2, timeout_s=8).run(wait_for_all_but, 1)  # importing this module may take seconds
    message = str(raised.value)
    assert "in the_place_where_it_hangs" in message
    assert "in barrier" in message
    assert [outcome.hung for outcome in raised.value.outcomes] == [True, True]


def test_fresh_ranks_outlive_one_that_is_killed(ranks: RankPools) -> None:
    first, second, third = ranks.fresh(3).outcomes(die_on, 0)
    assert first.died
    assert (second.value, third.value) == ("lives", "lives")


def test_a_pool_whose_rank_died_is_replaced(ranks: RankPools) -> None:
    pids = ranks(1).run(pid)
    with pytest.raises(RanksFailedError, match="rank 0 died"):
        ranks(1).run(die_on, 0)
    assert ranks(1).pids == []
    assert ranks(1).run(pid) != pids


def test_an_exit_is_a_failure_and_not_the_end_of_the_rank(ranks: RankPools) -> None:
    [outcome] = ranks(1).outcomes(exit_on_every_rank)
    assert isinstance(outcome.error, SystemExit)
    assert not outcome.died


def test_closing_ends_every_process(ranks: RankPools) -> None:
    pools = RankPools()
    children = pools(1).run(leave_a_thread_and_a_child)
    pids = [*children, *pools(1).pids, *pools.fresh(1).run(pid)]
    pools.close()
    assert not [pid for pid in pids if psutil.pid_exists(pid)]

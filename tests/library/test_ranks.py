"""Saves and restores on several real ranks."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import jobs
import pytest
from rank_pool import RankPools

from distckpt.waiter import Waiter

LAYOUTS = ["sharded", "full"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_state_comes_back_on_the_same_ranks(ranks: RankPools, tmp_path: Path, layout: str):
    saved = ranks(2).run(jobs.save_run, str(tmp_path / "run"), layout, 5)
    loaded = ranks(2).run(jobs.restore_run, str(tmp_path / "run"))
    for rank in range(2):
        assert loaded[rank]["step"] == 5
        assert loaded[rank]["in_place"]
        assert loaded[rank]["facts"] == saved[0]["facts"] | {
            key: saved[rank]["facts"][key] for key in ("optimizer", "scheduler", "extra")
        }
        assert loaded[rank]["own"] == saved[rank]["own"]
        assert loaded[rank]["draws"] == saved[rank]["draws"]
    assert saved[0]["draws"] != saved[1]["draws"]


@pytest.mark.parametrize(("saving", "layout"), [*itertools.product([1, 2, 3, 4], LAYOUTS)])
def test_any_number_of_ranks_restores_what_any_other_saved(ranks: RankPools, tmp_path: Path, saving: int, layout: str):
    saved = ranks(saving).run(jobs.save_run, str(tmp_path / "run"), layout, 3)
    for loading in (1, 2, 3, 4):
        for rank, loaded in enumerate(ranks(loading).run(jobs.restore_run, str(tmp_path / "run"))):
            assert loaded["step"] == 3
            assert loaded["facts"] == saved[0]["facts"]
            expected = saved[rank]["own"] if rank < saving else {"shard": rank}
            assert loaded["own"] == expected


def test_replicated_state_is_written_once_and_evenly(ranks: RankPools, tmp_path: Path):
    row_bytes = 128 * 4
    total = (1001 * 128 + 3 * 3 + 3) * 4
    for num_ranks in (1, 2, 3, 4):
        directory = str(tmp_path / f"{num_ranks}")
        ranks(num_ranks).run(jobs.save_big, directory)
        sizes = jobs.bytes_by_rank(directory)
        assert sum(sizes) == total
        assert max(sizes) <= total / num_ranks + row_bytes


def test_state_that_differs_by_rank_survives_without_a_mark(ranks: RankPools, tmp_path: Path):
    ranks(2).run(jobs.save_differing, str(tmp_path / "one"))
    assert ranks(2).run(jobs.load_differing, str(tmp_path / "one")) == [
        (100, {"rank": 0, "pos": 0}),
        (101, {"rank": 1, "pos": 1000}),
    ]
    *_, third = ranks(3).run(jobs.load_differing, str(tmp_path / "one"))
    assert third == (100, {"rank": 0, "pos": 0})


def test_a_failing_state_dict_is_raised_on_all_ranks_with_the_ranks_name(ranks: RankPools, tmp_path: Path):
    for error in ranks(3).run(jobs.save_broken, str(tmp_path / "one"), 2):
        assert error.startswith("RankFailedError: save of step 0 abandoned: rank 2 (host ")
        assert "ValueError: planned failure" in error
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_failed_background_save_is_raised_later_and_poisons_nothing(ranks: RankPools, tmp_path: Path):
    for outcome in ranks(2).run(jobs.fail_in_background, str(tmp_path / "run")):
        assert outcome["error"].startswith("StorageError: could not write ")
        assert "step-000000000002" in outcome["error"]
        assert outcome["steps"] == [1, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("key", "'more' is not on all ranks"),
        ("shape", "'model': the modules of rank 0 and rank 1"),
        ("step", "rank 1 at 'save of step 1'"),
    ],
)
def test_ranks_that_save_different_things_are_told_so(ranks: RankPools, tmp_path: Path, change: str, words: str):
    for error in ranks(2).run(jobs.mismatched, str(tmp_path / "one"), **{change: True}):
        assert error.startswith("UsageError")
        assert words in error


def test_a_rank_that_does_not_come_is_named_within_the_timeout(ranks: RankPools, tmp_path: Path):
    *errors, _ = ranks(3).run(jobs.leave_one_out, str(tmp_path / "one"))
    for error in errors:
        # If these ranks have never met before, they miss each other earlier.
        where = r"(naming the run|meeting of the ranks)"
        assert re.match(rf"RankTimeoutError: {where} abandoned: rank 2 did not arrive within 3 s", error)


def test_ranks_that_miss_one_while_a_save_is_prepared_do_not_wait_for_it_again(ranks: RankPools, tmp_path: Path):
    first, left, last = ranks(3).run(jobs.prepare_without_one_rank, str(tmp_path))
    assert left == "KeyboardInterrupt: "
    for error in (first, last):
        assert error.startswith("RankTimeoutError: save of step 1 abandoned: rank 1 did not arrive within 3 s")


@pytest.mark.parametrize("absent", [[0], [2], [2, 3]])
def test_a_rank_whose_patience_ends_first_names_just_those_who_have_not_come(ranks: RankPools, absent: list[int]):
    assert ranks(4).run(jobs.wait_with_little_patience, absent)[1] == absent


@pytest.mark.parametrize("synchronised", [True, False])
@pytest.mark.parametrize("signalled", [[0], [1], [0, 1]])
def test_a_signal_on_any_rank_stops_all_at_one_saved_step(
    ranks: RankPools, tmp_path: Path, signalled: list[int], synchronised: bool
):
    outcomes = ranks(2).run(jobs.stop_by_signal, str(tmp_path / "run"), signalled, 7, synchronised)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["preempted"]
    assert outcomes[0]["saved"] == outcomes[0]["done"]
    if synchronised:
        assert outcomes[0]["done"] in (7, 8)


def test_what_two_ranks_saved_under_ddp_loads_in_a_plain_process(ranks: RankPools, tmp_path: Path):
    saved = ranks(2).run(jobs.save_run, str(tmp_path / "run"), "sharded", 4)
    loaded = jobs.restore_without_torchrun(str(tmp_path / "run"))
    assert loaded["step"] == 4
    assert loaded["facts"] == saved[0]["facts"]


def test_ranks_that_call_different_verbs_are_told_so(ranks: RankPools, tmp_path: Path):
    for error in ranks(2).run(jobs.do_different_things, str(tmp_path / "run")):
        assert error.startswith("UsageError: the ranks have parted: rank 0 is at 'restore: choosing a checkpoint'")
        assert "rank 1 at 'taking the directory'" in error


def test_a_later_save_takes_less_than_a_kilobyte_on_the_wire_however_many_tensors_there_are(
    ranks: RankPools, tmp_path: Path
):
    few = ranks(4).run(jobs.count_bytes_of_a_later_save, str(tmp_path / "few"), 10)
    many = ranks(4).run(jobs.count_bytes_of_a_later_save, str(tmp_path / "many"), 2000)
    assert 100 < min(few) <= max(many) < 1000
    assert max(many) - max(few) < 100


def test_all_ranks_read_the_manifest_at_once_and_prepare_while_rank_0_chooses(ranks: RankPools, tmp_path: Path):
    saved = ranks(2).run(jobs.save_run, str(tmp_path / "run"), "sharded", 4)
    for found in ranks(2).run(jobs.restore_and_watch, str(tmp_path / "run")):
        assert (found["step"], found["facts"], found["parsed"]) == (4, saved[0]["facts"], 1)
        assert found["met"] == ["choosing", "choosing", "reading", "loading"]


@pytest.mark.parametrize(("trouble", "num_parsed"), [("older", 2), ("fails", 1)])
def test_what_a_rank_could_not_prepare_meanwhile_all_prepare_again(
    ranks: RankPools, tmp_path: Path, trouble: str, num_parsed: int
):
    saved = ranks(2).run(jobs.save_run, str(tmp_path / "run"), "sharded", 4)
    first, second = ranks(2).run(jobs.restore_and_watch, str(tmp_path / "run"), trouble)
    for found in (first, second):
        assert (found["step"], found["facts"]) == (4, saved[0]["facts"])
        assert found["met"] == ["choosing", "choosing", "checking", "reading", "loading"]
    assert (first["parsed"], second["parsed"]) == (1, num_parsed)


def test_an_error_of_another_kind_while_rank_0_chooses_is_told_at_once(ranks: RankPools, tmp_path: Path):
    ranks(2).run(jobs.save_run, str(tmp_path / "run"), "sharded", 4)
    for error in ranks(2).run(jobs.fail_to_match, str(tmp_path / "run"), victim=1):
        assert error.startswith("RankFailedError: restore: choosing a checkpoint abandoned: rank 1 "), error
        assert "ArithmeticError: made by the test" in error


def test_what_ranks_say_to_each_other_does_not_stay_in_the_store(ranks: RankPools, tmp_path: Path):
    for numbers in ranks(3).run(jobs.count_keys_in_the_store, str(tmp_path / "run")):
        assert max(numbers[1:]) == numbers[1]
    for numbers in ranks(3).run(jobs.count_keys_of_single_saves, str(tmp_path)):
        assert numbers[2] - numbers[1] == numbers[1] - numbers[0] <= 1  # of each channel, the last verdict


def test_the_thread_that_waits_for_others_ends_with_its_channel():
    waiter = Waiter()
    waiter.do(lambda: None, limit_s=60.0)
    thread = waiter._thread
    assert thread is not None
    del waiter
    thread.join(60)
    assert not thread.is_alive()

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import StateMismatchError
from distckpt.trainer.order import Plan, Position, RankBatches, derive_seed, epoch_order, share


def steps_of(plan: Plan, *, done: int, stop: int, world_size: int, accumulate: int) -> list[list[tuple[int, int]]]:
    """Return what all ranks together see in each step from `done` to `stop`."""
    ranks = [
        iter(RankBatches(plan=plan, done=done, rank=rank, world_size=world_size, accumulate=accumulate))
        for rank in range(world_size)
    ]
    return [[key for rank in ranks for _ in range(accumulate) for key in next(rank)] for _ in range(done, stop)]


@given(st.data())
def test_however_a_run_is_stopped_every_epoch_sees_every_sample_once(data: st.DataObject) -> None:
    plan = Plan(
        seed=data.draw(st.integers(0, 2**63 - 1)),
        num_samples=data.draw(st.integers(1, 60)),
        global_batch_size=data.draw(st.integers(1, 20)),
        epochs=data.draw(st.integers(1, 3)),
    )
    seen: list[list[tuple[int, int]]] = []
    while len(seen) < plan.total_steps:
        stop = data.draw(st.integers(len(seen) + 1, plan.total_steps))
        world_size, accumulate = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
        seen += steps_of(plan, done=len(seen), stop=stop, world_size=world_size, accumulate=accumulate)
    keys = Counter(key for step in seen for key in step)
    assert keys == {(epoch, index): 1 for epoch in range(plan.epochs) for index in range(plan.num_samples)}
    undisturbed = steps_of(plan, done=0, stop=plan.total_steps, world_size=1, accumulate=1)
    assert [sorted(step) for step in seen] == [sorted(step) for step in undisturbed]


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 12))
def test_shares_differ_by_one_at_most_and_the_first_are_the_larger(start: int, size: int, num_parts: int) -> None:
    shares = [share(start, start + size, part, num_parts) for part in range(num_parts)]
    assert [position for piece in shares for position in piece] == list(range(start, start + size))
    lengths = [len(piece) for piece in shares]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


def test_orders_of_other_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_is_frozen_for_good() -> None:
    assert epoch_order(0, 0, 10).tolist() == [2, 9, 1, 7, 8, 0, 3, 6, 4, 5]
    assert derive_seed("augment", 1, 2, 3) == 506562606169280735


def test_the_last_batch_of_an_epoch_is_the_rest() -> None:
    plan = Plan(seed=0, num_samples=10, global_batch_size=4, epochs=2)
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 6)
    assert [plan.bounds(step) for step in (0, 2, 3)] == [(0, 0, 4), (0, 8, 10), (1, 0, 4)]
    assert [plan.samples_seen(step) for step in range(7)] == [0, 4, 8, 10, 14, 18, 20]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.integers(1, 3))
def test_batch_sizes_are_those_that_occur(num_samples: int, batch: int, world_size: int, accumulate: int) -> None:
    plan = Plan(seed=0, num_samples=num_samples, global_batch_size=batch, epochs=1)
    occurring = {
        len(keys)
        for rank in range(world_size)
        for keys in RankBatches(plan=plan, done=0, rank=rank, world_size=world_size, accumulate=accumulate)
    }
    assert plan.batch_sizes(world_size=world_size, accumulate=accumulate) == occurring


def test_a_position_survives_its_state_dict_at_every_step() -> None:
    plan = Plan(seed=3, num_samples=10, global_batch_size=4, epochs=2)
    for step in range(plan.total_steps + 1):
        before, after = Position(plan), Position(plan)
        before.step = step
        after.load_state_dict(before.state_dict())
        assert after.step == step


def test_a_position_counted_in_other_data_is_refused() -> None:
    old = Position(Plan(seed=3, num_samples=10, global_batch_size=4, epochs=2))
    new = Position(Plan(seed=3, num_samples=11, global_batch_size=4, epochs=2))
    with pytest.raises(StateMismatchError, match=r"data\.num_samples: the checkpoint has 10, the run has 11"):
        new.load_state_dict(old.state_dict())

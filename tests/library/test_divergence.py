"""Replicas that differ are found within a known number of saves, and no NaN or infinity is missed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distckpt.divergence import combined, differences, digests, non_finite, num_turns, replicas, sample
from distckpt.slots import PerRank
from distckpt.state import flatten

SHAPES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7)), max_size=6)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8, torch.complex64, torch.bool])


@st.composite
def states(draw):
    return {f"t{i}": torch.zeros(shape, dtype=draw(DTYPES)) for i, shape in enumerate(draw(SHAPES))}


@given(states(), st.integers(1, 300), st.integers(0, 10**6))
def test_any_turns_in_a_row_cover_every_element(tensors, budget_bytes, turn):
    seen = {name: torch.zeros(tensor.numel(), dtype=torch.bool) for name, tensor in tensors.items()}
    for number in range(num_turns(tensors, budget_bytes=budget_bytes)):
        windows = sample(tensors, turn=turn + number, budget_bytes=budget_bytes)
        taken = sum((w.end - w.begin) * tensors[w.name].element_size() for w in windows)
        assert taken <= budget_bytes + 2 * 8  # an element on either edge
        for window in windows:
            seen[window.name][window.begin : window.end] = True
    assert all(places.all() for places in seen.values())


@settings(max_examples=50)
@given(st.integers(0, 1499), st.integers(0, 31), st.integers(0, 2))
def test_one_flipped_bit_on_one_rank_is_found_with_its_name_and_rank(place, bit, rank):
    ranks = [{"a": torch.arange(500.0), "b": torch.arange(1000.0).reshape(20, 50).t()} for _ in range(3)]
    name, index = ("a", place) if place < 500 else ("b", place - 500)
    tensor = ranks[rank][name] = ranks[rank][name].clone(memory_format=torch.contiguous_format)
    tensor.view(torch.int32).view(-1)[index] ^= -(2**31) if bit == 31 else 1 << bit
    found = []
    for turn in range(num_turns(ranks[0], budget_bytes=1000)):
        windows = sample(ranks[0], turn=turn, budget_bytes=1000)
        by_rank = [digests(tensors, windows) for tensors in ranks]
        found += differences(by_rank)
        assert bool(differences(by_rank)) == (len({combined(one) for one in by_rank}) > 1)
    assert {(one.name, one.ranks) for one in found} == {(name, (rank,))}


def test_of_two_groups_as_large_the_one_with_rank_0_counts():
    [found] = differences([{"w": "x"}, {"w": "y"}, {"w": "x"}, {"w": "y"}])
    assert (found.name, found.ranks) == ("w", (1, 3))
    [found] = differences([{"w": "y"}, {"w": "x"}, {"w": "x"}])
    assert found.ranks == (0,)
    assert differences([{"w": "x"}, {"w": "x"}]) == []


def test_only_what_every_rank_must_hold_alike_is_compared():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "own": PerRank(nn.Linear(2, 2)), "value": torch.ones(2)}
    names = set(replicas(flatten(state, rng=True)))
    assert {"model.0.weight", "model.1.bias", "optimizer.state.0.momentum_buffer"} <= names
    assert all(name.startswith(("model.", "optimizer.")) for name in names)
    assert not [name for name in names if "running" in name or "num_batches" in name]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e5m2]
)
def test_a_single_bad_number_is_named(dtype: torch.dtype, value: float):
    good = torch.linspace(-3, 3, 1001).to(dtype)
    bad = good.clone()
    bad[700] = value
    tensors = {"a": good, "b": bad.reshape(7, 11, 13).transpose(0, 2), "c": good.clone(), "n": torch.arange(3)}
    assert non_finite(tensors) == ["b"]


def test_numbers_that_are_large_but_finite_are_good():
    tensors = {
        "huge": torch.full((1000,), torch.finfo(torch.float32).max),
        "half": torch.full((1000,), torch.finfo(torch.float16).max, dtype=torch.float16),
        "fp8": torch.full((1000,), 448.0).to(torch.float8_e4m3fn),
        "empty": torch.empty(0),
        "scalar": torch.tensor(1e308, dtype=torch.float64),
    }
    assert non_finite(tensors) == []
    assert non_finite({}) == []


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    one = {"a": torch.arange(1000.0), "b": torch.ones(7, 9, dtype=torch.bfloat16).t(), "c": torch.arange(5)}
    other = {name: tensor.cuda() for name, tensor in one.items()}
    windows = sample(one, turn=1, budget_bytes=3000)
    assert windows == sample(other, turn=1, budget_bytes=3000)
    assert digests(one, windows) == digests(other, windows)
    other["b"][2, 2] = math.nan
    assert non_finite(other) == ["b"]

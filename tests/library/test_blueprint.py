"""A blueprint returns, to the letter, what encoding anew returns, or says that it does not know."""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distckpt.blueprint import Blueprint, Unknown
from distckpt.errors import UnsupportedStateError
from distckpt.manifest import to_text
from distckpt.state import Blueprints, flatten
from distckpt.values import encode

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf]),
    st.sampled_from(["", "a", "$tensor"]),
    st.binary(max_size=2),
    st.sampled_from([np.float64(1.0), np.int64(1), np.float32(1.0)]),
)
TENSOR = st.builds(
    lambda size, dtype: torch.ones(size, dtype=dtype), st.integers(0, 3), st.sampled_from([torch.float32, torch.int64])
)
KEYS = st.one_of(st.sampled_from(["a", "b", "$x", "group2", "group10"]), st.sampled_from([0, 1, True, 1.0]))
VALUES = st.recursive(
    st.one_of(PLAIN, TENSOR),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=2).map(OrderedDict),
    ),
    max_leaves=12,
)


def encoded(value: Any) -> tuple[str, list[Any]]:
    found: list[Any] = []

    def leaf(key: str, each: Any) -> Any:
        if isinstance(each, (torch.Tensor, np.ndarray)):
            found.append(each)
            return {"$tensor": key}
        return None

    return to_text(encode(value, "state", leaf)), found


def tree_of(value: Any) -> Any:
    return encode(value, "state", lambda key, each: {"$tensor": key} if isinstance(each, torch.Tensor) else None)


@given(first=VALUES, second=VALUES)
def test_following_is_encoding_anew_or_is_refused(first: Any, second: Any) -> None:
    try:
        blueprint = Blueprint(first, "state", tree_of(first), shares_memory=False)
    except Unknown:
        return
    assert blueprint.text == encoded(first)[0]
    tensors = blueprint.follow(second)
    text, expected = encoded(second)
    if tensors is not None:
        assert (blueprint.text, [id(t) for t in tensors]) == (text, [id(t) for t in expected])
        assert to_text(blueprint.tree) == text


@given(value=VALUES)
def test_the_same_structure_is_followed(value: Any) -> None:
    try:
        blueprint = Blueprint(value, "state", tree_of(value), shares_memory=False)
    except Unknown:
        return
    again = copy.deepcopy(value)
    tensors = blueprint.follow(again)
    assert tensors is not None
    assert [id(t) for t in tensors] == [id(t) for t in encoded(again)[1]]


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.ones(3), "n": [1]},
        {"x": torch.ones(2, dtype=torch.float64), "n": [1]},
        {"x": torch.ones(2), "n": torch.ones(1)},
        {"x": [torch.ones(2)], "n": [1]},
        {"n": [1], "x": torch.ones(2)},
        {"x": torch.ones(2).to_sparse(), "n": [1]},
        {"x": torch.ones(2)},
    ],
    ids=["shape", "dtype", "a tensor for a value", "nested", "order", "sparse", "fewer"],
)
def test_another_structure_is_not_followed(changed: Any) -> None:
    value = {"x": torch.ones(2), "n": [1]}
    assert Blueprint(value, "state", tree_of(value), shares_memory=False).follow(changed) is None


@pytest.mark.parametrize(("old", "new"), [(1, True), (1, 1.0), (0.0, -0.0), ((1,), [1]), (b"\0" * 8, np.float64(0.0))])
def test_values_that_are_equal_but_not_the_same_are_encoded_anew(old: Any, new: Any) -> None:
    before = {"x": torch.ones(1), "v": old}
    blueprint = Blueprint(before, "state", tree_of(before), shares_memory=False)
    assert blueprint.follow({"x": torch.ones(1), "v": new}) is not None
    assert blueprint.text == encoded({"x": torch.ones(1), "v": new})[0]


def test_a_list_that_is_changed_in_place_is_seen() -> None:
    state = {"losses": [1.0], "x": torch.ones(1)}
    blueprints = Blueprints()
    flatten(state, rng=False, blueprints=blueprints)
    state["losses"].append(2.0)
    flat = {o.key: o for o in flatten(state, rng=False, blueprints=blueprints)}
    assert flat["losses"].tree == [1.0, 2.0]


def test_a_value_that_cannot_be_saved_is_refused_also_later() -> None:
    state: dict[str, Any] = {"v": {"n": 1, "x": torch.ones(1)}}
    blueprints = Blueprints()
    flatten(state, rng=False, blueprints=blueprints)
    state["v"]["n"] = object()
    with pytest.raises(UnsupportedStateError, match=r"v\.n"):
        flatten(state, rng=False, blueprints=blueprints)
    state["v"]["n"] = 2
    assert flatten(state, rng=False, blueprints=blueprints)[0].tree["n"] == 2


def test_weights_that_are_tied_or_untied_later_are_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    blueprints = Blueprints()
    (untied,) = flatten({"model": model}, rng=False, blueprints=blueprints)
    model[1].weight = model[0].weight
    (tied,) = flatten({"model": model}, rng=False, blueprints=blueprints)
    (again,) = flatten({"model": model}, rng=False, blueprints=blueprints)
    assert [len(each.tensors) for each in (untied, tied, again)] == [4, 3, 3]
    assert again.structure is tied.structure


def test_a_parameter_that_becomes_a_buffer_is_seen() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    model, blueprints = Model(), Blueprints()
    flatten({"model": model}, rng=False, blueprints=blueprints)
    del model.scale
    model.register_buffer("scale", torch.ones(1))
    (flat,) = flatten({"model": model}, rng=False, blueprints=blueprints)
    assert flat.structure.owners == (0,)


def test_rarer_containers_with_tensors_are_encoded_each_time() -> None:
    state = {"c": Counter(a=1), "x": torch.ones(1)}
    blueprints = Blueprints()
    first, second = (flatten(state, rng=False, blueprints=blueprints) for _ in range(2))
    assert [o.text for o in first] == [o.text for o in second]


def test_the_structure_is_the_same_object_as_long_as_nothing_changes() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state, blueprints = {"model": model, "optimizer": optimizer}, Blueprints()
    first = flatten(state, rng=True, blueprints=blueprints)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    second = flatten(state, rng=True, blueprints=blueprints)
    assert all(one.structure is other.structure for one, other in zip(first, second, strict=True))
    assert '["lr",0.5]' in second[1].text
    assert [o.text for o in second] == [o.text for o in flatten(state, rng=True)]

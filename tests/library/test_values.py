"""Values go through JSON and come back the same, types and order included."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import UnsupportedStateError
from distckpt.values import decode, encode, references

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=20),
    st.floats(width=32).map(np.float32),
    st.floats().map(np.float64),
    st.integers(-(2**31), 2**31 - 1).map(np.int32),
    st.booleans().map(np.bool_),
    st.complex_numbers(allow_nan=False).map(np.complex128),
)
KEYS = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(st.text(), st.integers(), max_size=3).map(Counter),
    ),
    max_leaves=12,
)


def there_and_back(value):
    tree = json.loads(json.dumps(encode(value, "value", lambda _key, _value: None), allow_nan=False, sort_keys=True))
    return decode(tree, lambda _tag, name: name)


def same(one, other) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return [*map(repr, one)] == [*map(repr, other)] and all(
            same(x, y) for x, y in zip(one.values(), other.values(), strict=True)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(x, y) for x, y in zip(one, other, strict=True))
    if isinstance(one, (float, np.floating)):
        return (math.isnan(one) and math.isnan(other)) or repr(one) == repr(other)
    return bool(one == other)


@given(VALUES)
def test_a_value_comes_back_the_same(value):
    assert same(there_and_back(value), value)


TREES = st.recursive(
    st.one_of(st.none(), st.text(max_size=2), st.builds(lambda name: {"$tensor": name}, st.text(max_size=2))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["$dict", "$tensor", "a", "b"]), inner, max_size=3)
    ),
    max_leaves=12,
)


def named(tree) -> list[str]:
    if isinstance(tree, list):
        return [name for item in tree for name in named(item)]
    if not isinstance(tree, dict):
        return []
    if tree.keys() == {"$tensor"} and isinstance(tree["$tensor"], str):
        return [tree["$tensor"]]
    return named(list(tree.values()))


@given(TREES)
def test_every_reference_is_found_in_its_order(tree):
    assert list(references(tree)) == named(tree)


@pytest.mark.parametrize(
    "value", [-0.0, 5e-324, math.inf, -math.inf, math.nan, 2**200, {"$tensor": "x"}, {"b": 1, "a": 2}]
)
def test_odd_values_come_back_the_same(value):
    assert same(there_and_back(value), value)


@pytest.mark.parametrize("value", [lambda: 0, object(), {1, 2}, np.datetime64("2020"), {object(): 1}, [1, [print]]])
def test_what_cannot_be_exact_is_refused_by_key(value):
    with pytest.raises(UnsupportedStateError, match=r"state entry 'value"):
        encode(value, "value", lambda _key, _value: None)


def test_a_value_that_holds_itself_is_refused():
    value: list = []
    value.append(value)
    with pytest.raises(UnsupportedStateError, match="nested"):
        encode(value, "value", lambda _key, _value: None)


@pytest.mark.parametrize("tree", [{"$what": 1}, {"$tuple": 3}, {"$tensor": 1}, {"$bytes": "?"}, {"$tuple": [], "a": 1}])
def test_json_that_encode_never_makes_is_refused(tree):
    with pytest.raises(ValueError):  # noqa: PT011  any of its kinds
        decode(tree, lambda _tag, name: name)

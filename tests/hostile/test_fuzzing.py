"""No bytes make a reader raise what its contract does not name; what fuzzing found before is tried again each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fuzz_targets import TARGETS, fuzz_manifest, fuzz_values, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("x")),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=12,
)
TAGS = ["$tensor", "$array", "$tuple", "$dict", "$counter", "$bytes", "$float", "$numpy", "$other"]
TREES = st.recursive(
    JSON,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(TAGS), inner, min_size=1, max_size=1),
        st.dictionaries(st.sampled_from(TAGS), st.lists(st.lists(inner, max_size=3), max_size=3), max_size=1),
        st.builds(lambda *parts: {"$numpy": list(parts)}, st.sampled_from(["int8", "float32", "bool", "O"]), inner),
    ),
    max_leaves=10,
)


@pytest.mark.parametrize("target", TARGETS)
def test_what_fuzzing_found_keeps_the_contract(target: str) -> None:
    inputs = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    assert inputs
    for data in [*seeds(target), *inputs]:
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_bytes_keep_the_contract(target: str, data: st.DataObject) -> None:
    seed = bytearray(data.draw(st.sampled_from(seeds(target)).filter(bool)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(seed) - 1))
        match data.draw(st.sampled_from(["flip", "put", "cut", "double"])):
            case "flip":
                seed[place] ^= 1 << data.draw(st.integers(0, 7))
            case "put":
                seed[place : place + 1] = data.draw(st.binary(max_size=6))
            case "cut":
                del seed[place : place + data.draw(st.integers(0, 30))]
            case "double":
                seed[place:place] = seed[place : place + data.draw(st.integers(0, 60))]
        seed = seed or bytearray(b"x")
    TARGETS[target](bytes(seed))


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_any_tree_is_decoded_or_refused(tree: Any) -> None:
    fuzz_values(json.dumps(tree).encode())


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [(*path,), *(found for key, item in inner for found in places(item, (*path, key)))]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_part_of_a_manifest_may_be_anything(data: st.DataObject) -> None:
    body = json.loads(seeds("manifest")[0])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(body)[1:]))
        node = body
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = data.draw(
            st.one_of(JSON, TREES, st.integers(-(2**65), 2**65), st.sampled_from([[], {}, 0, 1]))
        )
    fuzz_manifest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())

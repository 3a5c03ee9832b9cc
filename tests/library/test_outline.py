"""The quick look at a manifest finds what the thorough one does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt import outline
from distckpt.checksum import digest
from distckpt.chunks import Chunk
from distckpt.errors import CheckpointDamagedError, FormatVersionError
from distckpt.manifest import DataFile, Manifest, ObjectEntry, Segment, TensorEntry, parse, serialize

ODD = st.sampled_from(["step", "run", "parent", "tensors", ',"tensors":{', '"', "\\", "files", "ä", "],", "model.fc"])
TEXT = st.text(max_size=8) | ODD
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    num_files = draw(st.integers(0, 3))
    sizes = [draw(st.lists(st.integers(1, 99), max_size=3)) for _ in range(num_files)]
    files = tuple(
        DataFile(
            name=f"a1/rank-{rank}.safetensors",
            rank=rank,
            num_bytes=sum(parts),
            segments=tuple(Segment(num_bytes=part, digest="0" * 32) for part in parts),
        )
        for rank, parts in enumerate(sizes)
    )
    tensors = {
        name: TensorEntry(dtype="U8", shape=(0,), chunks=()) for name in draw(st.lists(TEXT, max_size=3, unique=True))
    }
    if files and files[0].num_bytes:
        chunk = Chunk(file=0, offset=0, start=(0,), shape=(1,))
        tensors["whole"] = TensorEntry(dtype="U8", shape=(1,), chunks=(chunk,))
    trees = st.builds(lambda tree: {"$dict": [["value", tree]]} if "$" in json.dumps(tree) else tree, JSON)
    objects = {
        key: ObjectEntry(kind="value", trees=(draw(trees),)) for key in draw(st.lists(TEXT, max_size=3, unique=True))
    }
    return Manifest(
        step=draw(st.integers(0, 1 << 40)),
        run=draw(TEXT),
        attempt="a1",
        layout=draw(st.sampled_from(["full", "sharded"])),
        world_size=draw(st.integers(1, 9)),
        created=draw(st.floats(0, 1e10)),
        writer={"host": draw(TEXT), "pid": draw(st.integers(0, 9))},
        files=files,
        tensors=tensors,
        objects=objects,
        metrics=draw(st.dictionaries(TEXT, st.floats(allow_nan=False), max_size=3)),
        versions=draw(st.dictionaries(TEXT, TEXT, max_size=3)),
        timings=draw(st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=3)),
        parent=draw(st.none() | st.just({"step": 1, "attempt": "b2"})),
        config=draw(st.none() | st.dictionaries(TEXT, JSON, max_size=3)),
    )


def facts(found: Any) -> dict[str, Any]:
    return {name: getattr(found, name) for name in outline.Outline.__dataclass_fields__}


@given(manifests())
def test_it_is_what_parsing_finds(manifest: Manifest) -> None:
    data = serialize(manifest)
    try:
        parsed = parse(data, path="")
    except CheckpointDamagedError:  # such trees refer to tensors that are not there
        return
    assert facts(outline.outline(data, path="")) == facts(parsed)


def a_manifest(**changes: Any) -> bytes:
    facts = {"step": 3, "run": "r", "attempt": "a1", "layout": "full", "world_size": 1, "created": 1.5}
    rest = {"writer": {"host": "h", "pid": 1}, "files": (), "tensors": {}, "objects": {}}
    return serialize(Manifest(**{**facts, **rest, **changes}))


def test_a_usual_manifest_needs_no_parsing() -> None:
    assert outline._skim(a_manifest(config={"a": [1]}, parent={"step": 1, "attempt": "a0"})) is not None


def test_a_state_that_looks_like_the_manifest_is_left_to_the_parser() -> None:
    like = {"parent": None, "run": "x", "step": 9, "tensors": {}}
    data = a_manifest(objects={"a": ObjectEntry(kind="value", trees=({"a": 1, **like},))})
    assert outline._skim(data) is None
    assert outline.outline(data, path="").step == 3


TWICE = {
    "attempt": '"b2"',
    "config": '{"a":2}',
    "created": "7.5",
    "files": '[{"bytes":9,"name":"a1/rank-0.safetensors","rank":0,"segments":[[9,"' + "0" * 32 + '"]]}]',
    "format": "1",
    "layout": '"sharded"',
    "metrics": '{"loss":2.0}',
    "objects": '{"x":{"kind":"value","per_rank":false,"trees":[1]}}',
    "parent": '{"attempt":"b2","step":1}',
    "run": '"other"',
    "step": "8",
    "tensors": "{}",
    "timings": '{"stage":1.0}',
    "versions": '{"torch":"1"}',
    "world_size": "4",
    "writer": '{"host":"other"}',
}


@pytest.mark.parametrize("key", TWICE)
@pytest.mark.parametrize("before", [*TWICE, "xxh3"])
def test_a_key_that_stands_there_twice_counts_as_it_does_for_the_parser(key: str, before: str) -> None:
    text = a_manifest()
    place = text.index(f',"{before}":'.encode()) if before != "attempt" else 0
    begun = f'{{"{key}":{TWICE[key]},'.encode() if place == 0 else text[:place] + f',"{key}":{TWICE[key]}'.encode()
    body = (begun + text[max(place, 1) :])[:-44]
    data = body + f',"xxh3":"{digest(body)}"}}\n'.encode()
    assert facts(outline.outline(data, path="")) == facts(parse(data, path=""))


@pytest.mark.parametrize("key", TWICE)
@pytest.mark.parametrize("behind", ["parent", "run", "step", "tensors", "objects"])
def test_nor_does_an_unknown_key_behind_it_hide_it(key: str, behind: str) -> None:
    text = a_manifest()
    place = text.index(f',"{behind}":'.encode())
    more = f',"{key}":{TWICE[key]},"wot":{{}},"tensors":{{}}'.encode()
    for where in (place, text.index(b',"timings":')):
        body = (text[:where] + more + text[where:])[:-44]
        data = body + f',"xxh3":"{digest(body)}"}}\n'.encode()
        assert facts(outline.outline(data, path="")) == facts(parse(data, path=""))


@pytest.mark.parametrize("offset", [3, 60, -1, -20])
def test_a_flipped_bit_is_damage(offset: int) -> None:
    data = bytearray(a_manifest())
    data[offset] ^= 1
    with pytest.raises(CheckpointDamagedError):
        outline.outline(bytes(data), path="")


def test_a_newer_format_is_told() -> None:
    text = a_manifest()[:-44].replace(b'"format":1', b'"format":99')
    with pytest.raises(FormatVersionError):
        outline.outline(text + f',"xxh3":"{digest(text)}"}}\n'.encode(), path="")

"""The manifest comes back the same, and any other byte in it is noticed."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.checksum import digest
from distckpt.chunks import Chunk
from distckpt.errors import CheckpointDamagedError, FormatVersionError
from distckpt.manifest import DataFile, Manifest, ObjectEntry, Segment, TensorEntry, parse, serialize

NAMES = st.text(min_size=1, max_size=12)


@st.composite
def manifests(draw):
    tensors, offset = {}, 4096
    for name in draw(st.sets(NAMES, max_size=5)):
        rows, width = draw(st.integers(0, 5)), draw(st.integers(0, 4))
        cut = draw(st.integers(0, rows))
        chunks = []
        for first, size in ((0, cut), (cut, rows - cut)):
            if size or not chunks:
                chunks.append(Chunk(file=0, offset=offset, start=(first, 0), shape=(size, width)))
                offset += size * width * 4
        tensors[name] = TensorEntry(dtype="F32", shape=(rows, width), chunks=tuple(chunks))
    segments = (Segment(num_bytes=4096, digest=digest(b"h")),)
    if offset > 4096:
        segments += (Segment(num_bytes=offset - 4096, digest=digest(b"d")),)
    file = DataFile(name="abc/rank-00000.safetensors", rank=0, num_bytes=offset, segments=segments)
    return Manifest(
        step=draw(st.integers(0, 10**9)),
        run="r",
        attempt="abc",
        layout=draw(st.sampled_from(["full", "sharded"])),
        world_size=1,
        created=draw(st.floats(0, 1e10)),
        writer={"host": "h", "pid": 1},
        files=(file,),
        tensors=tensors,
        objects={"model": ObjectEntry(kind="module", trees=({name: {"$tensor": name} for name in tensors},))},
        metrics=draw(st.dictionaries(NAMES, st.floats(allow_nan=False), max_size=3)),
        config=draw(st.one_of(st.none(), st.dictionaries(NAMES, st.integers(), max_size=2))),
    )


@given(manifests())
def test_a_manifest_comes_back_the_same(manifest):
    assert parse(serialize(manifest), path="p") == manifest


@given(manifests())
def test_its_keys_are_sorted_and_its_bytes_stable(manifest):
    data = serialize(manifest)
    assert serialize(parse(data, path="p")) == data
    body = json.loads(data)
    assert list(body) == sorted(body)


@settings(max_examples=50)
@given(manifests(), st.randoms(use_true_random=False))
def test_any_flipped_bit_is_noticed(manifest, rng: random.Random):
    data = bytearray(serialize(manifest))
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    with pytest.raises(CheckpointDamagedError):
        parse(bytes(data), path="p")


@settings(max_examples=50)
@given(manifests(), st.integers(0, 10**6))
def test_any_truncation_is_noticed(manifest, keep):
    data = serialize(manifest)
    with pytest.raises(CheckpointDamagedError):
        parse(data[: keep % len(data)], path="p")


def sealed(body: dict) -> bytes:
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()[:-1]
    return text + f',"xxh3":"{digest(text)}"}}\n'.encode()


def a_body() -> dict:
    file = DataFile(name="a/f", rank=0, num_bytes=8, segments=(Segment(num_bytes=8, digest=digest(b"x")),))
    chunk = Chunk(file=0, offset=0, start=(0,), shape=(2,))
    manifest = Manifest(
        step=1,
        run="r",
        attempt="a",
        layout="full",
        world_size=1,
        created=0.0,
        writer={},
        files=(file,),
        tensors={"t": TensorEntry(dtype="F32", shape=(2,), chunks=(chunk,))},
        objects={"x": ObjectEntry(kind="value", trees=({"$tensor": "t"},))},
    )
    body = json.loads(serialize(manifest))
    del body["xxh3"]
    return body


def replaced(path: list, value) -> dict:
    body = a_body()
    node = body
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return body


HOSTILE = {
    "a name that leaves the folder": (["files", 0, "name"], "../../etc/passwd"),
    "an absolute name": (["files", 0, "name"], "/etc/passwd"),
    "an attempt that leaves": (["attempt"], ".."),
    "digests that do not cover": (["files", 0, "bytes"], 9),
    "a negative size": (["files", 0, "segments", 0, 0], -8),
    "a chunk behind the file's end": (["tensors", "t", "chunks", 0, 1], 4),
    "a chunk in a file that is not there": (["tensors", "t", "chunks", 0, 0], 7),
    "a chunk outside its tensor": (["tensors", "t", "chunks", 0, 2], [1]),
    "a huge shape": (["tensors", "t", "shape"], [2**61]),
    "a tensor without chunks": (["tensors", "t", "chunks"], []),
    "an unknown dtype": (["tensors", "t", "dtype"], "OBJ"),
    "a reference to nothing": (["objects", "x", "trees"], [{"$tensor": "u"}]),
    "too many trees": (["objects", "x", "trees"], [1, 2]),
    "a step that is no integer": (["step"], "1"),
    "a layout nobody knows": (["layout"], "round"),
    "files that are no list": (["files"], 3),
    "a run in the first format": (["tensors", "t", "chunks"], [[0, 0, [0], [1], [[0, 2, 1]]]]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_sealed_manifest_that_contradicts_itself_is_refused(name):
    parse(sealed(a_body()), path="p")
    with pytest.raises(CheckpointDamagedError):
        parse(sealed(replaced(*HOSTILE[name])), path="p")


def a_body_with_runs() -> dict:
    """Return a manifest of four files whose headers differ in length, and a tensor in a row of each of them."""
    body = a_body()
    body["format"] = 2
    sizes = [(8 * n, 8) for n in range(1, 5)]
    body["files"] = [
        {"name": f"a/{n}", "rank": n, "bytes": sum(size), "segments": [[each, digest(b"x")] for each in size]}
        for n, size in enumerate(sizes)
    ]
    body["tensors"] = {"t": {"dtype": "F32", "shape": [4, 2], "chunks": [[0, 0, [0, 0], [1, 2], [[0, 4, 1]]]]}}
    return body


def test_a_run_lies_behind_the_header_of_each_of_its_files():
    manifest = parse(sealed(a_body_with_runs()), path="p")
    assert [(c.file, c.offset, c.start, c.shape) for c in manifest.tensors["t"].chunks] == [
        (n, 8 * (n + 1), (n, 0), (1, 2)) for n in range(4)
    ]
    assert serialize(manifest) == sealed(a_body_with_runs())


@pytest.mark.parametrize(
    ("chunk", "problem"),
    [
        ([0, 4, [0, 0], [1, 2], [[0, 4, 1]]], "outside its file"),
        ([1, 0, [0, 0], [1, 2], [[0, 4, 1]]], "behind the last file"),
        ([0, 0, [1, 0], [1, 2], [[0, 4, 1]]], "do not cover"),
        ([0, 0, [0, 0], [1, 2], [[0, 3, 1]]], "do not cover"),
        ([0, 0, [0, 0], [1, 2], [[0, 2, 1], [0, 2, 1]]], "a file twice"),
        ([0, 0, [0, 0], [1, 2], [[1, 4, 1]]], "do not cover"),
        ([0, 0, [0, 0], [2, 2], [[0, 4, 1]]], "outside its file"),
        ([0, 0, [0, 0], [1, 2], [[0, 1 << 62, 1]]], "no integer"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(chunk, problem):
    body = a_body_with_runs()
    body["tensors"]["t"]["chunks"] = [chunk]
    with pytest.raises(CheckpointDamagedError, match=problem):
        parse(sealed(body), path="p")


def test_a_manifest_without_runs_says_the_first_format():
    assert json.loads(serialize(parse(sealed(a_body()), path="p")))["format"] == 1
    body = {**a_body(), "format": 2}
    assert json.loads(serialize(parse(sealed(body), path="p")))["format"] == 1


def test_a_newer_format_is_refused_with_the_way_out():
    with pytest.raises(FormatVersionError, match="pip install --upgrade"):
        parse(sealed(replaced(["format"], 99)), path="p")


def test_a_deeply_nested_manifest_is_refused():
    text = b'{"a":' + b"[" * 100_000
    with pytest.raises(CheckpointDamagedError):
        parse(text + f',"xxh3":"{digest(text)}"}}\n'.encode(), path="p")

"""Runs stand for the same pieces as a list of them, and are refused wherever the list would be."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.chunks import Chunk, Rooms, Runs, check_inside, from_json, to_json
from distckpt.runs import MAX_REPEATS, Repeat, Run, merged
from distckpt.tiling import tiles

HEADER_BYTES = 4096


def singles(chunks: list[Chunk]) -> list[Run]:
    return [Run(c.file, c.offset, c.start, c.shape, ()) for c in chunks]


def as_runs(found: list[Run], num_files: int) -> Runs:
    begins = tuple(HEADER_BYTES + 512 * file for file in range(num_files))
    parts = [run if run.repeats else Chunk(run.file, begins[run.file] + run.offset, *run[2:4]) for run in found]
    return Runs(parts, begins)


def absolute(chunks: list[Chunk]) -> list[Chunk]:
    return [c._replace(offset=HEADER_BYTES + 512 * c.file + c.offset) for c in chunks]


def boxes_of(runs: Runs) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(part.start, part.extent if isinstance(part, Run) else part.shape) for part in runs.parts]


@st.composite
def layouts(draw):
    """A tensor cut by a grid, uneven at its ends; its pieces lie in files in any order, some at other offsets."""
    shape = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    steps = [draw(st.integers(1, size)) for size in shape]
    grid = [range(0, size, step) for size, step in zip(shape, steps, strict=True)]
    corners = list(itertools.product(*grid))
    order = list(range(len(corners)))
    if draw(st.booleans()):
        random.Random(draw(st.integers(0, 99))).shuffle(order)
    elif len(shape) > 1 and draw(st.booleans()):  # the first dimension goes over neighbouring files
        order = [number for _, number in sorted((corner[::-1], number) for number, corner in enumerate(corners))]
        order = [order.index(number) for number in range(len(order))]
    moved = draw(st.sets(st.integers(0, len(corners) - 1), max_size=3))
    chunks = []
    for number, corner in enumerate(corners):
        size = tuple(min(step, whole - first) for first, step, whole in zip(corner, steps, shape, strict=True))
        chunks.append(Chunk(order[number], 64 if number in moved else 0, corner, size))
    return tuple(shape), chunks


@given(layouts())
def test_runs_of_a_list_are_the_list(layout):
    shape, chunks = layout
    runs = as_runs(merged(singles(chunks)), len(chunks))
    assert sorted(runs, key=lambda c: c.start) == sorted(absolute(chunks), key=lambda c: c.start)
    assert len(runs) == len(chunks)
    assert [runs[index] for index in range(len(runs))] == list(runs)
    assert tiles(shape, boxes_of(runs))


@given(layouts())
def test_runs_come_back_from_json_the_same(layout):
    shape, chunks = layout
    runs = as_runs(merged(singles(chunks)), len(chunks))
    again = from_json(to_json(runs), num_dims=len(shape), begins=runs.begins)
    assert list(again) == list(runs)
    assert to_json(again) == to_json(runs)


@given(layouts(), st.data())
def test_what_overlaps_a_box_is_what_a_look_at_each_piece_finds(layout, data):
    shape, chunks = layout
    runs = as_runs(merged(singles(chunks)), len(chunks))
    start = [data.draw(st.integers(0, size)) for size in shape]
    size = [data.draw(st.integers(0, whole - first)) for whole, first in zip(shape, start, strict=True)]

    def meets(chunk: Chunk) -> bool:
        pairs = zip(chunk.start, chunk.shape, start, size, strict=True)
        return all(max(a, b) < min(a + c, b + d) for a, c, b, d in pairs)

    found = [chunk for chunk in runs.overlapping(start, size) if meets(chunk)]
    assert sorted(found) == sorted(chunk for chunk in runs if meets(chunk))


@given(layouts(), st.integers(0, 10**6), st.sampled_from(["lost", "twice", "moved", "larger"]))
def test_runs_tile_a_tensor_only_if_their_pieces_do(layout, pick, how):
    """A piece is lost, doubled, moved or grown before runs are made; a grid of every place is the judge."""
    shape, chunks = layout
    victim = pick % len(chunks)
    chunk = chunks[victim]
    dim = pick % len(shape)
    moved = chunk._replace(start=(*chunk.start[:dim], chunk.start[dim] + 1, *chunk.start[dim + 1 :]))
    larger = chunk._replace(shape=(*chunk.shape[:dim], chunk.shape[dim] + 1, *chunk.shape[dim + 1 :]))
    spoilt = {"lost": [], "twice": [chunk, chunk._replace(file=len(chunks))], "moved": [moved], "larger": [larger]}[how]
    chunks = [*chunks[:victim], *spoilt, *chunks[victim + 1 :]]
    runs = as_runs(merged(singles(chunks)), len(chunks) + 1)
    counts = dict.fromkeys(itertools.product(*map(range, shape)), 0)
    outside = False
    for each in chunks:
        spans = [range(first, first + size) for first, size in zip(each.start, each.shape, strict=True)]
        for place in itertools.product(*spans):
            outside |= place not in counts
            counts[place] = counts.get(place, 0) + 1
    assert tiles(shape, boxes_of(runs)) == (not outside and set(counts.values()) == {1})


def test_an_evenly_cut_tensor_is_one_run_however_many_ranks_there_are():
    rows = [Chunk(rank, 128, (rank * 2, 0), (2, 4)) for rank in range(1000)]
    assert merged(singles(rows)) == [Run(0, 128, (0, 0), (2, 4), (Repeat(0, 1000, 1),))]
    both = [Chunk(8 * i + j, 0, (3 * i, 5 * j), (3, 5)) for i in range(16) for j in range(8)]
    assert merged(singles(both)) == [Run(0, 0, (0, 0), (3, 5), (Repeat(1, 8, 1), Repeat(0, 16, 8)))]
    strided = [Chunk(4 * i + j, 0, ((8 * j + i) * 3,), (3,)) for i in range(8) for j in range(4)]
    assert merged(singles(strided)) == [Run(0, 0, (0,), (3,), (Repeat(0, 8, 4), Repeat(0, 4, 1)))]


def test_one_piece_of_a_trillion_is_found_at_once():
    run = Run(0, 0, (0, 0), (1, 1), (Repeat(0, 1 << 20, 1),))
    wide = Runs([run], (8,) * (1 << 20))
    begun = time.process_time()
    assert list(wide.overlapping((777_777, 0), (2, 1))) == [
        Chunk(777_777, 8, (777_777, 0), (1, 1)),
        Chunk(777_778, 8, (777_778, 0), (1, 1)),
    ]
    assert wide[-1] == Chunk((1 << 20) - 1, 8, ((1 << 20) - 1, 0), (1, 1))
    assert time.process_time() - begun < 0.5


MALFORMED = {
    "a count of 2^62": [[0, 1 << 62, 1]],
    "a count of 2^61": [[0, 1 << 61, 1]],
    "a count of zero": [[0, 0, 1]],
    "a count of one": [[0, 1, 1]],
    "a negative count": [[0, -4, 1]],
    "a step of zero": [[0, 4, 0]],
    "a negative step": [[0, 4, -1]],
    "a step of 2^61": [[0, 2, 1 << 61]],
    "files behind the last": [[0, 5, 1]],
    "a dimension that is not there": [[1, 4, 1]],
    "a negative dimension": [[-1, 4, 1]],
    "no repeats": [],
    "too many repeats": [[0, 2, 2**level] for level in range(MAX_REPEATS + 1)],
    "a file twice": [[0, 2, 1], [0, 2, 1]],
    "a count that is true": [[0, True, 1]],
    "a count in text": [[0, "4", 1]],
    "too many numbers": [[0, 4, 1, 1]],
    "too few numbers": [[0, 4]],
    "no list": 4,
    "a number in the list": [4],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_run_is_refused(name):
    body = [[0, 0, [0], [1], [[0, 4, 1]]]]
    begins = (8,) * (1 << 9 if name == "too many repeats" else 4)
    assert len(from_json(body, num_dims=1, begins=begins)) == 4
    with pytest.raises((ValueError, TypeError)):
        from_json([[0, 0, [0], [1], MALFORMED[name]]], num_dims=1, begins=begins)


def test_a_run_of_nothing_is_refused():
    with pytest.raises(ValueError, match="of nothing"):
        from_json([[0, 0, [0], [0], [[0, 4, 1]]]], num_dims=1, begins=(8,) * 4)


def test_there_are_no_runs_in_the_first_format():
    with pytest.raises(ValueError, match="too many parts"):
        from_json([[0, 0, [0], [1], [[0, 4, 1]]]], num_dims=1, begins=None)


@pytest.mark.parametrize("small", range(12))
def test_a_run_has_to_lie_inside_each_of_its_files(small):
    run = Run(1, 8, (0, 0), (1, 2), (Repeat(1, 2, 1), Repeat(0, 3, 3)))
    named = {1 + i + 3 * j for i in range(2) for j in range(3)}
    file_bytes = [100] * 12
    file_bytes[small] = 99
    begins = [100 - 8 - 2 * 4] * 12
    chunks = Runs([run], tuple(begins))
    if small in named:
        with pytest.raises(ValueError, match="outside its file"):
            check_inside(chunks, item_bytes=4, file_bytes=file_bytes, rooms=Rooms(file_bytes, begins))
    else:
        check_inside(chunks, item_bytes=4, file_bytes=file_bytes, rooms=Rooms(file_bytes, begins))


def test_runs_that_name_files_in_ever_other_ways_are_refused_in_bounded_time():
    num_files = 20_000
    rooms = Rooms([10] * num_files, [1] * num_files)
    begun = time.process_time()

    def ask() -> None:
        for first in range(num_files):
            rooms.least(Run(first, 0, (0,), (1,), (Repeat(0, num_files - first, 1),)))

    with pytest.raises(ValueError, match="too many ways"):
        ask()
    assert time.process_time() - begun < 10

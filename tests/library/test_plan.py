"""The plan covers every byte once and is even."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.plan import LEAST_SHARE_BYTES, MANY_WRITERS, Item, in_file_order, split
from distckpt.safetensors import ITEM_BYTES

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
SPECS = st.lists(
    st.tuples(SHAPES, st.sampled_from(["U8", "F32", "F64"]), st.sampled_from([None, None, None, 0, 1])), max_size=12
)


def make(specs: list[tuple[tuple[int, ...], str, int | None]], num_writers: int) -> list[Item]:
    return [
        Item(name=str(index), dtype=dtype, shape=shape, owner=None if owner is None else owner % num_writers)
        for index, (shape, dtype, owner) in enumerate(specs)
    ]


@settings(max_examples=300, deadline=None)
@given(SPECS, st.integers(1, 6))
def test_blocks_cover_every_row_once(specs, num_writers):
    items = make(specs, num_writers)
    shares = split(items, num_writers)
    for item in items:
        blocks = [block for share in shares for block in share if block.name == item.name]
        assert sum(block.num_bytes for block in blocks) == item.num_bytes
        if not item.shape:
            assert len(blocks) == 1
            continue
        row = 0
        for first, size in sorted((block.start[0], block.shape[0]) for block in blocks):
            assert first == row
            row += size
        assert row == item.shape[0]


@settings(max_examples=300, deadline=None)
@given(SPECS, st.integers(1, 6))
def test_no_writer_has_more_than_its_share_plus_one_row(specs, num_writers):
    items = make(specs, num_writers)
    shares = split(items, num_writers)
    total = sum(item.num_bytes for item in items)
    row = max([item.num_bytes // (item.shape[0] if item.shape and item.shape[0] else 1) for item in items], default=0)
    for writer, share in enumerate(shares):
        owned = sum(item.num_bytes for item in items if item.owner == writer)
        assert sum(block.num_bytes for block in share) <= max(total / num_writers, owned) + row


@settings(max_examples=100, deadline=None)
@given(SPECS, st.integers(1, 4))
def test_owned_items_are_written_whole_by_their_owner(specs, num_writers):
    items = make(specs, num_writers)
    for writer, share in enumerate(split(items, num_writers)):
        for block in share:
            owner = items[int(block.name)].owner
            if owner is not None:
                assert (owner, block.shape) == (writer, block.whole)


@settings(max_examples=100, deadline=None)
@given(SPECS)
def test_blocks_in_file_order_are_aligned_to_their_width(specs):
    offset = 0
    for block in in_file_order(split(make(specs, 1), 1)[0]):
        assert offset % ITEM_BYTES[block.dtype] == 0
        offset += block.num_bytes


def test_a_part_of_a_tensor_carries_its_rows_in_its_name():
    first, second = split([Item(name="w", dtype="F32", shape=(10, 3))], 2)
    assert [block.stored_name for block in first + second] == ["w[0:5]", "w[5:10]"]


@settings(max_examples=100, deadline=None)
@given(SPECS, st.integers(1, 6))
def test_the_blocks_of_one_writer_alone_are_those_that_it_has_among_all(specs, num_writers):
    items = make(specs, num_writers)
    shares = split(items, num_writers)
    for writer in range(num_writers):
        alone = split(items, num_writers, only=writer)
        assert alone[writer] == shares[writer]
        assert not any(blocks for other, blocks in enumerate(alone) if other != writer)


def test_of_many_ranks_only_as_many_write_as_are_worth_a_file():
    num_ranks = 5 * MANY_WRITERS + 3
    row = LEAST_SHARE_BYTES // 64 // 4
    small = [Item(name="w", dtype="F32", shape=(8 * 64, row))]
    large = [Item(name="w", dtype="F32", shape=(4 * MANY_WRITERS * 64, row))]
    assert sum(map(bool, split(small, num_ranks))) == MANY_WRITERS
    assert sum(map(bool, split(large, num_ranks))) == 4 * MANY_WRITERS
    for items in (small, large):
        shares = split(items, num_ranks)
        assert sum(block.num_bytes for share in shares for block in share) == items[0].num_bytes
        writers = [rank for rank, share in enumerate(shares) if share]
        gaps = {after - before for before, after in itertools.pairwise(writers)}
        assert max(gaps) - min(gaps) <= 1  # spread over all nodes, not crowded on the first


def test_an_owner_that_shares_no_other_writing_still_writes_what_it_owns():
    num_ranks = 4 * MANY_WRITERS
    items = [Item(name="a", dtype="F32", shape=(4096,)), Item(name="b", dtype="F32", shape=(3,), owner=num_ranks - 1)]
    share = split(items, num_ranks)[num_ranks - 1]
    assert [block.name for block in share] == ["b"]

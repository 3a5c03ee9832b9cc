"""Tensors are read without torch: put together from any boxes, and decoded as torch decodes them."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt import arrays, datafiles
from distckpt.arrays import Source, deviation, numbers, read
from distckpt.chunks import Chunk
from distckpt.manifest import Manifest, TensorEntry
from distckpt.safetensors import Piece, make_header
from distckpt.storage import open_storage
from distckpt.tensors import DTYPES


def data_of(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().reshape(-1, tensor.element_size()).copy()


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "BF16", "F16"])
def test_every_small_float_is_decoded_as_torch_does(name: str) -> None:
    dtype = DTYPES[name]
    if dtype.itemsize == 1:
        bits = torch.arange(256, dtype=torch.uint8).view(dtype)
    else:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    expected = bits.to(torch.float64).numpy()
    with np.errstate(invalid="ignore"):  # of signaling NaNs
        found = numbers(name, data_of(bits)).astype(np.float64)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_a_change_is_measured_in_every_dtype(name: str) -> None:
    before = torch.ones(5, dtype=torch.float32).to(DTYPES[name])
    after = before.clone()
    after[3] = 0
    found = deviation(name, data_of(before), data_of(after))
    assert deviation(name, data_of(before), data_of(before)) is None
    assert found is not None
    assert (found.num_elements, found.num_different, found.num_nan) == (5, 1, 0)
    assert (found.max_absolute, found.max_relative) == (1, 1)


@given(a=st.integers(-(2**63), 2**63 - 1), b=st.integers(-(2**63), 2**63 - 1))
def test_whole_numbers_are_subtracted_exactly(a: int, b: int) -> None:
    found = deviation("I64", data_of(torch.tensor([a])), data_of(torch.tensor([b])))
    assert (found is None) == (a == b)
    if found is not None:
        assert found.max_absolute == abs(a - b)


@given(st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=8))
def test_floats_are_compared_as_python_does(pairs: list[tuple[float, float]]) -> None:
    first, second = torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    found = deviation("F32", data_of(first), data_of(second))
    if found is None:
        return
    one_nan = [math.isnan(a) != math.isnan(b) for a, b in pairs]
    assert found.num_nan == sum(one_nan)
    sizes = [abs(a - b) for (a, b), nan in zip(pairs, one_nan, strict=True) if not nan and a != b and a == a]
    assert (found.max_absolute or 0) == max(sizes, default=0)
    assert found.max_relative is None or 0 <= found.max_relative <= 2 or found.max_relative == math.inf


def test_bits_alone_are_a_difference_of_no_size() -> None:
    found = deviation("F32", data_of(torch.tensor([0.0, 1.0])), data_of(torch.tensor([-0.0, 1.0])))
    assert found is not None
    assert (found.num_different, found.max_absolute, found.max_relative) == (1, 0, 0)


def test_blocks_and_columns_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path)
    whole = np.arange(6 * 8, dtype="<i4").reshape(6, 8)
    boxes = [((0, 0), (2, 8)), ((2, 0), (4, 3)), ((2, 3), (4, 5))]  # a row block, and two that are not contiguous
    parts = [np.ascontiguousarray(whole[r : r + h, c : c + w]) for (r, c), (h, w) in boxes]
    pieces = [Piece(name=str(i), dtype="I32", shape=part.shape) for i, part in enumerate(parts)]
    payload = memoryview(b"".join(part.tobytes() for part in parts))
    header = make_header(pieces)
    offsets = list(accumulate((piece.num_bytes for piece in pieces), initial=len(header)))[:-1]
    name, size = "a/rank-00000.safetensors", len(header) + len(payload)
    file = datafiles.write(storage, "one", name, rank=0, parts=[memoryview(header), payload], num_bytes=size)
    chunks = tuple(
        Chunk(file=0, offset=offset, start=start, shape=shape)
        for offset, (start, shape) in zip(offsets, boxes, strict=True)
    )
    tensors = {
        "whole": TensorEntry(dtype="I32", shape=(6, 8), chunks=chunks),
        "scalar": TensorEntry(dtype="I32", shape=(), chunks=(Chunk(file=0, offset=offsets[0], start=(), shape=()),)),
        "empty": TensorEntry(dtype="F64", shape=(0, 4), chunks=()),
    }
    manifest = Manifest(
        step=1, run="r", attempt="a", layout="full", world_size=1, created=0.0, writer={}, files=(file,),
        tensors=tensors, objects={},
    )  # fmt: skip
    source = Source(storage=storage, folder="one", manifest=manifest)
    found = read(source, tensors)
    np.testing.assert_array_equal(numbers("I32", found["whole"].reshape(-1, 4)).reshape(6, 8), whole)
    assert found["scalar"].tobytes() == bytes(4)
    assert found["empty"].shape == (0, 4, 8)
    monkeypatch.setattr(arrays, "BATCH_BYTES", 100)
    assert list(arrays.batches(source, tensors)) == [["empty", "scalar"], ["whole"]]

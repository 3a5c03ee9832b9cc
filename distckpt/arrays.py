"""Arrays: a checkpoint's tensors as NumPy arrays, put together from their chunks and compared, without torch.

Invariant: what `read` returns was checked against the digests, byte by byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from distckpt import names
from distckpt.datafiles import Reader
from distckpt.manifest import Manifest
from distckpt.readtasks import Range
from distckpt.safetensors import ITEM_BYTES
from distckpt.storage import Storage

Array = np.ndarray[Any, Any]

BATCH_BYTES = 64 << 20  # small tensors share a digest, and one read: fetch this much of them at a time
_BLOCK = 1 << 18  # elements decoded at a time

_NATIVE = {
    "BOOL": "u1",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
    "C64": "<c8",
    "C128": "<c16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A committed checkpoint to read from: its storage, its folder there ("" is the root), and its manifest."""

    storage: Storage
    folder: str
    manifest: Manifest

    @property
    def path(self) -> str:
        """The checkpoint's folder, as a path or URL."""
        return names.join(self.storage.url, self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """How two tensors of one dtype and shape differ.

    Attributes:
        num_elements: The size of each.
        num_different: How many elements have other bytes.
        num_nan: How many of these are NaN in one tensor only; they count in neither maximum.
        max_absolute: The largest |b - a|; None if nothing can be compared.
        max_relative: The largest |b - a| / max(|a|, |b|), from 0 to 2, or inf where |b - a| is; None likewise.
    """

    num_elements: int
    num_different: int
    num_nan: int
    max_absolute: float | None
    max_relative: float | None


def batches(source: Source, tensors: Iterable[str]) -> Iterator[list[str]]:
    """Yield the names of `tensors` in groups to be read at once, in the order in which they lie in the files.

    A group has at most `BATCH_BYTES`, or is one tensor.
    """
    entries = source.manifest.tensors
    places = {name: min(((c.file, c.offset) for c in entries[name].chunks), default=(0, 0)) for name in tensors}
    batch: list[str] = []
    batch_bytes = 0
    for name in sorted(places, key=lambda name: (places[name], name)):
        size = entries[name].num_bytes
        if batch and batch_bytes + size > BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(name)
        batch_bytes += size
    if batch:
        yield batch


def read(source: Source, tensors: Iterable[str]) -> dict[str, Array]:
    """Return the bytes of tensors, put together from their chunks: each as uint8 [*shape, bytes of an element].

    Raises:
        CheckpointDamagedError: A data file is missing, short, or has other bytes than were written.
        StorageError: A file could not be read for another reason.
    """
    manifest = source.manifest
    arrays: dict[str, Array] = {}
    wanted: dict[int, list[Range]] = {}
    apart: list[tuple[Array, Array]] = []
    for name in tensors:
        entry = manifest.tensors[name]
        whole = arrays[name] = np.zeros((*entry.shape, ITEM_BYTES[entry.dtype]), np.uint8)
        for chunk in entry.chunks:
            box = whole[tuple(slice(start, start + size) for start, size in zip(chunk.start, chunk.shape, strict=True))]
            if not box.size:
                continue
            into = box
            if not box.flags.c_contiguous:
                into = np.empty(box.shape, np.uint8)
                apart.append((box, into))
            wanted.setdefault(chunk.file, []).append(Range(begin=chunk.offset, into=into.reshape(-1).data))
    reader = Reader(source.storage, source.folder, manifest.files, path=source.path, step=manifest.step)
    reader.fill(wanted)
    for box, into in apart:
        box[...] = into
    return arrays


def deviation(dtype: str, before: Array, after: Array) -> Deviation | None:
    """Return how two tensors differ, or None if their bytes are the same.

    Args:
        dtype: Of both.
        before: As `read` returns it.
        after: Likewise, of the same shape.
    """
    size = ITEM_BYTES[dtype]
    first, second = before.reshape(-1, size), after.reshape(-1, size)
    num_different = num_nan = 0
    absolutes: list[float] = []
    relatives: list[float] = []
    for begin in range(0, len(first), _BLOCK):
        a, b = first[begin : begin + _BLOCK], second[begin : begin + _BLOCK]
        if np.array_equal(a, b):
            continue
        differs = (a != b).any(axis=1)
        num_different += int(differs.sum())
        absolute, relative, is_nan = _distances(dtype, a[differs], b[differs])
        num_nan += int(is_nan.sum())
        if not is_nan.all():
            absolutes.append(absolute[~is_nan].max().item())
            relatives.append(relative[~is_nan].max().item())
    if not num_different:
        return None
    return Deviation(
        num_elements=len(first),
        num_different=num_different,
        num_nan=num_nan,
        max_absolute=max(absolutes, default=None),
        max_relative=max(relatives, default=None),
    )


def numbers(dtype: str, data: Array) -> Array:
    """Return the numbers that bytes stand for, in a NumPy type that holds each of them exactly.

    Args:
        dtype: A key of `safetensors.ITEM_BYTES`.
        data: uint8 [n, bytes of an element], contiguous.
    """
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)[:, 0]
    if dtype == "F8_E5M2":
        return (data.astype(np.uint16) << 8).view(np.float16)[:, 0]
    if dtype == "F8_E4M3":
        return _e4m3()[data[:, 0]]
    return data.view(_NATIVE[dtype])[:, 0]


def _e4m3() -> Array:
    """Return the numbers that the 256 values of a byte stand for.

    Source: Micikevicius et al., "FP8 formats for deep learning", 2022: bias 7, no infinities, NaN is S.1111.111.
    """
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3) & 15, codes & 7
    sizes = np.where(exponents == 0, mantissas / 8 * 2.0**-6, (1 + mantissas / 8) * 2.0 ** (exponents - 7))
    sizes[codes & 127 == 127] = math.nan
    return np.where(codes < 128, sizes, -sizes).astype(np.float32)


def _distances(dtype: str, a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Return for each element the absolute and the relative distance, and whether it is NaN on one side only."""
    first, second = numbers(dtype, np.ascontiguousarray(a)), numbers(dtype, np.ascontiguousarray(b))
    if first.dtype.kind in "iu":
        # As unsigned numbers the difference of any two 64-bit integers fits, and comes out right modulo 2**64.
        wide = np.uint64 if first.dtype.kind == "u" else np.int64
        low, high = np.minimum(first, second).astype(wide), np.maximum(first, second).astype(wide)
        absolute: Array = high.view(np.uint64) - low.view(np.uint64)
        scale = np.maximum(np.abs(low.astype(np.float64)), np.abs(high.astype(np.float64)))
        return absolute, absolute / np.where(scale == 0, 1, scale), np.zeros(len(first), bool)
    with np.errstate(all="ignore"):
        exact = np.complex128 if first.dtype.kind == "c" else np.float64
        first, second = first.astype(exact), second.astype(exact)
        absolute = np.abs(second - first)
        scale = np.maximum(np.abs(first), np.abs(second))
        relative = absolute / np.where(scale == 0, 1, scale)
    were_nan, are_nan = np.isnan(first), np.isnan(second)
    both = were_nan & are_nan  # other bits of the same NaN are no distance
    absolute[both], relative[both] = 0, 0
    relative[np.isinf(absolute)] = math.inf
    one = were_nan ^ are_nan
    # inf - inf in a part of a complex number is no distance either
    return np.nan_to_num(absolute, nan=0, posinf=math.inf), np.nan_to_num(relative, nan=0, posinf=math.inf), one

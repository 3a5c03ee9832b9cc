"""Boxes of tensors, read to host memory: whole tensors, or just this rank's part of each."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import add, sub

import torch

from distckpt import datafiles, names
from distckpt.manifest import Chunk, Manifest, TensorEntry
from distckpt.safetensors import ITEM_BYTES
from distckpt.storage import Storage
from distckpt.tensors import DTYPES, Box, memory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one chunk holds of a wanted box.

    Attributes:
        chunk: The chunk.
        in_chunk: The part's first index in the chunk, in each dimension.
        in_box: Its first index in the wanted box.
        shape: Its size.
    """

    chunk: Chunk
    in_chunk: tuple[int, ...]
    in_box: tuple[int, ...]
    shape: tuple[int, ...]


def read_boxes(
    storage: Storage, folder: str, manifest: Manifest, boxes: Sequence[tuple[str, Box]], *, check: Collection[int] = ()
) -> list[torch.Tensor]:
    """Return boxes of tensors, on the CPU; every byte is checked on the way.

    Args:
        storage: The storage.
        folder: The checkpoint's folder in it.
        manifest: The checkpoint's manifest.
        boxes: The tensor's name, and which box of it, for each that is wanted.
        check: Indices of data files of which every byte is to be checked, also what no box needs.

    Raises:
        CheckpointDamagedError: Bytes are missing or wrong.
        StorageError: A file could not be read.

    Ranks: any.
    """
    path = names.join(storage.url, folder)
    ranges: dict[int, list[datafiles.Range]] = {index: [] for index in check}
    tensors: list[torch.Tensor] = []
    apart: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, box in boxes:
        entry = manifest.tensors[name]
        tensor = torch.empty(box.shape, dtype=DTYPES[entry.dtype])
        tensors.append(tensor)
        for part in _parts(entry, box):
            rows, begin = _rows(entry, part)
            target = _target(tensor, part)
            if rows != part.shape or not target.is_contiguous():
                whole_rows = torch.empty(rows, dtype=target.dtype)
                apart.append((target, _narrowed(whole_rows, part.in_chunk, part.shape)))
                target = whole_rows
            ranges.setdefault(part.chunk.file, []).append(datafiles.Range(begin=begin, into=memory(target)))
    for index, wanted in sorted(ranges.items()):
        datafiles.read_ranges(
            storage,
            folder,
            manifest.files[index],
            wanted,
            path=path,
            step=manifest.step,
            everything=index in check,
        )
    for target, part_of_rows in apart:
        target.copy_(part_of_rows)
    return tensors


def _parts(entry: TensorEntry, box: Box) -> Iterator[_Part]:
    """Yield what each chunk holds of a box; nothing of an empty one."""
    if len(entry.chunks) == 1 and box.shape == entry.shape and 0 not in box.shape:
        yield _Part(chunk=entry.chunks[0], in_chunk=box.start, in_box=box.start, shape=box.shape)
        return
    for chunk in entry.chunks:
        first = tuple(map(max, chunk.start, box.start))
        last = tuple(map(min, map(add, chunk.start, chunk.shape), map(add, box.start, box.shape)))
        shape = tuple(map(sub, last, first))
        if all(size > 0 for size in shape):
            yield _Part(
                chunk=chunk,
                in_chunk=tuple(map(sub, first, chunk.start)),
                in_box=tuple(map(sub, first, box.start)),
                shape=shape,
            )


def _rows(entry: TensorEntry, part: _Part) -> tuple[tuple[int, ...], int]:
    """Return the shape of the chunk's rows that hold a part, and where they begin in the file."""
    if not part.shape:
        return (), part.chunk.offset
    row_bytes = math.prod(part.chunk.shape[1:]) * ITEM_BYTES[entry.dtype]
    return (part.shape[0], *part.chunk.shape[1:]), part.chunk.offset + part.in_chunk[0] * row_bytes


def _target(tensor: torch.Tensor, part: _Part) -> torch.Tensor:
    """Return the place of a part in its box, as a view."""
    return tensor if part.shape == tuple(tensor.shape) else _narrowed(tensor, part.in_box, part.shape)


def _narrowed(tensor: torch.Tensor, first: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """Return a box of `tensor`; of rows that were cut out already, the first index does not count."""
    for dim, size in enumerate(shape):
        if tensor.shape[dim] != size:
            tensor = tensor.narrow(dim, first[dim], size)
    return tensor

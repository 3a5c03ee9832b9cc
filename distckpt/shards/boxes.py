"""Boxes of tensors, read to where they are wanted: whole tensors, or just this rank's part of each.

Invariant: what a tensor is filled with was checked against the digests; on the CPU it goes there without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import add, sub

import torch

from distckpt.datafiles import Range, Reader
from distckpt.manifest import Chunk, Manifest, TensorEntry
from distckpt.safetensors import ITEM_BYTES
from distckpt.tensors import DTYPES, Box, memory

# A tensor's name, which box of it (None is all), and a tensor of the box's shape to fill, on any device.
Wanted = tuple[str, Box | None, torch.Tensor]

SMALL_BYTES = 64 << 10  # smaller tensors that are neighbours in a file are read in one piece, and then copied
BATCH_BYTES = 256 << 20  # of memory between the storage and tensors that cannot be read into


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


def spans(manifest: Manifest, boxes: Iterable[tuple[str, Box | None]]) -> dict[int, list[tuple[int, int]]]:
    """Return where the bytes of boxes lie: the first byte and the one behind the last, by the file's index.

    Ranks: any.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for name, box in boxes:
        entry = manifest.tensors[name]
        for part in _parts(entry, box):
            rows, begin = _rows(entry, part)
            end = begin + math.prod(rows) * ITEM_BYTES[entry.dtype]
            found.setdefault(part.chunk.file, []).append((begin, end))
    return found


def read_into(reader: Reader, manifest: Manifest, wanted: Iterable[Wanted]) -> None:
    """Fill tensors with boxes of a checkpoint's.

    Args:
        reader: The reader of the checkpoint's data files.
        manifest: The checkpoint's manifest.
        wanted: What to read, and where to; of the entry's dtype.

    Raises:
        CheckpointDamagedError: Bytes are missing or wrong; the tensors then hold anything.
        StorageError: A file could not be read.

    Ranks: any; blocks until all is read and lies on the device.
    """
    batch = _Batch(reader)
    with torch.no_grad():
        for name, box, into in wanted:
            entry = manifest.tensors[name]
            if not into.numel():
                continue
            if len(entry.chunks) == 1 and (box is None or box.shape == entry.shape):
                chunk = entry.chunks[0]
                batch.add(chunk.file, chunk.offset, into)
                continue
            for part in _parts(entry, box):
                rows, begin = _rows(entry, part)
                target = _target(into, part)
                if rows == part.shape:
                    batch.add(part.chunk.file, begin, target)
                else:
                    batch.add_part(part, begin, target, rows)
        batch.finish()


def read_boxes(reader: Reader, manifest: Manifest, boxes: Sequence[tuple[str, Box]]) -> list[torch.Tensor]:
    """Return boxes of tensors, on the CPU.

    Raises:
        As `read_into` does.

    Ranks: any.
    """
    tensors = [torch.empty(box.shape, dtype=DTYPES[manifest.tensors[name].dtype]) for name, box in boxes]
    wanted = [(name, box, tensor) for (name, box), tensor in zip(boxes, tensors, strict=True)]
    read_into(reader, manifest, wanted)
    return tensors


class _Batch:
    """What is read together: straight into tensors where that is possible, else to memory from where it is copied."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._ranges: dict[int, list[Range]] = {}
        self._small: dict[tuple[int, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_bytes = 0
        self._on_gpu = False

    def add(self, file: int, offset: int, target: torch.Tensor) -> None:
        """Want all of `target`, which lies in a file in one piece."""
        if target.nbytes < SMALL_BYTES:
            self._small.setdefault((file, target.dtype), []).append((offset, target))
            self._count(target, target.nbytes)
        elif target.device.type == "cpu" and target.is_contiguous():
            self._ranges.setdefault(file, []).append(Range(begin=offset, into=memory(target)))
        else:
            self._count(target, target.nbytes)
            self._copies.append((target, self._room(file, offset, tuple(target.shape), target)))

    def add_part(self, part: _Part, offset: int, target: torch.Tensor, rows: tuple[int, ...]) -> None:
        """Want a part of the rows that lie in a file."""
        self._count(target, math.prod(rows) * target.element_size())
        whole_rows = self._room(part.chunk.file, offset, rows, target)
        self._copies.append((target, _narrowed(whole_rows, part.in_chunk, part.shape)))

    def finish(self) -> None:
        """Read and copy all that is still due."""
        self._read()
        if self._on_gpu:
            torch.cuda.synchronize()

    def _count(self, target: torch.Tensor, num_bytes: int) -> None:
        self._on_gpu = self._on_gpu or target.is_cuda
        if self._num_bytes and self._num_bytes + num_bytes > BATCH_BYTES:
            self._read()
        self._num_bytes += num_bytes

    def _room(self, file: int, offset: int, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        room = torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)
        self._ranges.setdefault(file, []).append(Range(begin=offset, into=memory(room)))
        return room

    def _read(self) -> None:
        runs = [
            (self._room(file, run[0][0], (sum(t.numel() for _, t in run),), run[0][1]), [t for _, t in run])
            for (file, _), small in self._small.items()
            for run in _neighbours(small)
        ]
        self._reader.fill(self._ranges)
        for target, source in self._copies:
            target.copy_(source, non_blocking=True)
        for room, targets in runs:
            sources = torch._utils._unflatten_dense_tensors(room, targets)  # type: ignore[no-untyped-call]
            torch._foreach_copy_(targets, list(sources), non_blocking=True)
        self._ranges, self._small, self._copies, self._num_bytes = {}, {}, [], 0


def _neighbours(small: list[tuple[int, torch.Tensor]]) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """Yield runs of tensors that lie in a file one after another, on one device."""
    small.sort(key=lambda each: each[0])
    run: list[tuple[int, torch.Tensor]] = []
    end = -1
    for offset, tensor in small:
        if run and (offset != end or tensor.device != run[0][1].device):
            yield run
            run = []
        run.append((offset, tensor))
        end = offset + tensor.nbytes
    if run:
        yield run


def _parts(entry: TensorEntry, box: Box | None) -> Iterator[_Part]:
    """Yield what each chunk holds of a box; nothing of an empty one."""
    if box is None:
        box = Box(start=(0,) * len(entry.shape), shape=entry.shape)
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

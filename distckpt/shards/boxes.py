"""Boxes of tensors, read to where they are wanted: whole tensors, or just this rank's part of each.

Invariant: what a tensor is filled with was checked against the digests; on the CPU it goes there without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import pairwise
from operator import add, itemgetter, sub

import torch

from distckpt.chunks import Chunk, overlapping
from distckpt.datafiles import Reader
from distckpt.manifest import Manifest, TensorEntry
from distckpt.readtasks import Range
from distckpt.safetensors import ITEM_BYTES
from distckpt.shards.bounce import HALF_BYTES, BounceBuffers, buffer_bytes
from distckpt.tensors import DTYPES, Box, memory

# A tensor's name, which box of it (None is all), and a tensor of the box's shape to fill, on any device.
Wanted = tuple[str, Box | None, torch.Tensor]

_Small = tuple[int, int, torch.Tensor]  # where a small tensor begins in its file, its bytes, and itself

SMALL_BYTES = 64 << 10  # smaller tensors that are neighbours in a file are read in one piece, and then copied
FAR_SMALL_BYTES = 1 << 20  # the same on a GPU, where to ask for a copy costs as much as to copy half a megabyte
BATCH_BYTES = 256 << 20  # of memory between the storage and tensors that cannot be read into
PIECE_BYTES = 16 << 20  # of a large tensor on a GPU


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


def read_into(
    reader: Reader, manifest: Manifest, wanted: Iterable[Wanted], *, meanwhile: Callable[[], None] | None = None
) -> None:
    """Fill tensors with boxes of a checkpoint's.

    Args:
        reader: The reader of the checkpoint's data files.
        manifest: The checkpoint's manifest.
        wanted: What to read, and where to; of the entry's dtype.
        meanwhile: Is called once the last of it is being read.

    Raises:
        CheckpointDamagedError: Bytes are missing or wrong; the tensors then hold anything.
        StorageError: A file could not be read.

    Ranks: any; blocks until all is read and lies on the device.
    """
    wanted = list(wanted)
    far = list(filter(_is_far, map(itemgetter(2), wanted)))
    with torch.no_grad(), closing(_Batch(reader, far)) as batch:
        tensors = manifest.tensors
        for name, box, into in wanted:
            entry = tensors[name]
            num_bytes = into.nbytes
            if not num_bytes:
                continue
            chunks = entry.chunks
            if len(chunks) == 1 and (box is None or box.shape == entry.shape):
                batch.add(chunks[0].file, chunks[0].offset, into, num_bytes)
                continue
            for part in _parts(entry, box):
                rows, begin = _rows(entry, part)
                target = _target(into, part)
                if rows == part.shape:
                    batch.add(part.chunk.file, begin, target, target.nbytes)
                else:
                    batch.add_part(part, begin, target, rows)
        batch.read(meanwhile)


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


def _is_far(target: torch.Tensor) -> bool:
    """Say whether a tensor lies where nothing can be read to."""
    return not target.is_cpu


class _Batch:
    """What is read together: straight into tensors where that is possible, else to memory from where it is copied.

    Args:
        reader: The reader of the checkpoint's data files.
        far: All tensors to come that lie on GPUs.
    """

    def __init__(self, reader: Reader, far: Sequence[torch.Tensor]) -> None:
        self._reader = reader
        self._ranges: dict[int, list[Range]] = {}
        self._small: dict[tuple[int, torch.dtype, int], list[_Small]] = {}  # by file, dtype and device
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_bytes = 0
        self._bounce = BounceBuffers(sum(buffer_bytes(tensor.nbytes) for tensor in far))
        self._gpus = sorted({tensor.device for tensor in far if tensor.is_cuda}, key=str)
        self._most_bytes = HALF_BYTES if far else BATCH_BYTES

    def add(self, file: int, offset: int, target: torch.Tensor, num_bytes: int) -> None:
        """Want all of `target`, which lies in a file in one piece."""
        is_far = _is_far(target)
        if num_bytes < (FAR_SMALL_BYTES if is_far else SMALL_BYTES):
            self._small.setdefault((file, target.dtype, target.get_device()), []).append((offset, num_bytes, target))
            self._count(num_bytes)
        elif not is_far and target.is_contiguous():
            self._ranges.setdefault(file, []).append(Range(offset, memory(target)))
        elif num_bytes <= PIECE_BYTES or not target.is_contiguous():
            self._count(num_bytes)
            self._copies.append((target, self._room(file, offset, tuple(target.shape), target)))
        else:
            for piece in torch.split(target.view(-1).view(torch.uint8), PIECE_BYTES):
                self._count(len(piece))
                self._copies.append((piece, self._room(file, offset, tuple(piece.shape), piece)))
                offset += len(piece)

    def add_part(self, part: _Part, offset: int, target: torch.Tensor, rows: tuple[int, ...]) -> None:
        """Want a part of the rows that lie in a file."""
        self._count(math.prod(rows) * target.element_size())
        whole_rows = self._room(part.chunk.file, offset, rows, target)
        self._copies.append((target, _narrowed(whole_rows, part.in_chunk, part.shape)))

    def read(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Read all that is wanted by now, and ask for its copies; meanwhile do something else."""
        runs = [(self._run_room(key[0], run), run) for key, small in self._small.items() for run in _runs(small)]
        self._reader.fill(self._ranges, meanwhile=meanwhile)
        for target, source in self._copies:
            target.copy_(source, non_blocking=True)
        for room, run in runs:
            _hand_out(room, run)
        self._bounce.turn(self._gpus)
        self._ranges, self._small, self._copies, self._num_bytes = {}, {}, [], 0

    def close(self) -> None:
        """Return once everything lies where it is wanted, and let go of the memory in between."""
        self._bounce.close(self._gpus)

    def _count(self, num_bytes: int) -> None:
        num_bytes = buffer_bytes(num_bytes)
        if self._num_bytes and self._num_bytes + num_bytes > self._most_bytes:
            self.read()
        self._num_bytes += num_bytes

    def _room(self, file: int, offset: int, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        room = self._bounce.taken(shape, like.dtype) if _is_far(like) else None
        if room is None:
            room = torch.empty(shape, dtype=like.dtype)
        self._ranges.setdefault(file, []).append(Range(offset, memory(room)))
        return room

    def _run_room(self, file: int, run: list[_Small]) -> torch.Tensor:
        offset, _, like = run[0]
        num_items = sum(num_bytes for _, num_bytes, _ in run) // like.element_size()
        return self._room(file, offset, (num_items,), like)


def _hand_out(room: torch.Tensor, run: Sequence[_Small]) -> None:
    """Copy what was read in one piece to the tensors that it is of."""
    item_bytes = room.element_size()
    sizes = [num_bytes // item_bytes for _, num_bytes, _ in run]
    targets = [target for _, _, target in run]
    device = targets[0].device
    with suppress(torch.OutOfMemoryError):  # then each goes to the GPU by itself
        room = room.to(device, non_blocking=True)
    if room.device == device and all(t.is_contiguous() for t in targets if t.dim() != 1):
        # One call for all: of 20,000 tensors it took 8 ms where views of the room and a copy of each took 13.
        torch.split_with_sizes_copy(room, sizes, out=[t if t.dim() == 1 else t.view(-1) for t in targets])
        return
    pieces = torch.split(room, sizes)
    sources = [p if t.dim() == 1 else p.view(t.shape) for p, t in zip(pieces, targets, strict=True)]
    torch._foreach_copy_(targets, sources, non_blocking=True)


def _runs(small: list[_Small]) -> Iterator[list[_Small]]:
    """Yield runs of tensors that lie in a file one after another."""
    small.sort(key=itemgetter(0))
    breaks = [0]
    for index, ((offset, num_bytes, _), (after, _, _)) in enumerate(pairwise(small), start=1):
        if offset + num_bytes != after:
            breaks.append(index)
    for begin, end in pairwise([*breaks, len(small)]):
        yield small[begin:end]


def _parts(entry: TensorEntry, box: Box | None) -> Iterator[_Part]:
    """Yield what each chunk holds of a box; nothing of an empty one."""
    if box is None:
        box = Box(start=(0,) * len(entry.shape), shape=entry.shape)
    if len(entry.chunks) == 1 and box.shape == entry.shape and 0 not in box.shape:
        yield _Part(chunk=entry.chunks[0], in_chunk=box.start, in_box=box.start, shape=box.shape)
        return
    for chunk in overlapping(entry.chunks, box.start, box.shape):
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

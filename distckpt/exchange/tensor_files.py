"""Export to safetensors: one file, or several with an index, as Hugging Face lays them out; without torch.

Invariant: no more is in memory than a batch of tensors, or one that is larger.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from distckpt import arrays
from distckpt.arrays import Source
from distckpt.exchange import record
from distckpt.exchange.chosen import Chosen
from distckpt.safetensors import ITEM_BYTES, PAIRS, Piece, make_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

Advance = Callable[[int], object]


def write_file(path: Path, chosen: Chosen, *, advance: Advance) -> None:
    """Write all that is chosen to one file.

    Raises:
        CheckpointDamagedError: The checkpoint's bytes are not the ones that were written.
        StorageError: They could not be read.
        OSError: The file could not be written.

    Ranks: any.
    """
    facts = {record.KEY: record.write(chosen.source.manifest)} if chosen.whole else {}
    _write(path, chosen.source, list(chosen.tensors().items()), facts, advance)


def write_folder(path: Path, chosen: Chosen, *, max_bytes: int, advance: Advance) -> None:
    """Write all that is chosen to files of at most `max_bytes` of tensors each, or of one tensor, and their index.

    Raises:
        As `write_file` does.

    Ranks: any.
    """
    shards = list(_shards(chosen, max_bytes))
    if len(shards) <= 1:
        write_file(path / SINGLE, chosen, advance=advance)
        return
    weight_map = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(path / name, chosen.source, shard, {}, advance)
        weight_map.update({out: name for out, _ in shard})
        total_bytes += sum(chosen.source.manifest.tensors[stored].num_bytes for _, stored in shard)
    metadata: dict[str, object] = {"total_size": total_bytes}
    if chosen.whole:
        metadata[record.KEY] = record.write(chosen.source.manifest)
    index = {"metadata": metadata, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(chosen: Chosen, max_bytes: int) -> Iterator[list[tuple[str, str]]]:
    """Yield the tensors of each file: in the state's order, as many as go into it."""
    shard: list[tuple[str, str]] = []
    shard_bytes = 0
    for out, stored in chosen.tensors().items():
        size = chosen.source.manifest.tensors[stored].num_bytes
        if shard and shard_bytes + size > max_bytes:
            yield shard
            shard, shard_bytes = [], 0
        shard.append((out, stored))
        shard_bytes += size
    if shard:
        yield shard


def _write(
    path: Path, source: Source, tensors: Sequence[tuple[str, str]], facts: dict[str, str], advance: Advance
) -> None:
    """Write a safetensors file of (name in it, name in the checkpoint); the widest dtypes first, so all are aligned."""
    entries = source.manifest.tensors
    ordered = sorted(tensors, key=lambda pair: -ITEM_BYTES[entries[pair[1]].dtype])
    pieces = [Piece(name=out, dtype=entries[stored].dtype, shape=entries[stored].shape) for out, stored in ordered]
    pairs = [piece.name for piece in pieces if piece.dtype in PAIRS]
    metadata = {"format": "pt", **facts, **({record.COMPLEX: json.dumps(pairs)} if pairs else {})}
    with path.open("xb") as file:
        file.write(make_header(pieces, metadata=metadata))
        for batch in _batches(source, [stored for _, stored in ordered]):
            _write_batch(file, source, batch, advance)


def _batches(source: Source, stored: Sequence[str]) -> Iterator[list[str]]:
    """Yield names in order, in groups to be read at once."""
    batch: list[str] = []
    batch_bytes = 0
    for name in stored:
        size = source.manifest.tensors[name].num_bytes
        if batch and batch_bytes + size > arrays.BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(name)
        batch_bytes += size
    if batch:
        yield batch


def _write_batch(file: BinaryIO, source: Source, batch: Sequence[str], advance: Advance) -> None:
    found = arrays.read(source, dict.fromkeys(batch))
    for name in batch:
        data = found[name].reshape(-1).data
        file.write(data)
        advance(len(data))

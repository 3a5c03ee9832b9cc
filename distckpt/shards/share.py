"""What each rank wrote, and the manifest that is made of it."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from distckpt import names
from distckpt.errors import CheckpointExistsError, DistckptError, RankFailedError
from distckpt.manifest import (
    Chunk,
    DataFile,
    Layout,
    Manifest,
    ObjectEntry,
    Segment,
    TensorEntry,
    check,
    parse,
    serialize,
)
from distckpt.plan import Block
from distckpt.storage import Storage
from distckpt.values import Json
from distckpt.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """What one rank wrote.

    Attributes:
        file: Its data file; None if its share is empty.
        blocks: The blocks in it, in the order in which they stand there.
        offsets: Where each block begins, from the file's start.
    """

    file: DataFile | None
    blocks: tuple[Block, ...]
    offsets: tuple[int, ...]

    def to_json(self) -> Json:
        """Return the share as JSON, for rank 0.

        Ranks: any.
        """
        if self.file is None:
            return None
        segments = [[segment.num_bytes, segment.digest] for segment in self.file.segments]
        return {
            "file": [self.file.name, self.file.rank, self.file.num_bytes, segments],
            "blocks": [
                [block.name, block.dtype, block.whole, block.start, block.shape, offset]
                for block, offset in zip(self.blocks, self.offsets, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, body: Json) -> RankShare:
        """Return the share that `to_json` described.

        Ranks: any.
        """
        if body is None:
            return cls(file=None, blocks=(), offsets=())
        name, rank, num_bytes, segments = body["file"]
        file = DataFile(
            name=name,
            rank=rank,
            num_bytes=num_bytes,
            segments=tuple(Segment(num_bytes=size, digest=hexadecimal) for size, hexadecimal in segments),
        )
        blocks = tuple(
            Block(name=name, dtype=dtype, whole=tuple(whole), start=tuple(start), shape=tuple(shape))
            for name, dtype, whole, start, shape, _ in body["blocks"]
        )
        return cls(file=file, blocks=blocks, offsets=tuple(block[-1] for block in body["blocks"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a manifest says beyond files and tensors; see `Manifest`."""

    step: int
    run: str
    attempt: str
    layout: Layout
    world_size: int
    objects: Mapping[str, ObjectEntry]
    metrics: Mapping[str, float] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    parent: dict[str, Json] | None = None
    config: dict[str, Json] | None = None


def assemble(header: Header, shares: Sequence[RankShare]) -> Manifest:
    """Return the manifest of what all ranks wrote.

    Raises:
        RankFailedError: The shares together do not cover a tensor exactly once; nothing may be committed.

    Ranks: rank 0.
    """
    files: list[DataFile] = []
    tensors: dict[str, tuple[Block, list[Chunk]]] = {}
    for share in shares:
        if share.file is None:
            continue
        for block, offset in zip(share.blocks, share.offsets, strict=True):
            _, chunks = tensors.setdefault(block.name, (block, []))
            chunks.append(Chunk(file=len(files), offset=offset, start=block.start, shape=block.shape))
        files.append(share.file)
    manifest = Manifest(
        step=header.step,
        run=header.run,
        attempt=header.attempt,
        layout=header.layout,
        world_size=header.world_size,
        created=time.time(),
        writer={"host": socket.gethostname(), "pid": os.getpid()},
        files=tuple(files),
        tensors={
            name: TensorEntry(dtype=block.dtype, shape=block.whole, chunks=tuple(sorted(chunks, key=_place)))
            for name, (block, chunks) in tensors.items()
        },
        objects=dict(header.objects),
        metrics=dict(header.metrics),
        versions=versions(),
        timings=dict(header.timings),
        parent=header.parent,
        config=header.config,
    )
    try:
        check(manifest)
    except ValueError as error:
        raise RankFailedError(
            action=f"save of step {header.step}", rank=0, host=socket.gethostname(), cause=str(error)
        ) from error
    return manifest


def _place(chunk: Chunk) -> tuple[int, ...]:
    return chunk.start


def versions() -> dict[str, str]:
    """Return the versions that a manifest names.

    Ranks: any.
    """
    return {"distckpt": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}


def publish(storage: Storage, folder: str, manifest: Manifest) -> int:
    """Commit: publish the manifest, and return its size in bytes; from here on the checkpoint exists.

    Raises:
        CheckpointExistsError: Another attempt has committed this step.
        StorageError: It could not be published; the checkpoint does not exist.

    Ranks: rank 0, once every rank's share is durable.
    """
    name = names.join(folder, names.MANIFEST)
    data = serialize(manifest)
    try:
        storage.publish(name, data)
    except FileExistsError as error:
        raise CheckpointExistsError(path=names.join(storage.url, name), found=_who(storage, name)) from error
    return len(data)


def _who(storage: Storage, name: str) -> str:
    """Return who committed the checkpoint that is there, as far as it can be told."""
    try:
        there = parse(storage.read_all(name, limit_bytes=1 << 30), path=storage.url)
    except (DistckptError, OSError):
        return "by an unknown writer"
    writer: dict[str, Any] = there.writer
    return f"by process {writer.get('pid')} on {writer.get('host')}, attempt {there.attempt}, run {there.run}"

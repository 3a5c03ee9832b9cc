"""What each rank wrote, and the manifest that is made of it."""

from __future__ import annotations

import base64
import operator
import os
import platform
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from distckpt import datafiles, names
from distckpt.datafiles import segment_sizes
from distckpt.errors import CheckpointExistsError, DistckptError, RankFailedError, UsageError
from distckpt.manifest import (
    MAX_BYTES,
    Chunk,
    DataFile,
    Layout,
    Manifest,
    ObjectEntry,
    Segment,
    TensorEntry,
    check_tensors,
    parse,
    serialize,
    tensors_text,
)
from distckpt.plan import Block
from distckpt.staging import Staged
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
        """Return the share as JSON, for rank 0: all but its blocks, which `fileplan.to_json` describes.

        Ranks: any.
        """
        if self.file is None:
            return None
        file = self.file
        digests = base64.b64encode(bytes.fromhex("".join(segment.digest for segment in file.segments))).decode()
        return [file.num_bytes, file.segments[0].num_bytes, digests]

    @classmethod
    def from_json(cls, body: Json, blocks: Json, *, rank: int, attempt: str) -> RankShare:
        """Return the share that `to_json` and `fileplan.to_json` described.

        Args:
            body: What `to_json` returned.
            blocks: What `fileplan.from_json` returned.
            rank: The rank that wrote it.
            attempt: The save's name.

        Ranks: any.
        """
        if body is None:
            return cls(file=None, blocks=(), offsets=())
        num_bytes, header_bytes, packed = body
        digests = base64.b64decode(packed).hex()
        segments = tuple(
            Segment(num_bytes=size, digest=digests[32 * index : 32 * (index + 1)])
            for index, size in enumerate(segment_sizes(header_bytes, num_bytes))
        )
        of_file, offsets = blocks
        name = names.rank_file(attempt, rank)
        file = DataFile(name=name, rank=rank, num_bytes=num_bytes, segments=segments)
        return cls(file=file, blocks=of_file, offsets=offsets)


def write_share(
    storage: Storage,
    folder: str,
    attempt: str,
    *,
    rank: int,
    staged: Staged | None,
    look: Callable[[int, memoryview], None] | None = None,
) -> RankShare:
    """Write a rank's share to its data file, and return what was written; durable when this returns.

    Args:
        storage: The storage.
        folder: The checkpoint's folder in it.
        attempt: The save's name.
        rank: This rank.
        staged: What to write; None if this rank writes nothing.
        look: Is called with each piece of the file and where it begins, in order.

    Raises:
        StorageError: It could not be written; the file is not there.

    Ranks: any.
    """
    if staged is None:
        return RankShare(file=None, blocks=(), offsets=())
    plan = staged.plan
    name = names.rank_file(attempt, rank)
    file = datafiles.write(storage, folder, name, rank=rank, parts=staged.parts(), num_bytes=plan.num_bytes, look=look)
    storage.sync([names.join(folder, name)])
    return RankShare(file=file, blocks=plan.blocks, offsets=plan.offsets)


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


@dataclass(slots=True)
class Draft:
    """What rank 0 keeps of a manifest for the next one, which mostly has the same tensors in the same places.

    Attributes:
        tensors: The tensors' entries, checked.
        text: The JSON of them.
    """

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    text: str = ""
    _made_of: list[tuple[Block, ...]] = field(default_factory=list)

    def take(self, shares: Sequence[RankShare]) -> None:
        """Take in what the ranks wrote; nothing is to be done if they wrote the same blocks as before.

        Raises:
            ValueError: The shares together do not cover a tensor exactly once.

        Ranks: rank 0.
        """
        written = [share for share in shares if share.file is not None]
        made_of = [share.blocks for share in written]
        if self.text and len(made_of) == len(self._made_of) and all(map(operator.is_, made_of, self._made_of)):
            return
        self.text = ""
        found: dict[str, tuple[Block, list[Chunk]]] = {}
        for index, share in enumerate(written):
            for block, offset in zip(share.blocks, share.offsets, strict=True):
                _, chunks = found.setdefault(block.name, (block, []))
                chunks.append(Chunk(index, offset, block.start, block.shape))
        tensors = {
            name: TensorEntry(block.dtype, block.whole, tuple(sorted(chunks, key=_place)))
            for name, (block, chunks) in found.items()
        }
        check_tensors(tensors, [share.file.num_bytes for share in written if share.file is not None])
        self.tensors, self.text, self._made_of = tensors, tensors_text(tensors), made_of


def assemble(header: Header, shares: Sequence[RankShare], draft: Draft | None = None) -> Manifest:
    """Return the manifest of what all ranks wrote.

    Args:
        header: What it says beyond files and tensors.
        shares: What each rank wrote.
        draft: What is kept from the manifest before.

    Raises:
        RankFailedError: The shares together do not cover a tensor exactly once; nothing may be committed.

    Ranks: rank 0.
    """
    draft = Draft() if draft is None else draft
    try:
        draft.take(shares)
    except ValueError as error:
        raise RankFailedError(
            action=f"save of step {header.step}", rank=0, host=socket.gethostname(), cause=str(error)
        ) from error
    return Manifest(
        step=header.step,
        run=header.run,
        attempt=header.attempt,
        layout=header.layout,
        world_size=header.world_size,
        created=time.time(),
        writer={"host": socket.gethostname(), "pid": os.getpid()},
        files=tuple(share.file for share in shares if share.file is not None),
        tensors=draft.tensors,
        objects=dict(header.objects),
        metrics=dict(header.metrics),
        versions=versions(),
        timings=dict(header.timings),
        parent=header.parent,
        config=header.config,
    )


def _place(chunk: Chunk) -> tuple[int, ...]:
    return chunk.start


def versions() -> dict[str, str]:
    """Return the versions that a manifest names.

    Ranks: any.
    """
    return {"distckpt": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}


def publish(
    storage: Storage,
    folder: str,
    manifest: Manifest,
    *,
    texts: Mapping[str, str] | None = None,
    limit_bytes: int = MAX_BYTES,
) -> int:
    """Commit: publish the manifest, and return its size in bytes; from here on the checkpoint exists.

    Args:
        storage: The storage.
        folder: The checkpoint's folder in it.
        manifest: The manifest.
        texts: Parts of it as JSON, as far as they are known; see `manifest.serialize`.
        limit_bytes: The largest manifest that a reader takes.

    Raises:
        UsageError: The manifest is larger than any reader takes; the checkpoint does not exist.
        CheckpointExistsError: Another attempt has committed this step.
        StorageError: It could not be published; the checkpoint does not exist.

    Ranks: rank 0, once every rank's share is durable.
    """
    name = names.join(folder, names.MANIFEST)
    data = serialize(manifest, texts=texts)
    if len(data) > limit_bytes:
        num_chunks = sum(len(entry.chunks) for entry in manifest.tensors.values())
        raise UsageError(
            problem=f"the manifest of step {manifest.step} has {len(data):,} bytes, for {num_chunks:,} pieces of "
            f"tensors; at most {limit_bytes:,} can be read back",
            fix="shard over fewer ranks and replicate over the rest, as in a 2-D mesh, or fuse small tensors",
        )
    try:
        storage.publish(name, data)
    except FileExistsError as error:
        fix = None
        if manifest.parent is not None:  # what went on from an older one meets what came after that
            fix = "go on from there in a branch, and leave this one as it is: "
            fix += f'CheckpointManager({storage.url!r}, at={manifest.parent["step"]}, branch="NAME")'
        raise CheckpointExistsError(
            path=names.join(storage.url, name), found=committed_by(storage, name), fix=fix
        ) from error
    return len(data)


def committed_by(storage: Storage, name: str) -> str:
    """Return who committed the checkpoint that is there, as far as it can be told.

    Args:
        storage: The storage.
        name: The manifest's name in it.

    Ranks: any.
    """
    try:
        there = parse(storage.read_all(name, limit_bytes=1 << 30), path=storage.url)
    except (DistckptError, OSError):
        return "by an unknown writer"
    writer: dict[str, Any] = there.writer
    return f"by process {writer.get('pid')} on {writer.get('host')}, attempt {there.attempt}, run {there.run}"

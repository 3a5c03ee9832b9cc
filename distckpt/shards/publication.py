"""The manifest that is made of what all ranks wrote, and its publication."""

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
from distckpt.allotment import Allotment
from distckpt.errors import CheckpointExistsError, DistckptError, RankFailedError, UsageError
from distckpt.manifest import MAX_BYTES, Layout, Manifest, ObjectEntry, parse, serialize
from distckpt.shards.draft import Draft
from distckpt.shards.share import RankShare
from distckpt.storage import Storage
from distckpt.values import Json
from distckpt.version import __version__


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


def assemble(
    header: Header,
    shares: Sequence[RankShare],
    draft: Draft | None = None,
    allotment: Allotment | None = None,
) -> Manifest:
    """Return the manifest of what all ranks wrote.

    Args:
        header: What it says beyond files and tensors.
        shares: What each rank wrote.
        draft: What is kept from the manifest before.
        allotment: What they wrote beyond the blocks of their shares; None is nothing.

    Raises:
        RankFailedError: The shares together do not cover a tensor exactly once; nothing may be committed.

    Ranks: rank 0.
    """
    draft = Draft() if draft is None else draft
    try:
        draft.take(shares, allotment)
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

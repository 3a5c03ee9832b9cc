"""DCP's storage reader, and a manifest in DCP's terms."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from operator import add
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from distckpt import catalog, names
from distckpt.datafiles import Reader
from distckpt.manifest import Manifest, TensorEntry
from distckpt.shards.boxes import read_boxes
from distckpt.storage import Storage, open_storage
from distckpt.tensors import DTYPES, Box
from distckpt.values import Json, decode


def _read_plan(storage: Storage, folder: str, manifest: Manifest, plan: LoadPlan, planner: LoadPlanner) -> None:
    """Read the tensors of a rank's plan, and when all are good, copy them to what the planner resolves them to."""
    aliases = _aliases(manifest)
    items = [item for item in plan.items if item.type == LoadItemType.TENSOR]
    boxes = []
    for item in items:
        name = item.storage_index.fqn
        start = tuple(map(add, item.storage_index.offset or (), item.storage_offsets))
        boxes.append((aliases.get(name, name), Box(start=start, shape=tuple(item.lengths))))
    path = names.join(storage.url, folder)
    reader = Reader(storage, folder, manifest.files, path=path, step=manifest.step)
    for item, tensor in zip(items, read_boxes(reader, manifest, boxes), strict=True):
        target = planner.resolve_tensor(item).detach()
        target.copy_(tensor)
        planner.commit_tensor(item, target)


class ShardReader(StorageReader):
    """DCP's storage reader for one distckpt checkpoint.

    Args:
        path: The checkpoint's folder, or that of a run, whose newest checkpoint is then meant; a path or URL.
        storage_options: For the file system of the URL, as fsspec takes them.
    """

    def __init__(self, path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> None:
        self._path = path
        self._storage_options = storage_options
        self._opened: tuple[Storage, str, Manifest] | None = None

    def _open(self) -> tuple[Storage, str, Manifest]:
        if self._opened is None:
            storage = open_storage(self._path, storage_options=self._storage_options)
            folder, manifest = catalog.locate(storage)
            self._opened = storage, folder, manifest
        return self._opened

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load; a `checkpoint_id` that DCP was given takes the path's place.

        Ranks: any.
        """
        if checkpoint_id is not None:
            self._path = checkpoint_id
        self._opened = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checkpoint's contents in DCP's terms.

        Raises:
            CheckpointNotFoundError: There is no checkpoint.
            CheckpointDamagedError: Its manifest is not whole.

        Ranks: any.
        """
        return to_metadata(self._open()[2])

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remember nothing: every rank reads the manifest.

        Ranks: any.
        """

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is.

        Ranks: any.
        """
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are.

        Ranks: any.
        """
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's part.

        Raises:
            CheckpointDamagedError: Bytes are missing or wrong.
            StorageError: A file could not be read.

        Ranks: any.
        """
        storage, folder, manifest = self._open()
        _read_plan(storage, folder, manifest, plan, planner)
        nodes = dict(_nodes(manifest))
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                # DCP's planner unpickles what it gets here; it gets what was pickled in this line.
                buffer = io.BytesIO()
                torch.save(decode(nodes[item.storage_index.fqn], _no_tensor), buffer)
                buffer.seek(0)
                planner.load_bytes(item, buffer)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Say whether DCP may choose this reader by the path alone: no, it has to be asked for.

        Ranks: any.
        """
        return False


def to_metadata(manifest: Manifest) -> Metadata:
    """Return a manifest's contents in DCP's terms.

    Ranks: any.
    """
    tensors = {name: _to_dcp(entry) for name, entry in manifest.tensors.items()}
    aliases = {name: tensors[stored] for name, stored in _aliases(manifest).items()}
    values = {name: BytesStorageMetadata() for name, _ in _nodes(manifest)}
    return Metadata(
        state_dict_metadata={**values, **aliases, **tensors},
        storage_data={
            MetadataIndex(name, torch.Size([0] * len(entry.shape))): entry for name, entry in manifest.tensors.items()
        },
        storage_meta=StorageMeta(),
    )


def _to_dcp(entry: TensorEntry) -> TensorStorageMetadata:
    # The reader finds what lies where; who plans with one chunk need not go through those of all ranks.
    shape = torch.Size(entry.shape)
    chunks = [ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=shape)]
    properties = TensorProperties(dtype=DTYPES[entry.dtype])
    return TensorStorageMetadata(properties=properties, size=shape, chunks=chunks)


def _aliases(manifest: Manifest) -> dict[str, str]:
    """Return the names under which a tensor stands a second time in the state: tied weights."""
    found = {}
    for name, tree in _nodes(manifest, with_tensors=True):
        if isinstance(tree, dict) and "$tensor" in tree and tree["$tensor"] != name:
            found[name] = tree["$tensor"]
    return found


def _nodes(manifest: Manifest, *, with_tensors: bool = False) -> Iterator[tuple[str, Json]]:
    """Yield (name, JSON) of every value in the state, containers included, that holds no tensor."""
    for key, entry in manifest.objects.items():
        if not entry.per_rank:
            yield from _subtrees(key, entry.trees[0], with_tensors=with_tensors)


def _subtrees(name: str, tree: Json, *, with_tensors: bool) -> Iterator[tuple[str, Json]]:
    body, tag = tree, ""
    if isinstance(tree, dict) and len(tree) == 1 and (tag := next(iter(tree))).startswith("$"):
        body = tree[tag]
    if tag in ("$tensor", "$array"):
        if with_tensors:
            yield name, tree
        return
    if with_tensors or not _has_tensor(tree):
        yield name, tree
    if tag in ("$dict", "$counter"):
        for part, item in body:
            yield from _subtrees(f"{name}.{decode(part, _no_tensor)}", item, with_tensors=with_tensors)
    elif isinstance(body, list) and tag in ("", "$tuple"):
        for index, item in enumerate(body):
            yield from _subtrees(f"{name}.{index}", item, with_tensors=with_tensors)
    elif isinstance(body, dict):
        for part, item in body.items():
            yield from _subtrees(f"{name}.{part}", item, with_tensors=with_tensors)


def _has_tensor(tree: Json) -> bool:
    if isinstance(tree, list):
        return any(_has_tensor(item) for item in tree)
    return isinstance(tree, dict) and any(tag in ("$tensor", "$array") or _has_tensor(i) for tag, i in tree.items())


def _no_tensor(tag: str, name: str) -> Any:
    raise ValueError(f"{tag} {name!r} where a value is expected")

"""DCP's storage writer, on top of writing a rank's share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from distckpt import names
from distckpt.errors import UnsupportedStateError, UsageError
from distckpt.manifest import ObjectEntry
from distckpt.plan import Block, in_file_order
from distckpt.shards.publication import Header, assemble, publish
from distckpt.shards.share import RankShare, write_share
from distckpt.staging import stage_once
from distckpt.storage import Storage, open_storage
from distckpt.tensors import DTYPE_NAMES
from distckpt.values import Json, encode


def _planned(plan: SavePlan, planner: SavePlanner) -> list[tuple[Block, torch.Tensor]]:
    """Return the blocks of a plan in the order of their file, and the data of each."""
    share: dict[Block, torch.Tensor] = {}
    for item in plan.items:
        facts = item.tensor_data
        if item.type == WriteItemType.BYTE_IO or facts is None:
            continue
        block = Block(
            name=item.index.fqn,
            dtype=DTYPE_NAMES[facts.properties.dtype],
            whole=tuple(facts.size),
            start=tuple(facts.chunk.offsets),
            shape=tuple(facts.chunk.sizes),
        )
        share[block] = cast(torch.Tensor, planner.resolve_data(item)).detach()
    return [(block, share[block]) for block in in_file_order(list(share))]


class ShardWriter(StorageWriter):
    """DCP's storage writer for one distckpt checkpoint.

    The checkpoint is committed, or not there at all; an existing one is never overwritten.

    Args:
        path: The checkpoint's folder, as a path or URL. A name like "step-000000001000" states its step.
        storage_options: For the file system of the URL, as fsspec takes them.
    """

    def __init__(self, path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> None:
        self._storage_options = storage_options
        self._path = path
        self._storage: Storage | None = None
        self._attempt = ""

    @property
    def storage(self) -> Storage:
        """The checkpoint's folder, opened at first use.

        Ranks: any.
        """
        if self._storage is None:
            self._storage = open_storage(self._path, storage_options=self._storage_options)
        return self._storage

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save; a `checkpoint_id` that DCP was given takes the path's place.

        Ranks: any.
        """
        if checkpoint_id is not None:
            self._path, self._storage = checkpoint_id, None
        self._attempt = ""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remember nothing: every rank writes.

        Ranks: any.
        """

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is.

        Ranks: any.
        """
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give the save a name that no other has, known to all ranks.

        Ranks: any.
        """
        attempt = names.new_attempt()
        return [replace(plan, storage_data=attempt) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's share.

        Raises:
            StorageError: It could not be written.
            UnsupportedStateError: A value cannot be saved; names the key.

        Ranks: any.
        """
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        planned = _planned(plan, planner)
        staged = stage_once(planned) if planned else None
        share = write_share(self.storage, "", plan.storage_data, rank=rank, staged=staged)
        values = {
            item.index.fqn: encode(_value(item, planner), item.index.fqn, lambda _key, _value: None)
            for item in plan.items
            if item.type == WriteItemType.BYTE_IO
        }
        written = (plan.storage_data, share, values)
        done: Future[list[WriteResult]] = Future()
        # One result carries all: what a rank wrote is known as a whole, not tensor by tensor.
        done.set_result(
            [
                WriteResult(index=item.index, size_in_bytes=0, storage_data=written if number == 0 else None)
                for number, item in enumerate(plan.items)
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit.

        Raises:
            CheckpointExistsError: There is a checkpoint in this folder already.
            StorageError: The manifest could not be published.

        Ranks: any.
        """
        written = [rank_results[0].storage_data for rank_results in results if rank_results]
        values: dict[str, Json] = {}
        for _, _, rank_values in written:
            values.update(rank_values)
        shares = [share for _, share, _ in written]
        folder = self.storage.url.rstrip("/").rpartition("/")[2]
        header = Header(
            step=names.parse_step(folder) or 0,
            run=names.new_attempt(),
            attempt=written[0][0] if written else names.new_attempt(),
            layout="sharded",
            world_size=len(results),
            objects=_objects(metadata, shares, values),
        )
        publish(self.storage, "", assemble(header, shares))

    def storage_meta(self) -> StorageMeta | None:
        """Return where the checkpoint lies.

        Ranks: any.
        """
        return StorageMeta(checkpoint_id=str(self._path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Say whether DCP may choose this writer by the path alone: no, it has to be asked for.

        Ranks: any.
        """
        return False


def _value(item: Any, planner: SavePlanner) -> Any:
    """Return the plain value of an item: DCP's own planner would hand over a pickle of it."""
    lookup = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise UnsupportedStateError(
            key=item.index.fqn,
            problem=f"comes from a {type(planner).__name__}, which pickles values",
            fix="dcp.save(..., planner=distckpt.shards.ShardSavePlanner())",
        )
    return lookup(item.index)


def _objects(metadata: Metadata, shares: list[RankShare], values: Mapping[str, Json]) -> dict[str, ObjectEntry]:
    """Return the state's keys as trees, from the flat names and the paths that DCP's planner kept for them."""
    paths: Mapping[str, tuple[Any, ...]] = metadata.planner_data or {}
    flat: dict[str, Json] = {block.name: {"$tensor": block.name} for share in shares for block in share.blocks}
    flat.update(values)
    roots: dict[str, Any] = {}
    for name in sorted(flat):
        path = paths.get(name, (name,))
        node: Any = roots
        for part in path[:-1]:
            node = node.setdefault(part, {})
        if path[-1] in node:
            raise UsageError(problem=f"two entries of the state have the name {name!r}")
        node[path[-1]] = _Ready(flat[name])
    return {str(key): ObjectEntry(kind="value", trees=(_tree(node, str(key)),)) for key, node in roots.items()}


class _Ready:
    """JSON that is encoded already, standing among plain dicts."""

    def __init__(self, tree: Json) -> None:
        self.tree = tree


def _tree(node: Any, key: str) -> Json:
    if isinstance(node, dict) and node and all(type(part) is int for part in node):
        return [_tree(node[index], f"{key}.{index}") for index in sorted(node)]
    return encode(node, key, lambda _key, value: value.tree if isinstance(value, _Ready) else None)

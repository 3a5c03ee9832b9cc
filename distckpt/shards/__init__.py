"""Shards: distckpt's storage writer, storage reader and planners for `torch.distributed.checkpoint` (DCP).

They are the engine of every save and restore here, and work with DCP's own entry points as well:

    dcp.save(state, storage_writer=ShardWriter(path), planner=ShardSavePlanner())
    dcp.load(state, storage_reader=ShardReader(path), planner=ShardLoadPlanner())

The four classes for DCP are imported when they are first used: a restart has no need of DCP, whose import takes as long
as that of all of distckpt.
Invariant: nothing on storage is pickled. Values lie there as JSON, tensors as raw bytes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distckpt.shards.boxes import Wanted, read_boxes, read_into, spans
from distckpt.shards.division import cut, own_blocks, own_share
from distckpt.shards.draft import Draft
from distckpt.shards.publication import Header, assemble, committed_by, publish
from distckpt.shards.share import RankShare, write_share

if TYPE_CHECKING:
    from distckpt.shards.planners import ShardLoadPlanner, ShardSavePlanner
    from distckpt.shards.reader import ShardReader
    from distckpt.shards.writer import ShardWriter

_HOMES = {
    "ShardLoadPlanner": "planners",
    "ShardReader": "reader",
    "ShardSavePlanner": "planners",
    "ShardWriter": "writer",
}

__all__ = [
    "Draft",
    "Header",
    "RankShare",
    "ShardLoadPlanner",
    "ShardReader",
    "ShardSavePlanner",
    "ShardWriter",
    "Wanted",
    "assemble",
    "committed_by",
    "cut",
    "own_blocks",
    "own_share",
    "publish",
    "read_boxes",
    "read_into",
    "spans",
    "write_share",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"distckpt.shards.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Shards: distckpt's storage writer, storage reader and planners for `torch.distributed.checkpoint` (DCP).

They are the engine of every save and restore here, and work with DCP's own entry points as well:

    dcp.save(state, storage_writer=ShardWriter(path), planner=ShardSavePlanner())
    dcp.load(state, storage_reader=ShardReader(path), planner=ShardLoadPlanner())

Invariant: nothing on storage is pickled. Values lie there as JSON, tensors as raw bytes.
"""

from distckpt.shards.boxes import Wanted, read_boxes, read_into, spans
from distckpt.shards.planners import ShardLoadPlanner, ShardSavePlanner, cut, own_blocks, own_share
from distckpt.shards.reader import ShardReader
from distckpt.shards.share import Draft, Header, RankShare, assemble, publish
from distckpt.shards.writer import ShardWriter, write_share

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
    "cut",
    "own_blocks",
    "own_share",
    "publish",
    "read_boxes",
    "read_into",
    "spans",
    "write_share",
]

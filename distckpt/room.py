"""Room for a save: what each rank will write where, and whether it fits, known before a byte is staged or written.

Each rank tells what its file system has left and what it will write there; rank 0 adds up what shares a file system.
Invariant: no save is refused that would fit: what cannot be known in advance counts as nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from distckpt.checksum import digest
from distckpt.errors import StorageFullError
from distckpt.manifest import Layout
from distckpt.state import FlatObject
from distckpt.storage import Storage, mount_point, room_of


class Standing(NamedTuple):
    """How one rank stands.

    Attributes:
        place: A short name of the file system that it writes to; ranks that share it say the same.
        needed_bytes: What of the state comes there, at least.
        free_bytes: What the file system has left.
    """

    place: str
    needed_bytes: int
    free_bytes: int


def told(
    storage: Storage, objects: Sequence[FlatObject], *, layout: Layout, rank: int, world_size: int
) -> Standing | None:
    """Return how this rank stands; None if the storage cannot tell what it has left.

    Whose own an object is may turn out only when the ranks compare theirs; it then counts as if all held the same.

    Args:
        storage: Where the checkpoint will lie.
        objects: The state, flattened.
        layout: Who writes.
        rank: This rank.
        world_size: How many ranks there are.

    Ranks: any; asks the system once.
    """
    room = room_of(storage)
    if room is None:
        return None
    shared, own = 0, 0
    for flat in objects:
        for owner, num_bytes in flat.structure.num_bytes.items():
            if flat.per_rank or owner == rank:
                own += num_bytes
            elif owner is None:
                shared += num_bytes
    if layout == "sharded":
        shared //= world_size
    elif rank != 0:
        shared = 0
    return Standing(digest(room.place.encode())[:12], own + shared, room.num_bytes)


def judge(standings: Sequence[Standing | None], *, layout: Layout, step: int, storage: Storage) -> None:
    """Compare what all ranks will write with what their file systems have left.

    Args:
        standings: How each rank stands; None of those whose storage cannot tell.
        layout: Who writes.
        step: The step that is to be saved.
        storage: Where the checkpoint will lie.

    Raises:
        StorageFullError: On one of them there is not enough room.

    Ranks: rank 0.
    """
    if layout == "full":  # rank 0 writes for all, to its own file system
        first = standings[0]
        if first is None:
            return
        needed = sum(standing.needed_bytes for standing in standings if standing is not None)
        standings = [first._replace(needed_bytes=needed)]
    places: dict[str, list[int]] = {}
    for rank, standing in enumerate(standings):
        if standing is not None:
            places.setdefault(standing.place, []).append(rank)
    for ranks in places.values():
        there = [standing for rank in ranks if (standing := standings[rank]) is not None]
        needed, free = sum(one.needed_bytes for one in there), min(one.free_bytes for one in there)
        if needed > free:
            raise StorageFullError(
                path=storage.url,
                step=step,
                needed_bytes=needed,
                free_bytes=free,
                ranks=ranks,
                fix=_advice(storage, needed - free, is_here=0 in ranks),
            )


def _advice(storage: Storage, num_short: int, *, is_here: bool) -> str:
    """Return what to do about a file system that is too full; of rank 0's own its top can be named."""
    here = room_of(storage) if is_here else None
    place = storage.url if here is None else mount_point(here.folder)
    return (
        f"free at least {num_short:,} bytes there (df -h {place}), keep fewer checkpoints "
        f"(distckpt prune {storage.url}), or use another directory; older checkpoints are untouched"
    )

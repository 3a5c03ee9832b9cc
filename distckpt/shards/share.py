"""What one rank writes, and what is then known of it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass

from distckpt import datafiles, names
from distckpt.datafiles import segment_sizes
from distckpt.manifest import DataFile, Segment
from distckpt.plan import Block
from distckpt.staging import Staged
from distckpt.storage import Storage
from distckpt.threads import KeptThreads
from distckpt.values import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """What one rank wrote.

    Attributes:
        file: Its data file; None if its share is empty.
        blocks: The blocks in it, in the order in which they stand there; of what an allotment tells, none.
        offsets: Where each block begins, from the file's start.
    """

    file: DataFile | None
    blocks: tuple[Block, ...]
    offsets: tuple[int, ...]

    def sizes(self) -> Json:
        """Return as JSON how long the file and its header are in bytes, for rank 0; the same as long as the plan is.

        Ranks: any.
        """
        return None if self.file is None else [self.file.num_bytes, self.file.segments[0].num_bytes]

    def digests(self) -> str:
        """Return the digests of the file's segments, for rank 0; "" without a file.

        Ranks: any.
        """
        segments = () if self.file is None else self.file.segments
        return base64.b64encode(bytes.fromhex("".join(segment.digest for segment in segments))).decode()

    @classmethod
    def from_json(cls, sizes: Json, digests: str, blocks: Json, *, rank: int, attempt: str) -> RankShare:
        """Return the share that a rank has described.

        Args:
            sizes: What `sizes` returned.
            digests: What `digests` returned.
            blocks: What `fileplan.from_json` returned.
            rank: The rank that wrote it.
            attempt: The save's name.

        Ranks: any.
        """
        if sizes is None:
            return cls(file=None, blocks=(), offsets=())
        num_bytes, header_bytes = sizes
        written = base64.b64decode(digests).hex()
        segments = tuple(
            Segment(num_bytes=size, digest=written[32 * index : 32 * (index + 1)])
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
    hasher: KeptThreads | None = None,
) -> RankShare:
    """Write a rank's share to its data file, and return what was written; durable when this returns.

    Args:
        storage: The storage.
        folder: The checkpoint's folder in it.
        attempt: The save's name.
        rank: This rank.
        staged: What to write; None if this rank writes nothing.
        look: Is called with each piece of the file and where it begins, in order.
        hasher: As `datafiles.write` takes it.

    Raises:
        StorageError: It could not be written; the file is not there.

    Ranks: any.
    """
    if staged is None:
        return RankShare(file=None, blocks=(), offsets=())
    plan = staged.plan
    name = names.rank_file(attempt, rank)
    file = datafiles.write(
        *(storage, folder, name),
        rank=rank,
        parts=staged.parts(),
        num_bytes=plan.num_bytes,
        look=look,
        hasher=hasher,
    )
    storage.sync([names.join(folder, name)])
    return RankShare(file=file, blocks=plan.blocks, offsets=plan.offsets)

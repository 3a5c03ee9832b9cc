"""The plan of a rank's data file: which blocks stand in it, where, and its header.

Invariant: a pure function of the blocks; the same blocks make the same file, but for the tensors' values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from distckpt.checksum import digest
from distckpt.plan import Block
from distckpt.safetensors import Piece, make_header
from distckpt.values import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """What stands where in a data file.

    Attributes:
        blocks: The blocks, in the order in which they stand there.
        offsets: Where each begins, from the file's start.
        header: The file's first bytes; empty if there are no blocks, for then there is no file.
        num_bytes: The file's size.
        fingerprint: A digest of blocks and offsets.
    """

    blocks: tuple[Block, ...]
    offsets: tuple[int, ...]
    header: bytes
    num_bytes: int
    fingerprint: str

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> FilePlan:
        """Return the plan of a file with these blocks, which are in the order of `plan.in_file_order`.

        Ranks: any.
        """
        pieces = [Piece(name=block.stored_name, dtype=block.dtype, shape=block.shape) for block in blocks]
        header = make_header(pieces, metadata={"format": "pt"}) if blocks else b""
        *offsets, num_bytes = accumulate((piece.num_bytes for piece in pieces), initial=len(header))
        return cls(
            blocks=tuple(blocks),
            offsets=tuple(offsets),
            header=header,
            num_bytes=num_bytes,
            fingerprint=digest(header, repr([(b.dtype, b.whole, b.start) for b in blocks]).encode()),
        )


def to_json(blocks: Sequence[Block], offsets: Sequence[int]) -> Json:
    """Return blocks and where they begin as JSON, for another rank.

    Ranks: any.
    """
    return [
        [block.name, block.dtype, block.whole, block.start, block.shape, offset]
        for block, offset in zip(blocks, offsets, strict=True)
    ]


def from_json(body: Json) -> tuple[tuple[Block, ...], tuple[int, ...]]:
    """Return the blocks and offsets that `to_json` described.

    Ranks: any.
    """
    blocks = tuple(
        Block(name=name, dtype=dtype, whole=tuple(whole), start=tuple(start), shape=tuple(shape))
        for name, dtype, whole, start, shape, _ in body
    )
    return blocks, tuple(block[-1] for block in body)

"""The plan of a rank's data file: which blocks stand in it, where, and its header.

Invariant: a pure function of the blocks; the same blocks make the same file, but for the tensors' values.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from distckpt.checksum import digest
from distckpt.plan import Block, alignment
from distckpt.safetensors import Piece, make_header
from distckpt.values import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """What stands where in a data file.

    Attributes:
        blocks: The blocks, in the order in which they stand there.
        offsets: Where each begins, from the file's start.
        rest: Those of them that an allotment does not tell of, the last ones; all of them, if there is none.
        gaps: Where zeros stand between groups of blocks: the first byte's place, and how many there are.
        header: The file's first bytes; empty if there are no blocks, for then there is no file.
        num_bytes: The file's size.
        fingerprint: A digest of blocks and offsets.
    """

    blocks: tuple[Block, ...]
    offsets: tuple[int, ...]
    rest: tuple[Block, ...]
    gaps: tuple[tuple[int, int], ...]
    header: bytes
    num_bytes: int
    fingerprint: str

    @property
    def num_spread(self) -> int:
        """How many blocks an allotment tells of, the first ones."""
        return len(self.blocks) - len(self.rest)

    @classmethod
    def of(cls, blocks: Sequence[Block], *, spread: Sequence[Sequence[Block]] = ()) -> FilePlan:
        """Return the plan of a file with these blocks.

        Args:
            blocks: Blocks in the order of `plan.in_file_order`.
            spread: Groups of blocks that stand before these, each in that order.

        Ranks: any.
        """
        everything = [block for group in (*spread, blocks) for block in group]
        names = {block.stored_name for block in everything}
        pieces: list[Piece] = []
        places: list[int] = []
        gaps: list[tuple[int, int]] = []
        end = 0
        for group in (*spread, blocks):
            rest = -end % alignment(group[0].num_bytes) if group else 0
            if rest:
                pieces.append(Piece(name=_gap_name(names, len(gaps) + 1), dtype="U8", shape=(rest,)))
                gaps.append((end, rest))
                end += rest
            for block in group:
                places.append(end)
                end += block.num_bytes
                pieces.append(Piece(name=block.stored_name, dtype=block.dtype, shape=block.shape))
        header = make_header(pieces, metadata={"format": "pt"}) if everything else b""
        return cls(
            blocks=tuple(everything),
            offsets=tuple(len(header) + place for place in places),
            rest=tuple(blocks),
            gaps=tuple((len(header) + place, size) for place, size in gaps),
            header=header,
            num_bytes=len(header) + end,
            fingerprint=digest(header, repr([(b.dtype, b.whole, b.start) for b in everything]).encode()),
        )


def _gap_name(taken: Collection[str], number: int) -> str:
    """Return a name for zeros that no tensor has."""
    name = f"(gap {number})"
    while name in taken:
        name += " "
    return name


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

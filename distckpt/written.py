"""What a rank tells rank 0 once its share is written, and what rank 0 reads from it.

All that is as it was in the save before is told by one fingerprint: a later save says little more than the digests of
what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from distckpt import fileplan
from distckpt.allotment import Allotment
from distckpt.checksum import digest
from distckpt.manifest import to_text
from distckpt.preparation import PreparedSave
from distckpt.shards import RankShare
from distckpt.state import FlatObject
from distckpt.values import Json
from distckpt.workspace import Told


class Said(NamedTuple):
    """What a rank says once its share is written, in this order: names would be as long as the rest.

    Attributes:
        timings: Seconds that staging and writing took.
        digests: Of the file, as `RankShare.digests` packs them; rank 0 has its own.
        share: The rest of `Written`, packed; likewise.
        sample: The digest of a sample of what should be the same on all ranks.
        bad: What is not finite, as `FiniteCheck.found` gives it; most often nothing.
    """

    timings: list[float]
    digests: str
    share: Json
    sample: str
    bad: Sequence[str] = ()

    def packed(self) -> list[Json]:
        """Return it as JSON, for `Said(*packed)`.

        Ranks: any.
        """
        return list(self if self.bad else self[:-1])


class _Lasting(NamedTuple):
    """What most often is as it was in the save before: see `Written`."""

    sizes: Json
    allotted: str
    blocks: Json
    trees: dict[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What rank 0 was told by another rank.

    Attributes:
        rank: That rank.
        digests: Of its file, as `RankShare.digests` packs them.
        sizes: Of its file, as `RankShare.sizes` gives them.
        allotted: The fingerprint of the allotment that it goes by.
        blocks: What it has written beyond the allotment, as `fileplan.from_json` gives it.
        trees: Its own values, by the state's keys.
    """

    rank: int
    digests: str
    sizes: Json
    allotted: str
    blocks: Json
    trees: dict[str, Json]

    @classmethod
    def of(cls, said: Said, known: Told, rank: int) -> Written:
        """Read what another rank has said.

        Raises:
            UsageError: The rank takes for known what is not.

        Ranks: rank 0.
        """

        def read(body: Json) -> _Lasting:
            sizes, pieces, packed = body
            allotted, blocks = known.unpacked(rank, "blocks", pieces, _read_pieces)
            trees = {key: known.unpacked(rank, _name(key), tree) for key, tree in packed.items()}
            return _Lasting(sizes, allotted, blocks, trees)

        lasting: _Lasting = known.unpacked(rank, "share", said.share, read)
        return cls(rank=rank, digests=said.digests, **lasting._asdict())

    def share(self, blocks: Json, attempt: str) -> RankShare:
        """Return what the rank wrote in the save of that name, with these blocks in it.

        Ranks: rank 0.
        """
        return RankShare.from_json(self.sizes, self.digests, blocks, rank=self.rank, attempt=attempt)


def told(save: PreparedSave, share: RankShare) -> tuple[str, Json]:
    """Return what rank 0 has to know of this rank's share: `digests` and `share` of what is `Said`.

    Ranks: any.
    """
    known, allotted = save.workspace.told, fingerprint(save.allotment)
    laid_out = (save.staged.plan.fingerprint if save.staged is not None else "") + allotted
    own = {o.key: (digest(o.text.encode()), o) for o in save.objects if o.per_rank}

    def pieces() -> Json:
        rest = beyond_allotment(share, save)
        return [allotted, fileplan.to_json(rest.blocks, rest.offsets)]

    def lasting() -> Json:
        """If one part has changed, the others are still told by their fingerprints."""
        trees = {key: known.packed(_name(key), values, partial(_tree_of, o)) for key, (values, o) in own.items()}
        return [share.sizes(), known.packed("blocks", digest(laid_out.encode()), pieces), trees]

    everything = to_text([laid_out, {key: values for key, (values, _) in own.items()}])
    return share.digests(), known.packed("share", digest(everything.encode()), lasting)


def fingerprint(allotment: Allotment | None) -> str:
    """Return what two ranks have in common that know of each other what they write.

    Ranks: any.
    """
    return "" if allotment is None else allotment.fingerprint


def beyond_allotment(share: RankShare, save: PreparedSave) -> RankShare:
    """Return a share without the blocks that the allotment tells of; the same ones as long as the plan is the same.

    Ranks: any.
    """
    if save.allotment is None or save.staged is None:
        return share
    plan = save.staged.plan
    return replace(share, blocks=plan.rest, offsets=plan.offsets[plan.num_spread :])


def _name(key: str) -> str:
    """Return under what a rank's own values of one of the state's keys are remembered."""
    return f"tree of {key}"


def _read_pieces(body: Json) -> tuple[str, Json]:
    allotted, blocks = body
    return allotted, fileplan.from_json(blocks)


def _tree_of(flat: FlatObject) -> Json:
    return flat.tree

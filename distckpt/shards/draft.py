"""The draft: what a manifest says of where tensors lie, made of what the ranks wrote, and kept for the next one."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from distckpt.allotment import Allotment
from distckpt.chunks import Chunk, Runs
from distckpt.manifest import TensorEntry, check_tensors, tensors_text
from distckpt.plan import Block
from distckpt.runs import Repeat, Run, merged
from distckpt.shards.share import RankShare

MANY_PIECES = 200_000  # of tensors, each named by the rank that wrote it: from here on they are worth making runs of


@dataclass(slots=True)
class Draft:
    """What rank 0 keeps of a manifest for the next one, which mostly has the same tensors in the same places.

    Attributes:
        tensors: The tensors' entries, checked.
        text: The JSON of them.
    """

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    text: str = ""
    _made_of: list[tuple[Block, ...]] = field(default_factory=list)
    _allotment: Allotment | None = None
    _begins: tuple[int, ...] = ()

    def take(self, shares: Sequence[RankShare], allotment: Allotment | None = None) -> None:
        """Take in what the ranks wrote; nothing is to be done if they wrote the same blocks as before.

        Args:
            shares: What each rank wrote.
            allotment: What they wrote beyond the blocks of their shares; None is nothing.

        Raises:
            ValueError: All of it together does not cover a tensor exactly once.

        Ranks: rank 0.
        """
        files = [share.file for share in shares if share.file is not None]
        begins = tuple(file.segments[0].num_bytes for file in files)
        made_of = [share.blocks for share in shares]
        known = self._made_of
        same = len(made_of) == len(known) and all(map(operator.is_, made_of, known)) and begins == self._begins
        if self.text and same and allotment is self._allotment:
            return
        self.text = ""
        tensors = dict(_told(shares, begins))
        if allotment is not None:
            tensors.update(_allotted(allotment, shares, begins, taken=tensors))
        check_tensors(tensors, [file.num_bytes for file in files])
        self.tensors, self.text = tensors, tensors_text(tensors)
        self._made_of, self._allotment, self._begins = made_of, allotment, begins


def _told(shares: Sequence[RankShare], begins: tuple[int, ...]) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the tensors of the shares' blocks, by name."""
    found: dict[str, tuple[Block, list[Chunk]]] = {}
    written = [share for share in shares if share.file is not None]
    for index, share in enumerate(written):
        for block, offset in zip(share.blocks, share.offsets, strict=True):
            _, chunks = found.setdefault(block.name, (block, []))
            chunks.append(Chunk(index, offset, block.start, block.shape))
    are_many = sum(len(chunks) for _, chunks in found.values()) >= MANY_PIECES
    for name, (block, chunks) in found.items():
        if are_many and len(chunks) > 1:
            runs = merged(Run(c.file, c.offset - begins[c.file], c.start, c.shape, ()) for c in chunks)
            yield name, TensorEntry(block.dtype, block.whole, Runs([_part(run, begins) for run in runs], begins))
        else:
            yield name, TensorEntry(block.dtype, block.whole, tuple(sorted(chunks, key=_place)))


def _place(chunk: Chunk) -> tuple[int, ...]:
    return chunk.start


def _part(run: Run, begins: tuple[int, ...]) -> Chunk | Run:
    return run if run.repeats else Chunk(run.file, begins[run.file] + run.offset, run.start, run.shape)


def _allotted(
    allotment: Allotment, shares: Sequence[RankShare], begins: tuple[int, ...], *, taken: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the tensors of an allotment, by name.

    Raises:
        ValueError: They are not what the shares say.
    """
    places = _Places(shares)
    for name, item in allotment.items.items():
        if name in taken:
            raise ValueError(f"{name!r} was written twice")
        parts = [_part(run, begins) for rank_run in allotment.runs[name] for run in places.moved(rank_run)]
        with_runs = any(isinstance(part, Run) for part in parts)
        chunks = Runs(parts, begins) if with_runs else tuple(part for part in parts if isinstance(part, Chunk))
        yield name, TensorEntry(item.dtype, item.spread.shape, chunks)


class _Places:
    """Which of a manifest's files each rank wrote: those that have nothing to write have none.

    Args:
        shares: What each rank wrote.
    """

    def __init__(self, shares: Sequence[RankShare]) -> None:
        count = 0
        self._files: list[int | None] = []
        for share in shares:
            self._files.append(None if share.file is None else count)
            count += share.file is not None
        self._are_ranks = count == len(shares)
        self._known: dict[tuple[int, tuple[tuple[int, int], ...]], list[int] | None] = {}

    def moved(self, run: Run) -> list[Run]:
        """Return a run of ranks as runs of files.

        Raises:
            ValueError: One of the ranks wrote none.
        """
        if self._are_ranks:
            return [run]
        key = run.file, tuple((repeat.times, repeat.step) for repeat in run.repeats)
        if key not in self._known:
            self._known[key] = self._steps(run)
        steps = self._known[key]
        if steps is not None:
            repeats = zip(run.repeats, steps, strict=True)
            moved = tuple(Repeat(repeat.dim, repeat.times, step) for repeat, step in repeats)
            return [run._replace(file=self._file(run.file), repeats=moved)]
        singles = Runs([run], (0,) * len(self._files))
        return merged(Run(self._file(c.file), c.offset, c.start, c.shape, ()) for c in singles)

    def _file(self, rank: int) -> int:
        file = self._files[rank]
        if file is None:
            raise ValueError(f"rank {rank} has written nothing, and should have")
        return file

    def _steps(self, run: Run) -> list[int] | None:
        """Return the steps between the files of a run of ranks; None if they are not even."""
        first = self._file(run.file)
        steps = [self._file(run.file + repeat.step) - first for repeat in run.repeats]
        places = [(run.file, first)]
        for repeat, step in zip(run.repeats, steps, strict=True):
            places = [(rank + n * repeat.step, file + n * step) for rank, file in places for n in range(repeat.times)]
        return steps if all(self._file(rank) == file for rank, file in places) else None

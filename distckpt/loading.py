"""Loading: one checkpoint on its way into the state, on one rank: matched, checked, read to where it belongs.

Invariant: unless the state is worth nothing yet, no byte of it is changed before all of the new is known to be good.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor

from distckpt import catalog, names, nodecopy, sharedmemory, verification
from distckpt.applying import apply, settled
from distckpt.checksum import digest
from distckpt.datafiles import Reader
from distckpt.errors import CheckpointDamagedError, StateMismatchError, UsageError
from distckpt.events import Callback
from distckpt.manifest import Manifest
from distckpt.matching import Match, Part, Selection, match
from distckpt.memorytier import KeptFiles, MemoryTier
from distckpt.nodecopy import NodeCopy
from distckpt.shards import Wanted, read_into, spans
from distckpt.storage import Readable, Storage
from distckpt.tensors import DTYPES, Box, local, local_box
from distckpt.values import Json

logger = logging.getLogger("distckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreRequest:
    """What a restore is told.

    Attributes:
        step: The checkpoint of this step; None is the newest good one.
        skip: Patterns of entries to leave as they are in the state.
        only: Patterns of the entries to load; empty is all.
        rng: Whether to set the random-number generators, too.
        heal: Whether to put damaged checkpoints aside, as their owner may, and go on with the next older one.
        fresh: Whether what is in the state is worth nothing yet, as after a restart: then it is read into at once, and
            if no checkpoint proves good it holds anything.
        memory_tier: Whether to read what this node's memory keeps of the checkpoint there.
        tell: Is told of a checkpoint that is put aside.
    """

    step: int | None = None
    skip: Sequence[str] = ()
    only: Sequence[str] = ()
    rng: bool = True
    heal: bool = False
    fresh: bool = False
    memory_tier: bool = False
    tell: Callback = lambda event: None

    @property
    def selection(self) -> Selection:
        """Which entries to load."""
        for name, patterns in (("skip", self.skip), ("only", self.only)):
            if isinstance(patterns, str):
                raise UsageError(problem=f"{name} is a string", fix=f"{name}=[{patterns!r}]")
        return Selection(skip=tuple(self.skip), only=tuple(self.only))


class Loading:
    """One checkpoint on its way into the state, on one rank.

    Args:
        state: The user's state.
        request: What the restore was told.
        storage: Where the checkpoint lies.
        folder: Its folder there.
        attempt: Its attempt, as rank 0 read it.
        manifest: Its manifest, if this rank has read it already.
        rank: This rank.
        world_size: The number of ranks.

    Attributes:
        manifest: The checkpoint's manifest, from `prepare` on.
        changes_state: Whether something of the state may have been changed.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        request: RestoreRequest,
        *,
        storage: Storage,
        folder: str,
        attempt: str,
        manifest: Manifest | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.manifest = manifest
        self._state = state
        self._request = request
        self._storage = storage
        self._folder = folder
        self._attempt = attempt
        self._rank = rank
        self._world_size = world_size
        self._path = names.join(storage.url, folder)
        self._matched = Match()
        self.changes_state = False
        self._kept = KeptFiles()
        self._shared: dict[int, list[tuple[int, int]]] = {}
        self._readers: list[Reader] = []
        self._copy: NodeCopy | None = None
        self._settled: list[Part] = []
        self._filled: dict[str, torch.Tensor] = {}

    @property
    def _is_whole(self) -> bool:
        """Whether all of the checkpoint is asked for: then every byte of it is checked, by some rank."""
        return not self._request.skip and not self._request.only

    def prepare(self) -> Json:
        """Find what goes where, and, where that is cheap, that all of it is good; changes nothing of the state.

        Returns:
            With which ranks this one may share what it reads, [place, what]; or None.

        Raises:
            StateMismatchError: The checkpoint does not fit.
            CheckpointDamagedError: It is damaged.
            StorageError: It could not be read.

        Ranks: any.
        """
        request = self._request
        manifest = self.manifest or catalog.read_manifest(self._storage, self._folder)
        if manifest.attempt != self._attempt:
            problem = "is not the one that rank 0 read"
            raise CheckpointDamagedError(path=self._path, file=names.MANIFEST, problem=problem)
        self.manifest = manifest
        if self._rank == 0 and not request.heal:  # else it is known from when the checkpoint was chosen
            self._check_sizes(manifest)
        self._matched = match(self._state, manifest, rank=self._rank, selection=request.selection, rng=request.rng)
        if self._matched.problems:
            raise StateMismatchError(
                path=self._path, step=manifest.step, problems=self._matched.problems, fix=_advice(self._matched)
            )
        if request.memory_tier:
            self._kept = MemoryTier(self._storage.url).files(manifest.files)
        self._reader = self._reader_of(self._storage)
        if self._storage.capabilities.rereads_are_cheap:
            if not request.fresh:
                self._reader.check(
                    self._shared_spans() if not self._matched.likes else spans(manifest, boxes(self._matched))
                )
                self._check_rest()
            return None
        if self._matched.likes or self._world_size == 1:
            return None  # each rank reads other bytes, or there is no other
        self._shared = {index: each for index, each in self._shared_spans().items() if index not in self._kept}
        num_bytes = sum(end - begin for each in self._shared.values() for begin, end in each)
        if not num_bytes:
            return None
        if not sharedmemory.has_room(num_bytes):
            logger.warning(
                "%s: no room in shared memory for %d bytes; each rank reads for itself", self._path, num_bytes
            )
            return None
        return [sharedmemory.place(), digest(repr(sorted(self._shared.items())).encode())]

    def _check_sizes(self, manifest: Manifest) -> None:
        """Refuse a checkpoint whose files are not as large as it says, before room is made for what they hold."""
        sizes = {file.name: file.num_bytes for file in self._storage.list(self._folder)}
        for problem in verification.wrong_sizes(sizes, manifest, folder=self._folder):
            raise CheckpointDamagedError(
                path=self._path, step=manifest.step, file=problem.file, problem=problem.problem
            )

    def fetch(self, part: nodecopy.Part) -> None:
        """Bring this rank's part of what the node's ranks want to the node's memory.

        Raises:
            CheckpointDamagedError: Bytes are missing or wrong.
            StorageError: They could not be read.

        Ranks: any.
        """
        assert self.manifest is not None
        self._part = part
        self._copy = NodeCopy(self.manifest.files, folder=self._folder, part=part, otherwise=self._storage)
        self._copy.fetch(self._reader, self._shared)

    def read(self) -> None:
        """Read into the state itself, or, if it is worth something and nothing was checked yet, to memory apart.

        Raises:
            CheckpointDamagedError: Bytes are missing or wrong.
            StorageError: They could not be read.

        Ranks: any.
        """
        assert self.manifest is not None
        fetched = self._copy is not None
        if self._copy is not None:
            self._copy.forget_names()  # every rank has opened them
        apart = not (self._request.fresh or fetched or self._storage.capabilities.rereads_are_cheap)
        self.changes_state = not apart
        self._filled = empty_tensors(self.manifest, self._matched, in_place=not apart)
        wanted = to_read(self._matched, self._filled)
        if self._copy is not None:
            everywhere = [each for each in wanted if self._is_whole or not names.is_of_rank(each[0])]
            reader = self._reader_of(self._copy)
            read_into(reader, self.manifest, everywhere)
            self._check_kept(reader)
            wanted = [each for each in wanted if not self._is_whole and names.is_of_rank(each[0])]
        meanwhile = self._apply_settled if self._request.fresh else None
        read_into(self._reader, self.manifest, wanted, meanwhile=meanwhile)
        if not fetched and (self._request.fresh or apart):
            self._check_rest()

    def _apply_settled(self) -> None:
        """Apply what does not depend on the bytes."""
        self._settled = settled(self._matched, self._filled)
        apply(self._matched, self._filled, only=[part for part in self._settled if not part.is_row])

    def apply(self) -> Json:
        """Give the objects of the state what was read.

        Returns:
            Where this rank's bytes came from: how many from the node's memory, how many from the storage, and, if
            something in the memory proved bad, [host, file, what is wrong, how many such files].

        Ranks: any.
        """
        self.changes_state = True
        apply(self._matched, self._filled, but=self._settled)
        bad = None
        if self._kept.refused:
            assert self.manifest is not None
            index, problem = min(self._kept.refused.items())
            bad = [socket.gethostname(), self.manifest.files[index].name, problem, len(self._kept.refused)]
        memory_bytes = sum(reader.num_kept_bytes for reader in self._readers)
        return [memory_bytes, self._reader.num_stored_bytes, bad]

    def close(self) -> None:
        """Let go of what is held.

        Ranks: any.
        """
        if self._copy is not None:
            self._copy.close()

    def warn(self) -> None:
        """Say which keys were saved by another number of ranks.

        Ranks: any.
        """
        assert self.manifest is not None
        for keys, does in ((self._matched.kept, "keeps its own"), (self._matched.borrowed, "takes rank 0's")):
            if keys:
                logger.warning(
                    "%s was saved by %d ranks; rank %d %s %s",
                    *(self._path, self.manifest.world_size, self._rank, does, ", ".join(keys)),
                )

    def _reader_of(self, source: Readable) -> Reader:
        assert self.manifest is not None
        reader = Reader(
            source,
            self._folder,
            self.manifest.files,
            path=self._path,
            step=self.manifest.step,
            first=self._rank,
            kept=self._kept,
        )
        self._readers.append(reader)
        return reader

    def _shared_spans(self) -> dict[int, list[tuple[int, int]]]:
        """Return what all ranks want, the same on each: the whole checkpoint, or what no rank has for itself."""
        assert self.manifest is not None
        if self._is_whole:
            return {index: [(0, file.num_bytes)] for index, file in enumerate(self.manifest.files)}
        return spans(self.manifest, [(n, box) for n, box in boxes(self._matched) if not names.is_of_rank(n)])

    def _check_rest(self) -> None:
        """Check this rank's part of what no rank asks for: a checkpoint is whole, or it is not loaded."""
        assert self.manifest is not None
        if self._is_whole:
            self._reader.check_rest(range(self._rank, len(self.manifest.files), self._world_size))

    def _check_kept(self, reader: Reader) -> None:
        """Check likewise what this node's ranks had no need to fetch."""
        if self._is_whole:
            reader.check_rest(sorted(self._kept)[self._part.number :: self._part.num_ranks])


def _advice(matched: Match) -> str:
    """Return what to do about a mismatch: the way out for its first problem."""
    first = matched.problems[0]
    key = first.removeprefix("missing in the checkpoint: ").removeprefix("not in the state: ").split(" ")[0]
    return f"build the state as it was when it was saved, or leave the entry out: skip=[{key.rstrip(':')!r}]"


def read_tensors(storage: Storage, folder: str, manifest: Manifest, matched: Match) -> dict[str, torch.Tensor]:
    """Return this rank's part of every tensor that is wanted, on the CPU; changes nothing of the state.

    Raises:
        CheckpointDamagedError: Bytes are missing or wrong.
        StorageError: A file could not be read.

    Ranks: any.
    """
    path = names.join(storage.url, folder)
    tensors = empty_tensors(manifest, matched, in_place=False)
    reader = Reader(storage, folder, manifest.files, path=path, step=manifest.step)
    read_into(reader, manifest, to_read(matched, tensors))
    return tensors


def boxes(matched: Match) -> Iterator[tuple[str, Box | None]]:
    """Yield the name of every tensor that is wanted, and which box of it this rank needs; None is all.

    Ranks: any.
    """
    for name in matched.wanted():
        like = matched.likes.get(name)
        box = local_box(like) if like is not None else None
        if like is None or box is not None:
            yield name, box


def empty_tensors(manifest: Manifest, matched: Match, *, in_place: bool) -> dict[str, torch.Tensor]:
    """Return a tensor for everything that is wanted: the state's own where it may be filled, if `in_place`, else new.

    Ranks: any.
    """
    made: dict[str, torch.Tensor] = {}
    for name in matched.wanted():
        target = matched.targets.get(name) if in_place else None
        if target is None:
            entry, like = manifest.tensors[name], matched.likes.get(name)
            shape = entry.shape if like is None else cast(DTensor, like).to_local().shape
            target = torch.empty(shape, dtype=DTYPES[entry.dtype])
        made[name] = target
    return made


def to_read(matched: Match, tensors: Mapping[str, torch.Tensor]) -> list[Wanted]:
    """Return what this rank has to read, and the memory that it goes to.

    Ranks: any.
    """
    wanted: list[Wanted] = []
    likes = matched.likes
    for name, tensor in tensors.items():
        like = likes.get(name)
        if like is None:
            is_bare = type(tensor) is torch.Tensor and not tensor.requires_grad
            wanted.append((name, None, tensor if is_bare else local(tensor)))
        elif (box := local_box(like)) is not None:
            wanted.append((name, box, local(tensor)))
    return wanted

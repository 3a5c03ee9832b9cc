"""A copy of a checkpoint's data files in a node's memory, brought there by its ranks together, each byte once.

Where reading twice is dear, as from an object store, the ranks of a node share what they read: each brings its part,
checked, to files in `/dev/shm`, from where all read. The files lose their names as soon as every rank has opened them,
and their memory with the last rank that closes them, also if it is killed.
Invariant: what `NodeCopy.read` returns was checked against the digests by the rank that brought it.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distckpt import names
from distckpt.datafiles import Reader
from distckpt.errors import StorageError
from distckpt.manifest import DataFile
from distckpt.readtasks import Range
from distckpt.sharedmemory import SHARED_MEMORY
from distckpt.storage import Capabilities, Readable, read_scattered
from distckpt.values import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of the work is this rank's.

    Attributes:
        token: The name of this copy; the same on all ranks of the node, and no other's.
        number: This rank's number among them.
        num_ranks: How many there are.
    """

    token: str
    number: int
    num_ranks: int


def teams(places: Sequence[Json]) -> Json:
    """Return which ranks share what they read, for `part_of`; of constant size where every node has as many ranks.

    Args:
        places: What each rank shares only with those of its team; None if it reads for itself.
    """
    members: dict[str, list[int]] = {}
    for rank, where in enumerate(places):
        if where is not None:
            members.setdefault(str(where), []).append(rank)
    rows: list[list[int]] = []  # [first rank, ranks of a team, teams]: teams of neighbours, one behind the other
    mixed: list[list[int]] = []
    for ranks in members.values():
        first, size = ranks[0], len(ranks)
        if size == 1:
            continue
        if ranks[-1] - first != size - 1:
            mixed.append(ranks)
        elif rows and rows[-1][1] == size and rows[-1][0] + size * rows[-1][2] == first:
            rows[-1][2] += 1
        else:
            rows.append([first, size, 1])
    return {"token": names.new_attempt(), "rows": rows, "mixed": mixed} if rows or mixed else None


def part_of(found: Json, rank: int) -> Part | None:
    """Return a rank's part of the work, by what `teams` returned; None if it is in no team."""
    for first, size, count in found["rows"]:
        number, place = divmod(rank - first, size)
        if 0 <= number < count:
            return Part(token=f"{found['token']}-{first + number * size}", number=place, num_ranks=size)
    for ranks in found["mixed"]:
        if rank in ranks:
            token = f"{found['token']}-{ranks[0]}"
            return Part(token=token, number=ranks.index(rank), num_ranks=len(ranks))
    return None


class NodeCopy:
    """The copy, as a place to read from.

    Args:
        files: The checkpoint's data files.
        folder: The checkpoint's folder, as the reader names it.
        part: This rank's part of the work.
        otherwise: Where the files are read that nothing was fetched of.

    Attributes:
        capabilities: It is memory.
    """

    def __init__(self, files: Sequence[DataFile], *, folder: str, part: Part, otherwise: Readable) -> None:
        self.capabilities = Capabilities(
            exclusive_publish=False, survives_power_loss=False, shared=False, rereads_are_cheap=True
        )
        self._files = files
        self._prefix = f"{folder}/" if folder else ""
        self._part = part
        self._folder = SHARED_MEMORY / f"distckpt-{part.token}"
        self._otherwise = otherwise
        self._fds: dict[str, int] = {}

    def close(self) -> None:
        """Let go of the memory; it is free once every rank has."""
        self.forget_names()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def fetch(self, reader: Reader, spans: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        """Bring this rank's part of the segments that spans touch.

        Args:
            reader: Reads the checkpoint.
            spans: The first byte and the one behind the last, by the file's index; the same on all ranks of the node.

        Raises:
            CheckpointDamagedError: Bytes are missing or wrong.
            StorageError: They could not be read, or there is no shared memory for them.

        Ranks: any; the others need not have come.
        """
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            memory = {index: self._opened(self._files[index]) for index in spans}
        except OSError as error:
            raise StorageError(
                path=str(self._folder), action="write", cause=error.strerror or str(error), errno=error.errno
            ) from error
        touched = [(index, begin, end) for index in sorted(spans) for begin, end in reader.touched(index, spans[index])]
        total, before = sum(end - begin for _, begin, end in touched), 0
        first, last = (total * n // self._part.num_ranks for n in (self._part.number, self._part.number + 1))
        own: dict[int, list[Range]] = {}
        for index, begin, end in touched:
            if first <= before < last:
                own.setdefault(index, []).append(Range(begin=begin, into=memory[index][begin:end]))
            before += end - begin
        reader.fill(own)

    def forget_names(self) -> None:
        """Take the files' names away: nobody else needs them, and nothing is left behind whatever happens."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into`, as `Storage.read` does."""
        self.read_scattered(name, offset, [into])

    def read_scattered(self, name: str, offset: int, into: Sequence[memoryview]) -> None:
        """Fill several buffers, as `ScatteringStorage` does."""
        fd = self._fds.get(name.removeprefix(self._prefix))
        if fd is None:
            read_scattered(self._otherwise, name, offset, into)
            return
        for view in into:
            num_read = 0
            while num_read < len(view):
                num_read += os.preadv(fd, [view[num_read:]], offset + num_read)
            offset += len(view)

    def _opened(self, file: DataFile) -> memoryview:
        fd = os.open(self._folder / file.name.replace("/", "-"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._fds[file.name] = fd
        os.ftruncate(fd, file.num_bytes)
        return memoryview(mmap.mmap(fd, file.num_bytes))

"""Reading ahead: the newest checkpoint's files come from the disk while the process still imports torch.

What is read is thrown away: it then lies in the system's page cache, where the restore finds it. A run that writes past
the page cache, as large files are, would else begin each restart with a read from the disk.
Invariant: it decides nothing. What is restored is chosen, read and checked by the restore, as if nobody had been here.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from distckpt import catalog, memorytier, names
from distckpt.errors import DistckptError
from distckpt.garbage import kept_off
from distckpt.storage import FileInfo, OpenFile, StepwiseStorage, Storage, open_storage

_STEP_BYTES = 4 << 20
_OF_MEMORY = 0.5  # of what the system has left, the most that is filled
_UNKNOWN_MEMORY = 4 << 30


class Prefetch:
    """A reading ahead on a thread of its own, which ends with the process.

    Args:
        directory: The run: a path, a URL, or its storage.
        storage_options: Options of the storage's fsspec file system.
        memory_tier: Whether to leave out what the node's memory keeps.

    Attributes:
        num_bytes: How many bytes were read ahead so far.
        error: Why it ended early; None if it did not.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Storage,
        *,
        storage_options: Mapping[str, Any] | None = None,
        memory_tier: bool = False,
    ) -> None:
        self.num_bytes = 0
        self.error: Exception | None = None
        self._directory = directory
        self._storage_options = storage_options
        self._memory_tier = memory_tier
        # A daemon: a process that fails at once is not held up by it.
        self._thread = threading.Thread(target=self._run, name="distckpt-prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """Keep Python's cyclic collector off while the context lasts: for what is imported meanwhile."""
        self._quiet = kept_off()
        self._quiet.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave what was imported, which stays to the end, out of later collections."""
        gc.freeze()
        atexit.register(gc.unfreeze)  # else libraries take what is frozen for leaks of theirs, and say so at the end
        self._quiet.__exit__(None, None, None)

    def wait(self, timeout_s: float | None = None) -> int:
        """Return how many bytes were read ahead, once that is done, or `timeout_s` is over; a restore need not wait."""
        self._thread.join(timeout_s)
        return self.num_bytes

    def _run(self) -> None:
        try:
            storage = self._opened()
            if not isinstance(storage, StepwiseStorage) or not storage.capabilities.rereads_are_cheap:
                return  # nothing would be left of it
            left = _room()
            for name, begin, end in _parts(storage, memory_tier=self._memory_tier):
                with storage.reading(name) as file:
                    for first in range(begin, end, _STEP_BYTES):
                        size = min(_STEP_BYTES, end - first)
                        if size > left:
                            return
                        _touch(file, first, size)
                        self.num_bytes += size
                        left -= size
        except (DistckptError, OSError, EOFError, ValueError) as error:
            self.error = error  # the restore will meet it, and tell

    def _opened(self) -> Storage:
        if isinstance(self._directory, str | os.PathLike):
            return open_storage(self._directory, storage_options=self._storage_options)
        return self._directory


def prefetch(
    directory: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None, memory_tier: bool = False
) -> Prefetch:
    """Begin to read the newest checkpoint from the disk to the system's memory, and return at once.

    For the top of a training script, before torch is imported:

        import distckpt
        distckpt.prefetch("runs/digits")
        import torch

    As a context round the imports it also spares them Python's cyclic collector, which takes a quarter of their time
    and finds nothing; what they made is left out of later collections, too.

        with distckpt.prefetch("runs/digits"):
            import torch

    The ranks of a node divide the work. If there are several nodes, each reads only the files that its own ranks wrote.
    On an object store it does nothing. It never fails, and `CheckpointManager.restore` need not wait for it.

    Args:
        directory: Path or URL of the run.
        storage_options: Options of the storage's fsspec file system.
        memory_tier: Whether the restore will read what the node's memory keeps: then only the rest is read ahead.

    Returns:
        The reading, of which nobody has to know more.

    Ranks: any; does not block.
    """
    return Prefetch(directory, storage_options=storage_options, memory_tier=memory_tier)


def _parts(storage: Storage, *, memory_tier: bool) -> Iterator[tuple[str, int, int]]:
    """Yield the name, the first byte and the end of what this rank reads of the newest checkpoint."""
    committed = [folder for folder in catalog.scan(storage) if folder.committed]
    if not committed:
        return
    newest = committed[-1]
    found = catalog.read_outline(storage, newest.name)
    rank, local_rank = _from_environment("RANK", 0), _from_environment("LOCAL_RANK", 0)
    num_local = _from_environment("LOCAL_WORLD_SIZE", 1)
    files = [file for file in newest.files if file.name.startswith(f"{newest.name}/{found.attempt}/")]
    if memory_tier:  # what it keeps is in memory already
        kept = {file.name for file in files if memorytier.keeps(storage.url, _in_checkpoint(file), file.num_bytes)}
        files = [file for file in files if file.name not in kept]
    if _from_environment("WORLD_SIZE", 1) > num_local:
        first = rank - local_rank
        own = {names.join(newest.name, names.rank_file(found.attempt, first + n)) for n in range(num_local)}
        files = [file for file in files if file.name in own]
    yield from _divided(files, local_rank, num_local)


def _in_checkpoint(file: FileInfo) -> str:
    """Return a file's name in its checkpoint."""
    return file.name.partition("/")[2]


def _divided(files: list[FileInfo], number: int, count: int) -> Iterator[tuple[str, int, int]]:
    """Yield an equal part of all bytes, in order."""
    total, before = sum(file.num_bytes for file in files), 0
    first, last = (total * n // count for n in (number, number + 1))
    for file in sorted(files, key=lambda file: file.name):
        begin, end = max(first - before, 0), min(last - before, file.num_bytes)
        if begin < end:
            yield file.name, begin, end
        before += file.num_bytes


def _touch(file: OpenFile, begin: int, num_bytes: int) -> None:
    """Let the system bring bytes of a file to its memory."""
    with file.seen(begin, num_bytes) as seen:
        if seen is None:
            file.read(begin, [memoryview(bytearray(num_bytes))])


def _room() -> int:
    """Return how many bytes may be read ahead: a part of the memory that the system has left, for each rank of it."""
    room = _UNKNOWN_MEMORY
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        room = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return int(_OF_MEMORY * room) // _from_environment("LOCAL_WORLD_SIZE", 1)


def _from_environment(name: str, otherwise: int) -> int:
    """Return what torchrun says."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise

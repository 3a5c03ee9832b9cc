"""Data files: safetensors files written with digests on the way, and read in ranges that are checked on the way.

A file is cut into segments, each with a digest: the header, and then pieces of `SEGMENT_BYTES`; so a reader can check
just what it reads.
Invariant: `Reader.fill` returns only if every byte that it handed out is one that its segment's digest vouches for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace

from distckpt import names
from distckpt.checksum import Running, digest
from distckpt.errors import CheckpointDamagedError, StorageError
from distckpt.manifest import DataFile, Segment
from distckpt.memorytier import KeptFiles
from distckpt.readtasks import Range, Scratch, Task, copy_part, cut, split, tiling
from distckpt.storage import OpenFile, Readable, StepwiseStorage, Storage, read_scattered
from distckpt.threads import KeptThreads, call_off

# Large enough that a read is efficient and digests are few, small enough that reading a part of a tensor reads little
# more, and that a segment is still in the processor's cache when it is hashed after it was read.
SEGMENT_BYTES = 4 << 20
# Of hashing and then looking.
STEP_BYTES = 512 << 10
# That each reader has of what is seen: else one has nothing to do while the other does the last.
_LEAST_PIECES = 4


def segment_sizes(header_bytes: int, num_bytes: int) -> list[int]:
    """Return the sizes of a file's segments: its header, and the rest in pieces of `SEGMENT_BYTES`."""
    rest = num_bytes - header_bytes
    return [header_bytes] + [min(SEGMENT_BYTES, rest - begin) for begin in range(0, rest, SEGMENT_BYTES)]


def write(
    storage: Storage,
    folder: str,
    name: str,
    *,
    rank: int,
    parts: Iterable[memoryview],
    num_bytes: int,
    look: Callable[[int, memoryview], None] | None = None,
    hasher: KeptThreads | None = None,
) -> DataFile:
    """Write a data file, durable when this returns but for its directory entry.

    Args:
        storage: The storage.
        folder: The checkpoint's folder in it.
        name: The file's name in the checkpoint.
        rank: The rank that writes it.
        parts: The file's segments, in order; each is hashed while it is written.
        num_bytes: The size of all parts.
        look: Is called with each piece of the file and where it begins, in order, on the thread that hashes.
        hasher: The one thread that hashes; by default, one for this file.

    Raises:
        StorageError: It could not be written; nothing of that name is left.
    """
    hashed: list[tuple[int, Future[str]]] = []
    threads = new_hasher() if hasher is None else hasher
    pool = threads.pool

    def passing() -> Iterator[memoryview]:
        begin = 0
        for part in parts:
            yield part  # to the storage first, whose disk writes it while it is hashed
            hashed.append((len(part), pool.submit(_digested, part, begin, look)))
            begin += len(part)

    try:
        passed = passing()
        storage.put(names.join(folder, name), passed, num_bytes=num_bytes)
        for _ in passed:  # who knows the size need not ask for the end, and the last part is hashed there
            pass
        segments = tuple(Segment(num_bytes=size, digest=found.result()) for size, found in hashed)
    finally:
        call_off(found for _, found in hashed)
        if hasher is None:
            threads.close()
    return DataFile(name=name, rank=rank, num_bytes=num_bytes, segments=segments)


def new_hasher() -> KeptThreads:
    """Return a thread for `write`, to be kept from file to file."""
    return KeptThreads(1, "distckpt-digest")


def _digested(part: memoryview, begin: int, look: Callable[[int, memoryview], None] | None) -> str:
    """Return a segment's digest; who looks does so while the processor's cache holds what was hashed.

    Source: hashing and looking for infinities ran at 23 GB/s, one after the other over 4 MiB at 16.
    """
    if look is None:
        return digest(part)
    running = Running()
    for first in range(0, len(part), STEP_BYTES):
        piece = part[first : first + STEP_BYTES]
        running.add(piece)
        look(begin + first, piece)
    return running.digest()


class Reader:
    """Reads the data files of one checkpoint, each segment checked, and remembers which it has checked.

    Args:
        storage: The storage, or what else there is to read from.
        folder: The checkpoint's folder in it.
        files: The checkpoint's data files.
        path: The checkpoint's path, for errors.
        step: The checkpoint's step, for errors.
        first: The file to begin with: ranks that begin with different ones share the work of a disk whose page cache
            they share.
        kept: What this node's memory keeps of the files: they are read there; what proves bad, from the storage.

    Attributes:
        num_kept_bytes: How many bytes were read, checked and good, from the node's memory.
        num_stored_bytes: How many from the storage.
    """

    def __init__(
        self,
        storage: Readable,
        folder: str,
        files: Sequence[DataFile],
        *,
        path: str,
        step: int | None,
        first: int = 0,
        kept: KeptFiles | None = None,
    ) -> None:
        self.num_kept_bytes = 0
        self.num_stored_bytes = 0
        self._storage = storage
        self._folder = folder
        self._files = files
        self._path = path
        self._step = step
        self._first = first
        self._kept = KeptFiles() if kept is None else kept
        self._turn = threading.Lock()
        self._checked: set[tuple[int, int]] = set()
        self._memory = Scratch()

    def fill(self, ranges: Mapping[int, Sequence[Range]], *, meanwhile: Callable[[], None] | None = None) -> None:
        """Fill ranges, in file order, each segment that they touch read once and checked.

        Args:
            ranges: What is wanted, by the file's index.
            meanwhile: Is called on this thread once the reading is under way.

        Raises:
            CheckpointDamagedError: A file is missing, short, or has other bytes than were written; what `ranges` point
                to is then undefined.
            StorageError: It could not be read for another reason.
        """
        tasks: list[Task] = []
        total = sum(len(wanted.into) for each in ranges.values() for wanted in each)
        for index, each in ranges.items():
            ordered = sorted((r for r in each if len(r.into)), key=lambda r: r.begin)
            self._refuse_short(index, max((r.end for r in ordered), default=0))
            tasks += self._tasks(index, ordered, self._most(index, total))
        self._run(tasks, meanwhile)

    def check(self, spans: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        """Check the segments that spans touch, and keep nothing of them.

        Args:
            spans: The first byte and the one behind the last, by the file's index.

        Raises:
            As `fill` does.
        """
        tasks: list[Task] = []
        total = sum(end - begin for each in spans.values() for begin, end in each)
        for index, each in spans.items():
            ordered = sorted((begin, end) for begin, end in each if end > begin)
            self._refuse_short(index, max((end for _, end in ordered), default=0))
            tasks += self._bare_tasks(index, ordered, self._most(index, total))
        self._run(tasks)

    def check_rest(self, files: Iterable[int]) -> None:
        """Check all segments of some files that have not been read yet.

        Raises:
            As `fill` does.
        """
        tasks: list[Task] = []
        chosen = {index: self._files[index].num_bytes for index in files}
        total = sum(chosen.values())
        for index, num_bytes in chosen.items():
            tasks += self._bare_tasks(index, [(0, num_bytes)], self._most(index, total), known=self._checked)
        self._run(tasks)

    def touched(self, index: int, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the reads that cover spans of a file, each the first byte and the one behind the last.

        Args:
            index: The file.
            spans: The first byte and the one behind the last.

        Raises:
            CheckpointDamagedError: The file is too short.
        """
        ordered = sorted((begin, end) for begin, end in spans if end > begin)
        self._refuse_short(index, max((end for _, end in ordered), default=0))
        most = self._source(index).capabilities.read_bytes
        return [(task.begin, task.begin + task.num_bytes) for task in self._bare_tasks(index, ordered, most)]

    def _refuse_short(self, index: int, end: int) -> None:
        if end > self._files[index].num_bytes:
            raise self._damaged(self._files[index], "is shorter than its tensors")

    def _most(self, index: int, total: int) -> int:
        """Return how much of a file to bring at once, if `total` bytes are to be brought of all files."""
        promises = self._source(index).capabilities
        return max(promises.read_bytes, min(promises.seen_bytes, total // (_LEAST_PIECES * promises.num_readers)))

    def _tasks(self, index: int, ordered: Sequence[Range], most: int) -> Iterator[Task]:
        """Yield the tasks that fill ranges, which are in order."""
        waiting = list(reversed(ordered))
        active: list[Range] = []
        for task in self._whole_tasks(index, most):
            end = task.begin + task.num_bytes
            while waiting and waiting[-1].begin < end:
                active.append(waiting.pop())
            if active:
                yield replace(task, ranges=active)
                active = [wanted for wanted in active if wanted.end > end]

    def _bare_tasks(
        self, index: int, ordered: Sequence[tuple[int, int]], most: int, known: Collection[tuple[int, int]] = ()
    ) -> Iterator[Task]:
        """Yield the tasks that check spans, which are in order."""
        waiting = list(reversed(ordered))
        reach = 0
        for task in self._whole_tasks(index, most):
            end = task.begin + task.num_bytes
            while waiting and waiting[-1][0] < end:
                reach = max(reach, waiting.pop()[1])
            numbers = range(task.number, task.number + len(task.segments))
            if reach > task.begin and not all((index, number) in known for number in numbers):
                yield task

    def _whole_tasks(self, index: int, most: int) -> Iterator[Task]:
        """Yield a file's segments, as many together as make one good read."""
        segments = list(self._files[index].segments)
        yield from split(Task(index=index, number=0, begin=0, segments=segments, ranges=[]), most)

    def _run(self, tasks: list[Task], meanwhile: Callable[[], None] | None = None) -> None:
        """Do the tasks with threads, and meanwhile something else; the first failure ends all."""
        num_files = max(len(self._files), 1)
        tasks.sort(key=lambda task: ((task.index - self._first) % num_files, task.begin))
        most = max((self._source(task.index).capabilities.num_readers for task in tasks), default=0)
        num_readers = min(most, len(tasks))
        with ExitStack() as stack:
            files = _OpenFiles(stack)
            if num_readers < 2:
                for task in tasks:
                    self._do(task, files)
                if meanwhile is not None:
                    meanwhile()
                return
            readers = stack.enter_context(ThreadPoolExecutor(num_readers, thread_name_prefix="distckpt-read"))
            try:
                done = readers.map(lambda task: self._do(task, files), tasks)
                if meanwhile is not None:
                    meanwhile()
                for _ in done:
                    pass
            except BaseException:
                readers.shutdown(cancel_futures=True)
                raise

    def _source(self, index: int) -> Readable | KeptFiles:
        """Return where a file is read."""
        return self._kept if index in self._kept else self._storage

    def _do(self, task: Task, files: _OpenFiles) -> None:
        """Bring one task's segments to where they are wanted, from the nearest place where they are good."""
        if task.index in self._kept:
            try:
                self._bring(task, lambda: files.get(("kept", task.index), lambda: self._kept.reading(task.index)))
            except (CheckpointDamagedError, StorageError) as error:
                self._kept.refuse(task.index, getattr(error, "problem", str(error)))
            else:
                self._note(task, num_kept_bytes=task.num_bytes)
                return
        storage, name = self._storage, names.join(self._folder, self._files[task.index].name)
        if isinstance(storage, StepwiseStorage):
            self._bring(task, lambda: files.get(("stored", task.index), lambda: storage.reading(name)))
        else:
            self._bring(task, lambda: None)
        self._note(task, num_stored_bytes=task.num_bytes)

    def _note(self, task: Task, *, num_kept_bytes: int = 0, num_stored_bytes: int = 0) -> None:
        """Take note of what was read and is good."""
        with self._turn:
            self.num_kept_bytes += num_kept_bytes
            self.num_stored_bytes += num_stored_bytes
            self._checked.update((task.index, task.number + number) for number in range(len(task.segments)))

    def _bring(self, task: Task, opened: Callable[[], OpenFile | None]) -> None:
        """Bring one task's segments to where they are wanted, each compared with its digest."""
        file = self._files[task.index]
        try:
            open_file = opened()
            with open_file.seen(task.begin, task.num_bytes) if open_file is not None else nullcontext() as seen:
                if seen is not None:
                    self._take_seen(task, seen)
                    return
                for part in split(task, self._source(task.index).capabilities.read_bytes):
                    self._take_read(part, open_file)
        except FileNotFoundError as error:
            raise self._damaged(file, "is missing") from error
        except EOFError as error:
            problem = f"is shorter than the {file.num_bytes:,} bytes that the manifest says"
            raise self._damaged(file, problem) from error

    def _take_seen(self, task: Task, seen: memoryview) -> None:
        """Hash a task's segments where they lie, and copy them while the processor's cache holds them."""
        file, begin = self._files[task.index], task.begin
        wanting = deque(task.ranges)
        for segment in task.segments:
            end = begin + segment.num_bytes
            found = digest(seen[begin - task.begin : end - task.begin])
            for wanted in wanting:
                if wanted.begin >= end:
                    break
                copy_part(wanted, seen, task.begin, begin, end)
            while wanting and wanting[0].end <= end:
                wanting.popleft()
            self._compare(file, begin, segment, found)
            begin = end

    def _take_read(self, task: Task, open_file: OpenFile | None) -> None:
        """Read a task's segments, and hash them."""
        file, end = self._files[task.index], task.begin + task.num_bytes
        targets = tiling(task, end, self._memory)
        whole = self._memory.taken(task.num_bytes) if targets is None else memoryview(b"")
        parts = [whole] if targets is None else targets
        if open_file is not None:
            open_file.read(task.begin, parts)
        else:
            read_scattered(self._storage, names.join(self._folder, file.name), task.begin, parts)
        begin = task.begin
        for segment, views in zip(task.segments, cut(parts, [s.num_bytes for s in task.segments]), strict=True):
            self._compare(file, begin, segment, digest(*views))
            begin += segment.num_bytes
        for wanted in task.ranges if targets is None else ():
            copy_part(wanted, whole, task.begin, task.begin, end)

    def _compare(self, file: DataFile, begin: int, segment: Segment, found: str) -> None:
        """Refuse a segment whose digest is not the one that was written."""
        if found != segment.digest:
            raise self._damaged(file, f"has wrong bytes between {begin:,} and {begin + segment.num_bytes:,}")

    def _damaged(self, file: DataFile, problem: str) -> CheckpointDamagedError:
        return CheckpointDamagedError(path=self._path, step=self._step, file=file.name, problem=problem)


class _OpenFiles:
    """The files of one reading, each opened when it is needed."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int], OpenFile] = {}

    def get(self, key: tuple[str, int], opened: Callable[[], AbstractContextManager[OpenFile]]) -> OpenFile:
        """Return a file, open."""
        with self._lock:
            if key not in self._open:
                self._open[key] = self._stack.enter_context(opened())
            return self._open[key]

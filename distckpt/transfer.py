"""Transfer: a checkpoint copied from one storage to another, as whole and as durable as if it had been saved there.

The copy has the source's manifest, byte for byte, and its data files under the same names. A file that is durable at
the target gets a marker beside it; a copy that is begun again takes such files as they are. Of an unfinished file it
goes on after what is right of it: by its digests, or, of an upload, by what the server has acknowledged. Copies of one
checkpoint write the same bytes to the same places, so two at once do no harm. What else lies there under a file's name
is never touched: the file is then written under a new one, which the copy's manifest states, and everything else about
it stays the same.
It needs no ownership of the target: a job there that deletes what it does not know makes the copy fail, not lie.
Invariant: the manifest is published last, when every data file is durable and each of its segments was checked.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from distckpt import catalog, names, verification
from distckpt.checksum import digest
from distckpt.errors import (
    CheckpointDamagedError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    DistckptError,
    StorageError,
)
from distckpt.manifest import MAX_BYTES, DataFile, Manifest, Segment, parse, serialize
from distckpt.storage import ContinuingStorage, KeepsUploads, Storage

logger = logging.getLogger("distckpt")

NUM_FILES = 4  # copied at a time
NUM_AHEAD = 4  # segments of each that are read ahead of the writing: at most 4 x 5 x 4 MiB in memory
MARKER = ".copied"
_ASIDE = "copy-"
_MARKER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A checkpoint's folder in a storage; "" is the storage's root."""

    storage: Storage
    folder: str

    @property
    def path(self) -> str:
        """The folder, as a path or URL."""
        return names.join(self.storage.url, self.folder)

    def inside(self, name: str) -> str:
        """Return the storage's name of a file in the folder."""
        return names.join(self.folder, name)

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file in the folder, by its name there."""
        prefix = f"{self.folder}/" if self.folder else ""
        return {file.name.removeprefix(prefix): file.num_bytes for file in self.storage.list(self.folder)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a copy did.

    Attributes:
        manifest: Of the checkpoint at the target.
        action: "copied", or "present": the target had it.
        num_bytes: What was written, in bytes of data files.
        reused_bytes: What an earlier copy had written.
    """

    manifest: Manifest
    action: Literal["copied", "present"]
    num_bytes: int
    reused_bytes: int


def copy(
    source: Place, target: Place, *, pinned: bool = False, advance: Callable[[int], object] = lambda _: None
) -> Copied:
    """Copy one checkpoint, or what an earlier copy of it left to be done.

    Args:
        source: The checkpoint.
        target: Its folder at the target.
        pinned: Whether to pin the copy.
        advance: Is told of bytes that are done, from several threads.

    Raises:
        CheckpointNotFoundError: There is no checkpoint at the source.
        CheckpointDamagedError: Its bytes are not the ones that were written, or the target's are not.
        CheckpointExistsError: The target has another checkpoint there.
        StorageError: A file could not be read or written; what is done will be used by the next try.
    """
    try:
        data = source.storage.read_all(source.inside(names.MANIFEST), limit_bytes=MAX_BYTES)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(path=source.path, reason=f"it has no {names.MANIFEST}") from error
    manifest = parse(data, path=source.path)
    present = _present(target, manifest)
    if present is not None:
        _clear(target, present)  # a copy may have been killed once it was committed
        advance(manifest.num_bytes)
        return Copied(manifest=present, action="present", num_bytes=0, reused_bytes=0)
    stored = _usable(target, manifest)
    reused_bytes = sum(file.num_bytes for file in manifest.files if file.name in stored)
    advance(reused_bytes)
    reused_bytes += _copy_files(source, target, manifest, stored, advance=advance)
    made = replace(manifest, files=tuple(replace(file, name=stored[file.name]) for file in manifest.files))
    if pinned:
        with suppress(FileExistsError):
            target.storage.publish(target.inside(names.PIN), b'{"copied":true}')
    done = _publish(target, made, data if made.files == manifest.files else serialize(made))
    _clear(target, done)
    return Copied(
        manifest=done,
        action="copied",
        num_bytes=manifest.num_bytes - reused_bytes,
        reused_bytes=reused_bytes,
    )


def _present(target: Place, manifest: Manifest) -> Manifest | None:
    """Return the target's manifest if it is of the same checkpoint, whole by its files' sizes; None if it has none.

    Raises:
        CheckpointExistsError: It is of another one.
        CheckpointDamagedError: Its manifest is not whole, or a file is missing or has another size.
    """
    try:
        there = catalog.read_manifest(target.storage, target.folder)
    except CheckpointNotFoundError:
        return None
    if _nameless(there) != _nameless(manifest):
        raise CheckpointExistsError(
            path=names.join(target.path, names.MANIFEST),
            found=f"attempt {there.attempt} of run {there.run}, not attempt {manifest.attempt} of run {manifest.run}",
            fix="copy to a directory of its own",
        )
    problem = next(_wrong(target, there), None)
    if problem is not None:
        raise CheckpointDamagedError(
            path=target.path,
            step=there.step,
            file=problem.file,
            problem=problem.problem,
            fix="delete this damaged copy, and copy again",
        )
    return there


def _nameless(manifest: Manifest) -> bytes:
    """Return all that a copy keeps, which is all but the names of the data files."""
    files = tuple(replace(file, name=f"{index}") for index, file in enumerate(manifest.files))
    return serialize(replace(manifest, files=files))


def _wrong(place: Place, manifest: Manifest) -> Iterator[verification.Problem]:
    return verification.wrong_sizes(place.sizes(), manifest)


def _usable(target: Place, manifest: Manifest) -> dict[str, str]:
    """Return where files lie that an earlier copy has made durable, by the names that the manifest has for them."""
    sizes = target.sizes()
    wanted = {_facts(manifest, file): file for file in manifest.files}
    usable = {}
    for marker in sizes:
        name = marker.removesuffix(MARKER)
        if name == marker or name not in sizes:
            continue
        try:
            facts = target.storage.read_all(target.inside(marker), limit_bytes=_MARKER_BYTES)
        except FileNotFoundError:
            continue
        file = wanted.get(facts)
        if file is not None and sizes[name] == file.num_bytes:
            usable[file.name] = name
    return usable


def _facts(manifest: Manifest, file: DataFile) -> bytes:
    """Return what the marker of a file says: whose it is, and a digest of its digests."""
    content = digest(",".join(segment.digest for segment in file.segments).encode())
    facts = {"attempt": manifest.attempt, "bytes": file.num_bytes, "digests": content, "name": file.name}
    return json.dumps(facts, sort_keys=True).encode()


def _copy_files(
    source: Place,
    target: Place,
    manifest: Manifest,
    stored: dict[str, str],
    *,
    advance: Callable[[int], object],
) -> int:
    """Copy the files that are not stored yet, and return how many of their bytes were there.

    Several go at a time; after a failure none is begun, and those in flight end at the next segment.
    """
    stop = threading.Event()
    taken = target.sizes()
    aside = f"{_ASIDE}{names.new_attempt()}"
    files = [file for file in manifest.files if file.name not in stored]
    if not files:
        return 0

    def copy_one(file: DataFile) -> int:
        begin = _begun(target, file)
        advance(begin)
        stored[file.name] = file.name if begin or file.name not in taken else names.join(aside, file.name)
        name = target.inside(stored[file.name])
        # The threads are this function's, not the generator's: one that a failed `put` leaves behind is collected in
        # whatever thread, and must have nothing to wait for.
        with ThreadPoolExecutor(NUM_AHEAD, thread_name_prefix="distckpt-read") as readers:
            chunks = _checked(source, manifest, file, begin, readers=readers, stop=stop, advance=advance)
            _put(target.storage, name, chunks, begin=begin, num_bytes=file.num_bytes)
        target.storage.sync([name])
        with suppress(FileExistsError):
            target.storage.publish(f"{name}{MARKER}", _facts(manifest, file))
        return begin

    with ThreadPoolExecutor(NUM_FILES, thread_name_prefix="distckpt-copy") as pool:
        working = [pool.submit(copy_one, file) for file in files]
        try:
            wait(working, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    failed = [future.exception() for future in working if not future.cancelled()]
    for error in failed:
        if error is not None and not isinstance(error, _StoppedError):
            raise error
    return sum(future.result() for future in working)


def _put(storage: Storage, name: str, chunks: Iterator[memoryview], *, begin: int, num_bytes: int) -> None:
    """Write a file from `begin` on, so that a try that is killed can be gone on with, where the storage can do that."""
    if not isinstance(storage, ContinuingStorage):
        storage.put(name, chunks, num_bytes=num_bytes)
        return
    try:
        storage.put_rest(name, chunks, begin=begin, num_bytes=num_bytes)
    except CheckpointDamagedError:  # of the source: this will never be whole
        with suppress(DistckptError):
            if isinstance(storage, KeepsUploads):
                found = [each for each in storage.uploads(older_than_s=0.0) if each.name == name]
                storage.abort_uploads(found)
            storage.delete([name])
        raise


def _begun(target: Place, file: DataFile) -> int:
    """Return how many of a file's first bytes the target has of a copy that was killed, and that are the right ones."""
    storage, name = target.storage, target.inside(file.name)
    if not isinstance(storage, ContinuingStorage):
        return 0
    try:
        found = storage.begun(name, num_bytes=file.num_bytes)
    except StorageError as error:  # some servers, and some rights, know of no unfinished uploads
        logger.debug("%s is copied from its beginning: %s", name, error)
        return 0
    if found.is_sure:
        return found.num_bytes
    good = 0
    for segment in file.segments:
        view = memoryview(bytearray(segment.num_bytes))
        if good + segment.num_bytes > found.num_bytes:
            break
        with suppress(FileNotFoundError, EOFError):
            storage.read(name, good, view)
        if digest(view) != segment.digest:
            break
        good += segment.num_bytes
    return good


class _StoppedError(Exception):
    """Another file failed."""


def _checked(
    source: Place,
    manifest: Manifest,
    file: DataFile,
    begin: int,
    *,
    readers: ThreadPoolExecutor,
    stop: threading.Event,
    advance: Callable[[int], object],
) -> Iterator[memoryview]:
    """Yield a file's bytes from `begin` on, segments that were checked against their digests, read a few ahead."""
    waiting: deque[Future[memoryview]] = deque()
    offset = 0
    for segment in file.segments:
        if offset + segment.num_bytes > begin:
            waiting.append(readers.submit(_read, source, manifest, file, offset, segment, begin=begin))
        offset += segment.num_bytes
        if len(waiting) > NUM_AHEAD:
            yield from _next(waiting, stop, advance)
    while waiting:
        yield from _next(waiting, stop, advance)


def _next(
    waiting: deque[Future[memoryview]], stop: threading.Event, advance: Callable[[int], object]
) -> Iterator[memoryview]:
    if stop.is_set():
        raise _StoppedError
    data = waiting.popleft().result()
    yield data
    advance(len(data))


def _read(
    source: Place, manifest: Manifest, file: DataFile, offset: int, segment: Segment, *, begin: int
) -> memoryview:
    """Return what of a segment stands after the file's byte `begin`, once all of it is checked."""
    view = memoryview(bytearray(segment.num_bytes))
    problem = None
    try:
        source.storage.read(source.inside(file.name), offset, view)
    except FileNotFoundError:
        problem = "is missing"
    except EOFError as error:
        problem = f"could not be read whole: {error}"
    if problem is None and digest(view) != segment.digest:
        problem = f"has wrong bytes between {offset:,} and {offset + segment.num_bytes:,}"
    if problem is not None:
        raise CheckpointDamagedError(path=source.path, step=manifest.step, file=file.name, problem=problem)
    return view[max(0, begin - offset) :]


def _publish(target: Place, manifest: Manifest, data: bytes) -> Manifest:
    """Commit the copy, if all its files are still there; they are looked at before and after."""
    _refuse_lost_files(target, manifest)
    try:
        target.storage.publish(target.inside(names.MANIFEST), data)
    except FileExistsError:
        present = _present(target, manifest)  # by another copy of the same checkpoint, or else it raises
        if present is None:
            raise
        return present
    try:
        _refuse_lost_files(target, manifest)
    except StorageError:
        reason = "files vanished while the copy was committed"
        catalog.quarantine(target.storage, target.folder, data=data, reason=reason)
        raise
    return manifest


def _refuse_lost_files(target: Place, manifest: Manifest) -> None:
    problem = next(_wrong(target, manifest), None)
    if problem is not None:
        raise StorageError(
            path=f"{target.path}/{problem.file}",
            action="commit the copy with",
            cause=f"it {problem.problem}; another job deletes what is not committed there",
            fix="copy to a directory that no job trains in",
        )


def _clear(target: Place, manifest: Manifest) -> None:
    """Delete markers and what copies of this checkpoint that were killed have left; a failure harms nothing."""
    used = {file.name for file in manifest.files}
    with suppress(DistckptError):
        left = [
            name
            for name in target.sizes()
            if name not in used and (name.endswith(MARKER) or name.startswith((_ASIDE, f"{manifest.attempt}/")))
        ]
        target.storage.delete(target.inside(name) for name in sorted(left))

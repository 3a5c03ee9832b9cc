"""`Storage`: the one seam between distckpt and the outside.

A handful of verbs, each with a contract that `tests/storage/` runs against every implementation.
Names are plain relative paths (`names.checked`, or a ValueError) below the storage's root; a storage never leaves it.
Any verb may be called from any thread.
What wraps a storage (retry, counting, fault injection) is a storage too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from distckpt.names import checked

Buffer = bytes | bytearray | memoryview
DAY_S = 86_400.0
MOST_PUBLISHED = 1 << 30  # bytes of a file that is published at once


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """One stored file.

    Attributes:
        name: Its name below the storage's root.
        num_bytes: Its size in bytes.
        modified: When it was last written, in seconds since 1970; 0.0 if the storage does not say.
    """

    name: str
    num_bytes: int
    modified: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a storage can promise beyond the contract.

    Attributes:
        exclusive_publish: `publish` refuses an existing name even when two writers race.
        survives_power_loss: What `put`, `sync` and `publish` have acknowledged is on stable media or the server's care.
        shared: Other hosts see the same files; None if that depends on what is mounted.
        rereads_are_cheap: Bytes that this host has just read come from its memory when they are read again.
        read_bytes: A good size of one `read`, in bytes.
        seen_bytes: The most that is good to be seen as memory at once; 0 if files are read only.
        num_readers: How many `read`s are best under way at once.
        late_requests: What a process that is gone has asked for may happen still. Where it is false, a file that was
            deleted before it was published never is.
    """

    exclusive_publish: bool
    survives_power_loss: bool
    shared: bool | None
    rereads_are_cheap: bool = False
    read_bytes: int = 4 << 20
    seen_bytes: int = 0
    num_readers: int = 4
    late_requests: bool = True


class Readable(Protocol):
    """What bytes of files can be read from."""

    @property
    def capabilities(self) -> Capabilities:
        """What it promises."""
        ...

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` from the file's byte `offset` on, as `Storage.read` does."""
        ...


class Storage(Protocol):
    """Files below one root: a local directory, or a prefix of an object store."""

    @property
    def url(self) -> str:
        """The root, as users write it; never holds a credential."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What this storage promises; asks the storage nothing."""
        ...

    def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
        """Write a data file from `chunks`, in order, and return its size in bytes.

        With `num_bytes`, the file's size, room for it is reserved first, where that is possible: a disk that is too
        full says so before anything is written, and the file lies in one piece.
        When this returns, the file's bytes are durable; its directory entry is after `sync`. Until then the chunks'
        memory must not change: it is read in place.
        Missing parent folders are made. If it raises, also when iterating `chunks` raises, no file of that name is
        left behind on a best-effort basis, and never one that looks whole to a reader that knows its size and digests.
        An existing file of that name is an error on storages that can tell; callers use names that are new.

        Raises:
            StorageError: It could not be written; `errno` and `cause` say why (no space, no permission, ...).
        """
        ...

    def sync(self, names: Iterable[str]) -> None:
        """Make the directory entries of `names`, and of the folders above them, durable.

        Object stores have nothing to do here.

        Raises:
            StorageError: A folder could not be synced.
        """
        ...

    def publish(self, name: str, data: bytes) -> None:
        """Write a small file whole, durably and atomically, unless the name exists.

        A reader sees no file or all of it, whatever dies. When this returns, it survives a power loss.
        If an earlier try of this same call got through and only its answer was lost, this succeeds.

        Raises:
            FileExistsError: The name exists with other content; nothing was changed.
            StorageError: It could not be written; no file of that name is visible on account of this call.
        """
        ...

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` (writable, contiguous) from the file's byte `offset` on; an empty `into` asks nothing.

        Raises:
            FileNotFoundError: There is no such file.
            EOFError: The file ends before `into` is full.
            StorageError: It could not be read.
        """
        ...

    def read_all(self, name: str, *, limit_bytes: int) -> bytes:
        """Return a small file whole.

        Raises:
            FileNotFoundError: There is no such file.
            StorageError: It could not be read, or is larger than `limit_bytes`.
        """
        ...

    def list(self, folder: str = "") -> list[FileInfo]:
        """Return every file below `folder`, at any depth, sorted by name; [] if there is none.

        Sees what any client has written or deleted before the call. Files that disappear meanwhile are left out.
        Every name returned can be given to the other verbs: files with names that are not plain are somebody else's,
        and left out. A write in progress, or one that was killed, may show as a file whose name ends in ".tmp".

        Raises:
            StorageError: It could not be listed (no permission, not a directory, no such bucket, ...).
        """
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, in the order given, and folders that this leaves empty. Missing files are no error.

        The order is cut into runs of files that lie in the same folder. One run is durably gone before the next is
        touched; within a run, the first file is durably gone before the others, and these go in any order.
        So a manifest that is named before its data files is gone before them, whatever dies.

        Raises:
            StorageError: A file could not be deleted; those before it are gone.
        """
        ...


@runtime_checkable
class ScatteringStorage(Protocol):
    """A storage that can fill several buffers at once."""

    def read_scattered(self, name: str, offset: int, into: Sequence[memoryview]) -> None:
        """Fill the buffers of `into`, one after another, from the file's byte `offset` on; raises as `read` does."""
        ...


def read_scattered(storage: Readable, name: str, offset: int, into: Sequence[memoryview]) -> None:
    """Fill several buffers, one after another, from a file's byte `offset` on, by whatever the storage can do.

    Raises:
        As `Storage.read` does.
    """
    if len(into) == 1:
        storage.read(name, offset, into[0])
    elif isinstance(storage, ScatteringStorage):
        storage.read_scattered(name, offset, into)
    else:
        whole = memoryview(bytearray(sum(view.nbytes for view in into)))
        storage.read(name, offset, whole)
        begin = 0
        for view in into:
            view.cast("B")[:] = whole[begin : begin + view.nbytes]
            begin += view.nbytes


@runtime_checkable
class WithdrawingStorage(Protocol):
    """A storage that can be kept from deleting what was published under the same name since."""

    def withdraw(self, name: str, data: bytes) -> None:
        """Delete a published file if it holds `data`; raises as `delete` does."""
        ...


def withdraw(storage: Storage, name: str, data: bytes) -> None:
    """Delete a published file that holds `data`, and whose name may be published again; no other one is touched.

    Whoever calls may have stood still since it read the file, or its request be late because it has died: what was
    published under the name since stays. S3 is told which object is meant, and a file is moved aside and looked at
    before it is deleted. Other object stores know no such condition: there the file is read right before.

    Raises:
        StorageError: The file could not be deleted.
    """
    if isinstance(storage, WithdrawingStorage):
        storage.withdraw(name, data)
    elif holds(storage, name, data):
        storage.delete([name])


def holds(storage: Storage, name: str, data: bytes) -> bool:
    """Say whether a file is there, and holds `data`.

    Raises:
        StorageError: It could not be read.
    """
    try:
        return storage.read_all(name, limit_bytes=MOST_PUBLISHED) == data
    except FileNotFoundError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What is there of a file that `put_rest` was writing when it ended.

    Attributes:
        num_bytes: How many of its first bytes; 0 if there is nothing, or nothing of use.
        is_sure: The storage vouches for them; if not, they can be read, and may be anything after a power loss.
    """

    num_bytes: int
    is_sure: bool


@runtime_checkable
class ContinuingStorage(Protocol):
    """A storage that can go on with a data file that it did not finish.

    Of a name, all who write have the same bytes to write; then several may even do so at once.
    """

    def begun(self, name: str, *, num_bytes: int) -> Begun:
        """Return what is there of a file of `num_bytes` that is to have this name.

        Raises:
            StorageError: The storage could not be asked.
        """
        ...

    def put_rest(self, name: str, chunks: Iterable[Buffer], *, begin: int, num_bytes: int) -> int:
        """Write a data file from its byte `begin` on, and return how many bytes that were; else as `Storage.put`.

        What is before `begin` stays; it is at most what `begun` has told. If it fails, or is killed, what was done is
        left for the next try, where no reader takes it for the file.

        Raises:
            StorageError: It could not be written.
        """
        ...


class OpenFile(Protocol):
    """A file that is open for reading; any thread may use it."""

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Fill buffers, one after another, from the file's byte `offset` on; raises as `Storage.read` does."""
        ...

    def seen(self, begin: int, num_bytes: int) -> AbstractContextManager[memoryview | None]:
        """Give bytes of the file as memory, while the context lasts, not to be written; None if they must be read."""
        ...


@runtime_checkable
class StepwiseStorage(Protocol):
    """A storage that holds a file open, so that it can be read in small steps."""

    def reading(self, name: str) -> AbstractContextManager[OpenFile]:
        """Open a file for reading; raises as `Storage.read` does."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedUpload:
    """An upload that has begun and is neither finished nor aborted: in flight, or of a process that was killed.

    Attributes:
        name: The file that it would become, below the storage's root.
        id: The server's name for it.
        started: When it began, in seconds since 1970; 0.0 if the server does not say.
        num_bytes: What the server holds of it, in bytes; None if that was not asked for, or is not told.
    """

    name: str
    id: str
    started: float
    num_bytes: int | None = None


@runtime_checkable
class KeepsUploads(Protocol):
    """A storage where an upload that was killed leaves something that `Storage.list` does not show."""

    def uploads(self, *, older_than_s: float = DAY_S, sized: bool = False) -> Sequence[UnfinishedUpload]:
        """Return the unfinished uploads below the root that are older than this, oldest first.

        Args:
            older_than_s: In seconds; 0 are all, also those that are in flight, or of unknown age.
            sized: Whether to ask what the server holds of each, a request for each.

        Raises:
            StorageError: They could not be listed.
        """
        ...

    def abort_uploads(self, uploads: Iterable[UnfinishedUpload]) -> int:
        """Abort unfinished uploads, and return how many; those that are gone are no error.

        Raises:
            StorageError: One could not be aborted; those before it are gone.
        """
        ...


def is_plain(name: str) -> bool:
    """Say whether `name` can be a stored file's name, as `names.checked` has it."""
    try:
        checked(name)
    except ValueError:
        return False
    return True

"""The memory tier: a copy of a run's newest checkpoint in its nodes' shared memory, nearer than its storage.

While a rank writes its data file to the storage, the same bytes go to `/dev/shm/distckpt-<user>/<run>/<attempt>/`; so
does a restart after a crash find them without a read from a disk or an object store. Nothing here is fsynced, listed or
believed: which checkpoint there is, and what its bytes are, the storage's manifest says.
What lies here is the node's memory: of a run, one checkpoint, and while it is saved, the next one; nothing of a run
that left in good order; and what a killed one left goes when it comes back, or with the next job after an hour.
Invariant: nothing that goes wrong here makes a save fail, and no byte that a digest does not vouch for is handed out.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from distckpt import names, sharedmemory
from distckpt.checksum import digest
from distckpt.manifest import DataFile
from distckpt.sharedmemory import own_folder
from distckpt.storage import Capabilities, OpenFile
from distckpt.storage.failures import telling
from distckpt.storage.mapping import SEEN_BYTES, LocalFile

logger = logging.getLogger("distckpt")

DEAD_S = 3600.0  # what a run that has not come back for so long has left is nobody's
_LOOK_BYTES = 64 << 20  # are written from one look at the room that is left to the next
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a pipe must not hang us
_CREATE_TRIES = 10  # how often a folder may vanish between making it and using it


class MemoryTier:
    """What this node's memory keeps of one run.

    Args:
        url: The run's directory.
        within: The shared memory.
        has_room: Says whether so many bytes fit into it.
    """

    def __init__(
        self,
        url: str,
        *,
        within: Path = sharedmemory.SHARED_MEMORY,
        has_room: Callable[[int], bool] = sharedmemory.has_room,
    ) -> None:
        self._user = f"distckpt-{os.geteuid()}"
        self._run = digest(url.encode())[:16]
        self._within = within
        self._has_room = has_room
        self._has_warned = False
        self._sign: int | None = None  # a lock that says that this job lives

    @property
    def path(self) -> Path:
        """The run's folder, for people to read."""
        return self._within / self._user / self._run

    def files(self, files: Sequence[DataFile]) -> KeptFiles:
        """Return what is kept of a checkpoint's data files."""
        return KeptFiles(self, files)

    def attempts(self) -> list[str]:
        """Return the saves of which something lies here."""
        try:
            with self.folder() as folder_fd:
                return _listed(folder_fd)
        except OSError:
            return []  # whoever is to write here will say what is wrong

    @contextlib.contextmanager
    def copying(self, attempt: str, *, rank: int, num_bytes: int) -> Iterator[Callable[[int, memoryview], None]]:
        """Copy a rank's data file while it is written, for as long as the context lasts.

        Left in good order, the save is committed: then all older ones go. Left by an exception, this one does.

        Args:
            attempt: The save's name.
            rank: The rank that writes.
            num_bytes: The file's size.

        Yields:
            What to call with each piece of the file and where it begins, in order, on any one thread; raises nothing.
        """
        # Seen before anything is written: no rank of this node can have begun the save after this one.
        older = [each for each in self.attempts() if each != attempt]
        copy = _Copy(self, names.rank_file(attempt, rank), num_bytes, older)
        try:
            yield copy.add
        except BaseException:
            copy.discard()
            raise
        copy.stop()
        self._remove(older)

    def sweep(self, keep: str | None) -> None:
        """Remove what earlier jobs of this run left, and what runs left that are long dead; raises nothing.

        Args:
            keep: The save that this job goes on from, which may stay.
        """
        self._remove([attempt for attempt in self.attempts() if attempt != keep])
        if keep is not None:
            with contextlib.suppress(OSError):
                self.show_life()
        with contextlib.suppress(OSError), own_folder(self._user, within=self._within) as user_fd:
            for run in _listed(user_fd):
                if run != self._run:
                    self._remove_dead(run)

    def leave(self, *, in_good_order: bool) -> None:
        """Let go of the tier: a job that ends in good order takes it along, another's restart finds it; raises nothing.

        Args:
            in_good_order: Whether the run is complete, or its node is wanted back.
        """
        if in_good_order:
            self._remove(self.attempts())
        if self._sign is not None:
            os.close(self._sign)
            self._sign = None
        if in_good_order:
            with contextlib.suppress(OSError), own_folder(self._user, within=self._within) as user_fd:
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(self._run, dir_fd=user_fd)
                (self._within / self._user).rmdir()  # unless other runs are there

    @contextlib.contextmanager
    def folder(self, *parts: str, create: bool = False) -> Iterator[int]:
        """Open a folder of the run; raises as `own_folder` does."""
        for tries_left in reversed(range(_CREATE_TRIES if create else 1)):
            with contextlib.ExitStack() as stack:
                try:
                    opened = own_folder(self._user, self._run, *parts, within=self._within, create=create)
                    fd = stack.enter_context(opened)
                except FileNotFoundError:  # another job leaves just now
                    if not tries_left:
                        raise
                    continue
                yield fd
                return

    def show_life(self) -> None:
        """Keep others from taking this run for dead, for as long as this process lives.

        Raises:
            OSError: There is no folder of this run.
        """
        with self.folder() as folder_fd:
            if self._sign is not None and os.path.sameopenfile(self._sign, folder_fd):
                return
            if self._sign is not None:
                os.close(self._sign)
                self._sign = None
            fcntl.flock(folder_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self._sign = os.dup(folder_fd)  # the lock is that of both, and goes with the last of them

    def has_room(self, num_bytes: int) -> bool:
        """Say whether so many bytes more fit, with something left to others."""
        return self._has_room(num_bytes)

    def warn(self, problem: str) -> None:
        """Say, once, why saves go on without the tier."""
        level = logging.DEBUG if self._has_warned else logging.WARNING
        self._has_warned = True
        logger.log(level, "no memory tier in %s, saves go on without: %s", self.path, problem)

    def _remove(self, attempts: Sequence[str]) -> None:
        with contextlib.suppress(OSError), self.folder() as folder_fd:
            _remove_folders(attempts, folder_fd)

    def _remove_dead(self, run: str) -> None:
        """Remove what another run has left, if no job of it lives, and none has for long."""
        with contextlib.suppress(OSError), own_folder(self._user, run, within=self._within) as folder_fd:
            fcntl.flock(folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(folder_fd).st_mtime > DEAD_S:
                _remove_folders(_listed(folder_fd), folder_fd)
                with own_folder(self._user, within=self._within) as user_fd:
                    os.rmdir(run, dir_fd=user_fd)


class _Copy:
    """One rank's file on its way to the tier.

    Args:
        tier: The tier.
        name: The file's name: the save's, and its own.
        num_bytes: Its size.
        older: The saves before, which make room if they have to.
    """

    def __init__(self, tier: MemoryTier, name: str, num_bytes: int, older: Sequence[str]) -> None:
        self._tier = tier
        self._attempt, _, self._file = name.partition("/")
        self._num_bytes = num_bytes
        self._older = older
        self._fd: int | None = None
        self._next_look = 0

    @property
    def _unfinished(self) -> str:
        return f"{self._file}.tmp"

    def add(self, begin: int, piece: memoryview) -> None:
        """Take the next piece; if it cannot, or there is no room, give up and say so once."""
        try:
            if begin == 0:
                self._open()
            if self._fd is None:
                return
            if begin >= self._next_look:
                self._next_look = begin + _LOOK_BYTES
                if not self._tier.has_room(self._num_bytes - begin):
                    raise MemoryError(f"no room for {self._num_bytes - begin:,} bytes more")
            while piece:
                piece = piece[os.write(self._fd, piece) :]
            if os.lseek(self._fd, 0, os.SEEK_CUR) == self._num_bytes:
                self._finish()
        except Exception as error:  # noqa: BLE001  no reason for a save to fail
            self.discard()
            self._tier.warn(str(error))

    def stop(self) -> None:
        """Let go of a file that has not been finished."""
        if self._fd is not None:
            self.discard()

    def discard(self) -> None:
        """Remove what was copied."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        with contextlib.suppress(OSError), self._tier.folder(self._attempt) as folder_fd:
            _unlink([self._file, self._unfinished], folder_fd)
        with contextlib.suppress(OSError), self._tier.folder() as folder_fd:
            os.rmdir(self._attempt, dir_fd=folder_fd)  # unless another rank's file is there

    def _open(self) -> None:
        if not self._tier.has_room(self._num_bytes):
            # What is older is of no use once this save is committed.
            for attempt in self._older:
                with contextlib.suppress(OSError), self._tier.folder(attempt) as folder_fd:
                    _unlink([self._file, self._unfinished], folder_fd)
        with self._tier.folder(self._attempt, create=True) as folder_fd:
            self._fd = os.open(self._unfinished, _NEW_FILE, 0o600, dir_fd=folder_fd)
        self._tier.show_life()

    def _finish(self) -> None:
        """Give the file its name: from now on its size is right."""
        assert self._fd is not None
        os.close(self._fd)
        self._fd = None
        with self._tier.folder(self._attempt) as folder_fd:
            os.rename(self._unfinished, self._file, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)


class KeptFiles:
    """What a node's memory keeps of one checkpoint's data files, which are known by their index; no byte is believed.

    Args:
        tier: The tier; without one, nothing is kept.
        files: The checkpoint's data files, as the manifest has them.

    Attributes:
        capabilities: It is memory.
        refused: The index of each file that proved bad, and what is wrong with it.
    """

    capabilities = Capabilities(
        exclusive_publish=False,
        survives_power_loss=False,
        shared=False,
        rereads_are_cheap=True,
        read_bytes=8 << 20,
        seen_bytes=SEEN_BYTES,
        num_readers=max(2, min(8, os.cpu_count() or 1)),
    )

    def __init__(self, tier: MemoryTier | None = None, files: Sequence[DataFile] = ()) -> None:
        self.refused: dict[int, str] = {}
        self._tier = tier
        self._files = files
        self._there: set[int] = set()
        if tier is not None:
            for index, file in enumerate(files):
                size = _size_of(tier, file.name)
                if size == file.num_bytes:
                    self._there.add(index)
                elif size is not None:
                    self.refused[index] = f"has {size:,} bytes, the manifest says {file.num_bytes:,}"

    def __contains__(self, index: object) -> bool:
        return index in self._there

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._there))

    @contextlib.contextmanager
    def reading(self, index: int) -> Iterator[OpenFile]:
        """Open a file for reading.

        Raises:
            FileNotFoundError: It is gone.
            StorageError: It could not be opened, or is not this user's alone.
        """
        assert self._tier is not None
        name = self._files[index].name
        path = str(self._tier.path / name)
        with telling("read", path, absent_is_builtin=True):
            fd = _opened(self._tier, name)
        try:
            file = LocalFile(fd, path)
            try:
                yield file
            finally:
                file.close()
        finally:
            os.close(fd)

    def refuse(self, index: int, problem: str) -> None:
        """Take note that a file is no good, and not to be read any more."""
        self.refused.setdefault(index, problem)
        self._there.discard(index)


def keeps(url: str, name: str, num_bytes: int) -> bool:
    """Say whether the tier of a run seems to keep a data file.

    Args:
        url: The run's directory.
        name: The file's name in its checkpoint.
        num_bytes: Its size.
    """
    return _size_of(MemoryTier(url), name) == num_bytes


def _opened(tier: MemoryTier, name: str) -> int:
    """Open a file of the tier, which must be a regular one of this user's."""
    *folders, last = names.checked(name).split("/")
    with tier.folder(*folders) as folder_fd:
        fd = os.open(last, _OLD_FILE, dir_fd=folder_fd)
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
        os.close(fd)
        raise PermissionError(f"{last!r} is not a regular file of this user's")
    return fd


def _size_of(tier: MemoryTier, name: str) -> int | None:
    """Return a file's size; None if there is none that could be read."""
    try:
        fd = _opened(tier, name)
    except (OSError, ValueError):
        return None
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def _remove_folders(folders: Sequence[str], parent_fd: int) -> None:
    """Remove folders that hold nothing but files; what is something else stays."""
    for folder in folders:
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
            try:
                _unlink(_listed(fd), fd)
            finally:
                os.close(fd)
            os.rmdir(folder, dir_fd=parent_fd)


def _listed(folder_fd: int) -> list[str]:
    with os.scandir(folder_fd) as entries:
        return [entry.name for entry in entries]


def _unlink(files: Sequence[str], folder_fd: int) -> None:
    """Remove files, as far as they are there and can be removed."""
    for file in files:
        with contextlib.suppress(OSError):
            os.unlink(file, dir_fd=folder_fd)

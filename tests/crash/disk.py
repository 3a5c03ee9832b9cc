"""A local file system in memory under the real `LocalStorage`, and every state that a power loss may leave of it.

`Disk` stands in for the `os` module of `distckpt.storage.local`: the storage's own code runs on it, call by call, and
every change is recorded. `test_models_of_storage.py` holds it against the kernel.
A call that it does not know is an AttributeError, so that a change of `LocalStorage` cannot slip past it.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any, Protocol, Self, TypeVar

from recording import Cut, Log, Op, is_before

from distckpt.storage import Storage, exclusive, local, mapping, openfiles, room
from distckpt.storage.local import LocalStorage

TOP = 0
ROOT = "/run"
# Of what was written and not synced, a file may hold after a power loss: all, nothing, some, zeros, anything.
LOSSES = ("kept", "lost", "short", "zeros", "garbled")
_FROM_OS = {"O_RDONLY", "O_WRONLY", "O_CREAT", "O_EXCL", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY"}
_FROM_OS |= {"PathLike", "fspath", "fsencode", "strerror", "getpid"}


class Tree:
    """Files and folders, by inode; bytes are shared between copies."""

    def __init__(self) -> None:
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, int]] = {TOP: {}}

    def copy(self) -> Tree:
        made = Tree()
        made.files = dict(self.files)
        made.folders = {inode: dict(entries) for inode, entries in self.folders.items()}
        return made

    def machine(self, log: Log | None = None) -> Disk:
        return Disk(self, log)

    def replace(self, path: str, data: bytes | None) -> None:
        """Damage a file, or remove it."""
        *parts, name = path.strip("/").split("/")
        folder = TOP
        for part in parts:
            folder = self.folders[folder][part]
        if data is None:
            del self.folders[folder][name]
        else:
            self.files[self.folders[folder][name]] = data

    def listing(self, folder: int = TOP, prefix: str = "") -> Iterator[tuple[str, bytes | None]]:
        """Yield each path below a folder, sorted, with a file's bytes; of a folder None."""
        for name, inode in sorted(self.folders[folder].items()):
            path = f"{prefix}/{name}"
            if inode in self.folders:
                yield path, None
                yield from self.listing(inode, path)
            else:
                yield path, self.files.get(inode, b"")

    def key(self) -> int:
        """Return what two trees that look the same have in common."""
        return hash(tuple(self.listing()))

    def apply(self, op: Op) -> None:
        """Let an operation happen; one that makes no sense, for another one is lost, does nothing."""
        if op.kind == "mkdir":
            self.folders.setdefault(op.inode, {})
        if op.kind == "create":
            self.files.setdefault(op.inode, b"")
        if op.kind in ("mkdir", "create", "link", "unlink", "rmdir", "rename"):
            self._apply_to_folder(self.folders.setdefault(op.place, {}), op)
        elif op.kind == "allocate":
            self.files[op.place] = self.files.get(op.place, b"").ljust(op.offset, b"\0")
        elif op.kind == "write":
            old = self.files.get(op.place, b"").ljust(op.offset, b"\0")
            self.files[op.place] = old[: op.offset] + op.data + old[op.offset + len(op.data) :]

    def _apply_to_folder(self, entries: dict[str, int], op: Op) -> None:
        if op.kind in ("unlink", "rmdir"):
            entries.pop(op.name, None)
        elif op.kind == "rename":
            entries.pop(op.name, None)
            entries[op.data.decode()] = op.inode
        else:
            entries[op.name] = op.inode


@dataclass(slots=True)
class _Handle:
    inode: int
    offset: int = 0
    written: bool = False


class Disk:
    """The part of the `os` module that `LocalStorage` calls, on a `Tree`.

    Args:
        contents: What lies there, durably; the disk changes it.
        log: Where changes are recorded.

    Attributes:
        on_call: Called before every call with its name and the path's last part; may raise.
    """

    def __init__(self, contents: Tree | None = None, log: Log | None = None) -> None:
        self.contents = contents or Tree()
        self.log = log or Log()
        self.on_call: Callable[[str, str], None] = lambda _call, _name: None
        self._handles: dict[int, _Handle] = {}
        self._numbers = itertools.count(1000)
        self._inodes = itertools.count(1 + max([*self.contents.files, *self.contents.folders]))
        self._entry_clocks: dict[tuple[int, str], dict[int, int]] = {}
        self._removed: set[int] = set()  # folders; who still holds one open can put nothing there

    def __getattr__(self, name: str) -> Any:
        if name in _FROM_OS:
            return getattr(os, name)
        raise AttributeError(f"the model of a disk has no os.{name}: add it")

    @contextmanager
    def opened(self) -> Iterator[Callable[[], Storage]]:
        """Let `LocalStorage` see this disk, and nothing else, meanwhile; give what each rank opens its own with."""
        seeing = (local, exclusive, openfiles, mapping, room)
        before = mapping._OWN, local.Path
        system = local.os
        disk = self

        class DiskPath(PurePosixPath):
            def absolute(self) -> DiskPath:
                return self

            def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
                disk._make_folder(str(self), parents=parents, exist_ok=exist_ok)

            def stat(self) -> Any:
                return disk.stat(str(self))

        for module in seeing:
            module.os = self  # type: ignore[attr-defined]
        local.Path = DiskPath  # type: ignore[attr-defined,assignment]
        mapping._OWN = set()  # nothing is mapped: its descriptors mean something else to the system
        try:
            yield lambda: LocalStorage(ROOT)
        finally:
            mapping._OWN, local.Path = before
            for module in seeing:
                module.os = system  # type: ignore[attr-defined]

    @property
    def num_open(self) -> int:
        """How many files and folders are open."""
        return len(self._handles)

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        self.on_call("open", _last(path))
        folder, name = self._place(path, dir_fd)
        inode = folder if name == "" else self.contents.folders[folder].get(name)
        if flags & os.O_CREAT:
            if inode is not None:
                raise _error(errno.EEXIST, name)
            inode = next(self._inodes)
            self._change("create", folder, name, inode=inode)
        if inode is None:
            raise _error(errno.ENOENT, name)
        if flags & os.O_DIRECTORY and inode not in self.contents.folders:
            raise _error(errno.ENOTDIR, name)
        number = next(self._numbers)
        self._handles[number] = _Handle(inode)
        return number

    def close(self, number: int) -> None:
        """Close; only what was written can fail then, as on network file systems."""
        if self._handles.pop(number).written:
            self.on_call("close", "")

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self.on_call("mkdir", _last(path))
        folder, name = self._place(path, dir_fd)
        if name in self.contents.folders[folder]:
            raise _error(errno.EEXIST, name)
        self._change("mkdir", folder, name, inode=next(self._inodes))

    def unlink(self, path: str, *, dir_fd: int) -> None:
        self.on_call("unlink", path)
        folder, name = self._place(path, dir_fd)
        inode = self._found(folder, name)
        if inode in self.contents.folders:
            raise _error(errno.EISDIR, name)
        self._change("unlink", folder, name)

    def rmdir(self, path: str, *, dir_fd: int) -> None:
        self.on_call("rmdir", path)
        folder, name = self._place(path, dir_fd)
        inode = self._found(folder, name)
        if inode not in self.contents.folders:
            raise _error(errno.ENOTDIR, name)
        if self.contents.folders[inode]:
            raise _error(errno.ENOTEMPTY, name)
        self._change("rmdir", folder, name)
        self._removed.add(inode)

    def link(self, source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int, follow_symlinks: bool) -> None:
        self.on_call("link", target)
        folder, name = self._place(target, dst_dir_fd)
        if name in self.contents.folders[folder]:
            raise _error(errno.EEXIST, name)
        self._change("link", folder, name, inode=self._found(*self._place(source, src_dir_fd)))

    def rename(self, source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        self.on_call("rename", target)
        folder, name = self._place(source, src_dir_fd)
        self._change("rename", folder, name, inode=self._found(folder, name), data=target.encode())

    def posix_fallocate(self, number: int, offset: int, num_bytes: int) -> None:
        self.on_call("posix_fallocate", "")
        self._record("allocate", place=self._handles[number].inode, offset=offset + num_bytes)

    def write(self, number: int, data: Any) -> int:
        self.on_call("write", "")
        handle, written = self._handles[number], bytes(data)
        handle.written = True
        self._record("write", place=handle.inode, offset=handle.offset, data=written)
        handle.offset += len(written)
        return len(written)

    def fsync(self, number: int) -> None:
        self.on_call("fsync", "")
        self._record("fsync", place=self._handles[number].inode)

    def read(self, number: int, num_bytes: int) -> bytes:
        self.on_call("read", "")
        handle = self._handles[number]
        data = self.contents.files[handle.inode][handle.offset : handle.offset + num_bytes]
        handle.offset += len(data)
        return data

    def preadv(self, number: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.on_call("preadv", "")
        num_read = 0
        for buffer in buffers:
            data = self.contents.files[self._handles[number].inode][offset + num_read :][: len(buffer)]
            buffer[: len(data)] = data
            num_read += len(data)
        return num_read

    def fstat(self, number: int) -> Any:
        self.on_call("fstat", "")
        return self._facts(self._handles[number].inode)

    def stat(self, path: str, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> Any:
        self.on_call("stat", _last(path))
        folder, name = self._place(path, dir_fd)
        return self._facts(self._found(folder, name) if name else folder)

    def statvfs(self, path: Any) -> Any:
        self.on_call("statvfs", _last(path))
        self._place(path, None)
        return SimpleNamespace(f_blocks=1 << 30, f_bavail=1 << 29, f_frsize=4096, f_files=1 << 20, f_favail=1 << 19)

    @contextmanager
    def scandir(self, number: int) -> Iterator[list[Any]]:
        self.on_call("scandir", "")
        yield [_Entry(self, name, inode) for name, inode in self.contents.folders[self._handles[number].inode].items()]

    def _facts(self, inode: int) -> Any:
        mode = stat.S_IFDIR if inode in self.contents.folders else stat.S_IFREG
        return SimpleNamespace(st_mode=mode, st_dev=1, st_size=len(self.contents.files.get(inode, b"")), st_mtime=0.0)

    def _place(self, path: Any, dir_fd: int | None) -> tuple[int, str]:
        """Return the folder and the entry's name that a path means; of the top itself the name is empty."""
        if dir_fd is not None:
            return self._handles[dir_fd].inode, str(path)
        folder, parts = TOP, [part for part in str(path).split("/") if part]
        for part in parts[:-1]:
            folder = self._found(folder, part)
        return folder, parts[-1] if parts else ""

    def _found(self, folder: int, name: str) -> int:
        inode = self.contents.folders[folder].get(name)
        if inode is None:
            raise _error(errno.ENOENT, name)
        return inode

    def _make_folder(self, path: str, *, parents: bool, exist_ok: bool) -> None:
        assert parents
        assert exist_ok
        made = ""
        for part in path.strip("/").split("/"):
            made = f"{made}/{part}"
            try:
                self.mkdir(made)
            except FileExistsError:
                continue

    def _change(self, kind: str, folder: int, name: str, **facts: Any) -> None:
        """Change an entry; it comes after the last change of that entry, and after the folder was made."""
        if folder in self._removed:
            raise _error(errno.ENOENT, name)
        for place, entry in ((folder, name), (folder, "")):
            self.log.learn(self._entry_clocks.get((place, entry), {}))
        self._record(kind, place=folder, name=name, **facts)
        known = dict(self.log.clock())
        self._entry_clocks[folder, name] = known
        if kind == "mkdir":
            self._entry_clocks[facts["inode"], ""] = known

    def _record(self, kind: str, **facts: Any) -> None:
        self.contents.apply(self.log.record(kind, **facts))


class _Entry:
    """What `os.scandir` gives."""

    def __init__(self, disk: Disk, name: str, inode: int) -> None:
        self.name = name
        self._disk, self._inode = disk, inode

    def is_dir(self, *, follow_symlinks: bool) -> bool:
        return self._inode in self._disk.contents.folders

    def is_file(self, *, follow_symlinks: bool) -> bool:
        return self._inode not in self._disk.contents.folders

    def is_symlink(self) -> bool:
        return False

    def stat(self, *, follow_symlinks: bool) -> Any:
        return self._disk._facts(self._inode)


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


def _last(path: Any) -> str:
    return str(path).rpartition("/")[2]


class Kept(Protocol):
    """What lies somewhere: a tree, or objects."""

    def copy(self) -> Self: ...
    def apply(self, op: Op) -> None: ...


Contents = TypeVar("Contents", bound=Kept)


def after_kill(base: Contents, done: Iterable[Op]) -> Contents:
    """Return what lies there when all processes die: everything that was done."""
    tree = base.copy()
    for op in done:
        tree.apply(op)
    return tree


def after_power_loss(base: Tree, cut: Cut, *, limit: int, rng: random.Random) -> Iterator[tuple[Tree, str]]:
    """Yield what may lie on the disk after a power loss: all states if they are `limit` at most, else so many.

    What no fsync came after for certain may be lost: entries of folders one by one, and of files what was written.
    """
    promises = [op for op in cut.done if op.kind == "fsync"]
    kept = [
        op.kind in ("fsync", "ack") or any(f.place == op.place and is_before(op, f) for f in promises)
        for op in cut.done
    ]
    unsure = [op for op, durable in zip(cut.done, kept, strict=True) if not durable]
    entries = [op for op in unsure if op.kind not in ("allocate", "write")]
    files = list(dict.fromkeys(op.place for op in unsure if op.kind in ("allocate", "write")))
    options: list[Sequence[Any]] = [*[(True, False)] * len(entries), *[LOSSES] * len(files)]
    num_states = 2 ** len(entries) * len(LOSSES) ** len(files)
    choices: Iterable[tuple[Any, ...]] = itertools.product(*options)
    if num_states > limit:
        choices = [tuple(rng.choice(option) for option in options) for _ in range(limit)]
    for choice in choices:
        fates = dict(zip([op.rank * 10_000 + op.index for op in entries], choice[: len(entries)], strict=True))
        losses = dict(zip(files, choice[len(entries) :], strict=True))
        yield _survivor(base, cut.done, kept, fates, losses), f"entries {fates.values()}, files {losses.values()}"


def _survivor(
    base: Tree, done: Sequence[Op], kept: Sequence[bool], fates: dict[int, bool], losses: dict[int, str]
) -> Tree:
    tree = base.copy()
    full: dict[int, bytes] = {}
    for op, durable in zip(done, kept, strict=True):
        if durable or fates.get(op.rank * 10_000 + op.index, False):
            tree.apply(op)
    whole = after_kill(base, done)
    for inode, loss in losses.items():
        full[inode] = whole.files.get(inode, b"")
        old, new = tree.files.get(inode, b""), full[inode]
        tree.files[inode] = {
            "kept": new,
            "lost": old,
            "short": new[: max(len(old), len(new) // 2)],
            "zeros": old + bytes(len(new) - len(old)),
            "garbled": old + random.Random(inode).randbytes(len(new) - len(old)),
        }[loss]
    return tree

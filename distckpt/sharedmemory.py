"""The memory that processes of one node share as files, `/dev/shm`: what is left of it, and folders of one's own there.

Invariant: what `own_folder` opens belongs to this user alone, from the shared memory down: no link leads elsewhere, and
nobody else can read it, change it, or put another in its place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_GROUPS = Path("/sys/fs/cgroup")
_SPARE = 0.1  # of all that a limit allows, what is left to others
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def place() -> list[str | int] | None:
    """Return what two processes have in common only if they see one shared memory; None if there is none."""
    try:
        facts = SHARED_MEMORY.stat()
        boot = _BOOT.read_text().strip()
    except OSError:
        return None
    return [boot, facts.st_dev, facts.st_ino] if os.access(SHARED_MEMORY, os.W_OK | os.X_OK) else None


def has_room(num_bytes: int, *, folder: Path = SHARED_MEMORY) -> bool:
    """Say whether so many bytes fit into shared memory, with a tenth of it, and of all memory, left to others.

    What lies there is memory: of the node, and of the control group (a container's, a batch job's), which ends a
    process that takes more than it may.

    Args:
        num_bytes: How many bytes are to come.
        folder: Where; on the file system that is asked.
    """
    try:
        facts = os.statvfs(folder)
    except OSError:
        return False
    limits = [(facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize)] if facts.f_blocks else []
    limits += [*_of_the_node(), *_of_the_groups()]
    return all(num_bytes <= free - _SPARE * total for free, total in limits)


def _of_the_node() -> Iterator[tuple[int, int]]:
    """Yield what the node's memory has left, and what it has in all."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        facts = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        yield facts["MemAvailable"], facts["MemTotal"]


def _of_the_groups() -> Iterator[tuple[int, int]]:
    """Yield what each control group of this process has left, and what it has in all; of both versions.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html; what lies in the page cache and was not used lately
    ("inactive_file") is given back when it is needed, as kubelet counts, too.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            top, limit, usage, idle = _GROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage, idle = _GROUPS / "memory", *_OLD_NAMES
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such limit, no such folder here, or "max"
                most = int((folder / limit).read_text())
                used = int((folder / usage).read_text())
                counts = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
                yield most - used + int(counts.get(idle, "0")), most
            if folder == top:
                break


_OLD_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@contextlib.contextmanager
def own_folder(*parts: str, within: Path = SHARED_MEMORY, create: bool = False) -> Iterator[int]:
    """Open a folder in shared memory that is this user's alone, for as long as the context lasts.

    Args:
        parts: Its name and those of the folders above it, from the shared memory down.
        within: The shared memory.
        create: Whether to make what is not there.

    Raises:
        FileNotFoundError: It is not there.
        PermissionError: It, or a folder above it, is somebody else's, or open to others.
        OSError: It is a link, or something else than a folder, or could not be made.
    """
    fd = os.open(within, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if mode & _OTHERS_WRITE and not mode & stat.S_ISVTX:
            raise PermissionError(errno.EPERM, "others may put something else in the place of what lies there", within)
        for part in parts:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=fd)
            inner = os.open(part, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = inner
            facts = os.fstat(fd)
            if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
                raise PermissionError(errno.EPERM, "is not this user's alone", part)
        yield fd
    finally:
        os.close(fd)

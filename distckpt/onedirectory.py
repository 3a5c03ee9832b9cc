"""One directory: the proof that all ranks of a job see the same files, before the first checkpoint is written.

A path means another disk on each host, unless something is mounted there: then each rank's share would lie where only
its own host finds it, and the loss would show at the restore. So rank 0 writes a small file, and the ranks of all other
hosts look for it, by its name, which no cache of a network's file system can know.
Invariant: on several hosts nothing is saved to a directory that one of them does not see.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from distckpt import names
from distckpt.errors import ConfigError
from distckpt.ranks import Ranks
from distckpt.storage import Storage
from distckpt.values import Json

ACTION = "looking for one directory"
_MOUNTS = Path("/proc/self/ns/mnt")


def viewpoint(storage: Storage) -> Json:
    """Return what two ranks have in common only if they surely see the same files.

    Ranks: any.
    """
    view: list[Any] = [socket.gethostname()]
    if storage.capabilities.shared is True:
        return []
    with suppress(OSError):
        view.append(str(_MOUNTS.readlink()))  # containers of one host have mounts of their own
    return [*view, os.getpid()] if storage.capabilities.shared is False else view


def marked(storage: Storage, viewpoints: list[Json]) -> str | None:
    """Rank 0: write a file that all have to see, and return its name; None if no rank can see something else.

    Args:
        storage: The directory.
        viewpoints: What `viewpoint` returned, by rank.

    Raises:
        StorageError: It could not be written.

    Ranks: 0.
    """
    if all(view == viewpoints[0] for view in viewpoints):
        return None
    name = f"seen-{names.new_attempt()}"
    storage.publish(name, b"All ranks of a job see this file for a moment, or they save nothing here.\n")
    return name


def insist(storage: Storage, ranks: Ranks, mark: str | None) -> None:
    """Make sure that every rank sees what rank 0 has marked; the mark is removed.

    Args:
        storage: The directory.
        ranks: All ranks.
        mark: What `marked` returned on rank 0; nothing is done if that is None.

    Raises:
        ConfigError: A rank does not see it; nothing may be saved there.
        RankFailedError: A rank could not look.
        RankTimeoutError: A rank did not come.

    Ranks: all (collective); blocks until all have looked.
    """
    if mark is None:
        return

    def look() -> Json:
        return {"host": ranks.host, "sees": ranks.rank == 0 or _is_there(storage, mark)}

    def judge(facts: list[Json]) -> None:
        with suppress(OSError):
            storage.delete([mark])
        blind = {rank: fact["host"] for rank, fact in enumerate(facts) if not fact["sees"]}
        if blind:
            hosts = sorted(set(blind.values()))
            shown = ", ".join(hosts[:5]) + (f" and {len(hosts) - 5} more" if len(hosts) > 5 else "")
            who = f"host {shown} does" if len(hosts) == 1 else f"hosts {shown} do"
            raise ConfigError(
                source="directory",
                problem=f"{storage.url!r} is not one directory for all ranks: {who} not see what rank 0 (host "
                f"{ranks.host}) writes there; nothing was saved",
                fix="give a directory that every host sees: shared storage, or a URL such as s3://bucket/run-7",
            )

    ranks.agree(ACTION, look, judge)


def _is_there(storage: Storage, name: str) -> bool:
    try:
        storage.read_all(name, limit_bytes=1024)
    except FileNotFoundError:
        return False
    return True

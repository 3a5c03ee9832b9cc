"""Owners: which process owns something, and whether it still lives.

Invariant: a process is called gone only where this kernel says so; of one that it cannot see, nothing is said.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Fate = Literal["runs", "gone", "unknown"]

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A process, named so that no other one is ever taken for it.

    Attributes:
        host: Its host's name.
        pid: Its number on that host.
        started: When it started, in the kernel's ticks since the host's start; None if the system does not say.
        boot: The host's start, as the kernel names it; None if the system does not say.
        namespace: In which of the kernel's numberings of processes `pid` counts (containers have their own); None if
            the system does not say.
    """

    host: str
    pid: int
    started: int | None = None
    boot: str | None = None
    namespace: str | None = None


def this_process() -> Owner:
    """Return the process that calls."""
    facts = _facts(os.getpid())
    boot: str | None = None
    namespace: str | None = None
    with suppress(OSError):
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = str((_PROC / "self/ns/pid").readlink())
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=None if facts is None else facts[0],
        boot=boot,
        namespace=namespace,
    )


@functools.cache
def this_machine() -> str:
    """Return a name of this machine, since its last start, that no other one has."""
    me = this_process()
    return me.boot or me.host


def fate_of(owner: Owner) -> Fate:
    """Say whether a process runs.

    Returns:
        "runs" and "gone" only of a process of this host, since its last start, in this container; "unknown" of all
        others, and of one that is stopped (SIGSTOP, a debugger).
    """
    me = this_process()
    known = None not in (owner.started, owner.boot, owner.namespace)
    if not known or (owner.host, owner.boot, owner.namespace) != (me.host, me.boot, me.namespace):
        return "unknown"
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass  # somebody else's, but there
    facts = _facts(owner.pid)
    if facts is None:  # it ended just now, or /proc hides it
        return "unknown"
    started, state, num_threads = facts
    if started != owner.started:
        return "gone"
    if state in "ZX":  # it has ended, and waits for its parent to look; its other threads may be in a last call
        return "gone" if num_threads <= 1 else "unknown"
    return "unknown" if state in "Tt" else "runs"


def seconds() -> float:
    """Return the seconds since some moment; they also count while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the code that deals with owners sees of the machine that it runs on.

    Attributes:
        me: The process.
        now: Returns seconds that only grow.
        pause: Returns after so many seconds.
        fate: Says whether a process runs.
    """

    me: Owner = field(default_factory=this_process)
    now: Callable[[], float] = seconds
    pause: Callable[[float], None] = time.sleep
    fate: Callable[[Owner], Fate] = fate_of


def _facts(pid: int) -> tuple[int, str, int] | None:
    """Return when a process started, its state's letter, and how many threads it has left; None if that is not told."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
        num_threads = len(os.listdir(_PROC / str(pid) / "task"))  # noqa: PTH208  names are enough
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return int(fields[19]), fields[0], num_threads

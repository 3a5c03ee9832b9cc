"""Machines: several "computers" on one, each with its own name, network card, processes, disk and shared memory.

A machine is a set of the kernel's namespaces, held by a process that ends when this one does, whatever happens; killing
that process kills everything that runs on the machine, at once, as a power cut does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from lan import Link, Switch, open_tap

_TOOLS = ("ip", "nsenter", "unshare")
_APART = ("unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

# The first process of a machine: it makes the machine, says so, and lives as long as its input is open. Children that
# have lost their parents are its own, and vanish when they end, as SIGCHLD is ignored.
_INIT = """
set -e
hostname "$1"
mount --bind "$2" "$3"
mount --bind "$4" /etc/hosts
mount -t tmpfs -o size=256m machine-memory /dev/shm
ip link set lo up
trap '' CHLD
echo up
exec cat > /dev/null
"""


def why_not() -> str | None:
    """Return why there can be no machines here; None if there can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install -y iproute2 util-linux"
    try:
        os.close(open_tap("dc-probe"))
    except OSError as error:
        return f"needs TUN/TAP: {error}"
    made = subprocess.run([*_APART, "true"], capture_output=True, check=False)
    return None if made.returncode == 0 else f"needs namespaces: {made.stderr.decode().strip()}"


class Machine:
    """One machine, switched on until it is killed.

    Args:
        number: Its number in the network, which is part of its name and address.
        room: What all of them are made in.
    """

    def __init__(self, number: int, room: Room) -> None:
        self.number = number
        self.name = f"node-{number}"
        self.address = f"10.77.0.{number + 1}"
        self._room = room
        self._switch_on()

    def _switch_on(self) -> None:
        room, tap = self._room, f"dc{os.getpid() % 100_000}-{self.number}"
        own = room.folder / self.name
        own.mkdir(exist_ok=True)
        self._holder = subprocess.Popen(
            [*_APART, "sh", "-c", _INIT, "sh", self.name, own, room.scratch, room.hosts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"up\n":
            raise OSError(f"{self.name} did not come up")
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text()
        [self._init] = map(int, children.split())
        card = open_tap(tap)
        _do("ip", "link", "set", tap, "netns", str(self._init), "name", "eth0")
        _do(*self._inside("ip", "address", "add", f"{self.address}/24", "dev", "eth0"))
        _do(*self._inside("ip", "link", "set", "eth0", "up"))
        self.link: Link = room.switch.attach(card)  # not before: a card that moves reads as one that is gone

    def start(self, command: Sequence[str], *, log: Path, env: Mapping[str, str], cwd: Path) -> subprocess.Popen[bytes]:
        """Start a program on this machine; its output is appended to `log`."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self._inside(*command, cwd=cwd), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(env)
            )

    def kill(self) -> None:
        """Cut the power: every process ends at this moment, and nobody hears from it any more."""
        self.link.is_cut = True
        self.end()

    def end(self) -> None:
        """End every process at once; their peers hear that their connections are closed."""
        os.kill(self._init, signal.SIGKILL)
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait()
        self._room.switch.detach(self.link)

    def come_back(self) -> None:
        """Switch it on again after it was killed; its disk is as it was."""
        self._switch_on()

    @property
    def is_on(self) -> bool:
        """Whether it runs."""
        return self._holder.poll() is None

    def _inside(self, *command: str, cwd: Path | None = None) -> list[str]:
        where = [] if cwd is None else [f"--wd={cwd}"]
        return ["nsenter", f"--target={self._init}", "--net", "--uts", "--ipc", "--mount", "--pid", *where, *command]


class Room:
    """Machines in one network, with what they share; leaving its context kills them all.

    Args:
        folder: Where they live. They all see it, as a shared disk; but `scratch` in it is another disk on each.
        num_machines: How many there are.
        seed: Decides which frames get lost where links lose some.

    Attributes:
        machines: The machines.
        scratch: A path that is a disk of its own on each machine.
        hosts: The file in which they find each other's addresses.
        switch: The network.
    """

    def __init__(self, folder: Path, *, num_machines: int, seed: int = 0) -> None:
        self.folder = folder
        self.scratch = folder / "scratch"
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.hosts = folder / "hosts"
        lines = [f"10.77.0.{number + 1} node-{number}\n" for number in range(num_machines)]
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        self.switch = Switch(seed=seed)
        self.machines: list[Machine] = []
        try:
            for number in range(num_machines):
                self.machines.append(Machine(number, self))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Switch everything off."""
        for machine in self.machines:
            if machine.is_on:
                machine.end()
        self.switch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")

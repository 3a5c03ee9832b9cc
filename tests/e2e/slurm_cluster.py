"""A whole Slurm on the loopback: a controller, node daemons and munge, in a folder of their own, gone afterwards.

Needs root, and the Debian packages that `INSTALL` names; the services that these start are left alone.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from training_job import ROOT

INSTALL = "apt-get install slurm-wlm munge"
NUM_NODES = 2
TIMEOUT_S = 240.0
POLL_S = 0.1

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
_DAEMONS = ("munged", "slurmctld", "slurmscriptd", "slurmd")
_OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY"}

# Each node has a processor; `low` gives way to `high`, and its jobs have a minute's grace then.
_SETTINGS = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
ReturnToService=2
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2
"""


def missing() -> str | None:
    """Return why no Slurm can be started here; None if one can."""
    gone = [program for program in _PROGRAMS if shutil.which(program) is None]
    if not gone and os.geteuid() == 0:
        return None
    return f"needs root and a Slurm: {INSTALL}" + (f" (no {', '.join(gone)})" if gone else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """A job that was submitted.

    Attributes:
        cluster: Where.
        number: Its id.
        log: Where its output goes.
    """

    cluster: SlurmCluster
    number: str
    log: Path

    @property
    def output(self) -> str:
        """What it has printed, over all its starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def state(self) -> str:
        """How Slurm says that it stands, such as "RUNNING"."""
        return self.fact("JobState")

    @property
    def num_restarts(self) -> int:
        """How often it was queued again."""
        return int(self.fact("Restarts"))

    def fact(self, name: str) -> str:
        """Return what Slurm says of it under a name."""
        shown = self.cluster.ask("scontrol", "--oneliner", "show", "job", self.number)
        found = re.search(rf" {name}=(\S*)", shown)
        assert found is not None, shown
        return found[1]

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Return once a condition holds; fail if the job ends before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not holds():
            state = self.state
            if state in _OVER or time.monotonic() > deadline:
                raise AssertionError(f"job {self.number} ({state}) never came there:\n{self.output}")
            time.sleep(POLL_S)

    def wait(self) -> str:
        """Wait for the end, whatever it is, and return Slurm's word for it."""
        deadline = time.monotonic() + TIMEOUT_S
        while (state := self.state) not in _OVER:
            assert time.monotonic() < deadline, f"job {self.number} ({state}) does not end:\n{self.output}"
            time.sleep(POLL_S)
        return state


class SlurmCluster:
    """A running Slurm.

    Args:
        folder: Where it keeps everything; its path must be short, as there are sockets in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }

    def ask(self, *command: str, **variables: str) -> str:
        """Run one of Slurm's commands, which must succeed, and return what it printed."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**self._environment, **variables},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, directory: Path, options: Sequence[str], settings: Sequence[str], **variables: str) -> SlurmJob:
        """Submit launch/slurm.sbatch from the root of the repository, as its README says."""
        log = directory.with_suffix(".txt")
        where = [f"--output={log}", *options, "launch/slurm.sbatch", *settings]
        said = self.ask("sbatch", "--parsable", *where, DIRECTORY=str(directory), **variables)
        return SlurmJob(cluster=self, number=said.strip(), log=log)

    def start(self, stack: ExitStack) -> None:
        """Start the daemons, and wait until all nodes are idle."""
        ports = _free_ports(1 + NUM_NODES)
        nodes = [
            f"NodeName=n{index} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=1"
            for index, port in enumerate(ports[1:], start=1)
        ]
        settings = _SETTINGS.format(folder=self._folder, controller_port=ports[0], nodes="\n".join(nodes))
        (self._folder / "slurm.conf").write_text(settings)
        (self._folder / "state").mkdir()
        key = self._folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(64))
        files = [f"--{name}={self._folder / name}" for name in ("pid-file", "log-file", "seed-file")]
        munged = ["munged", "--foreground", "--force", f"--socket={self._folder}/munge", f"--key-file={key}", *files]
        self._daemon(stack, "munged", munged)
        _wait_for((self._folder / "munge").exists, "munged's socket")
        self._daemon(stack, "slurmctld", ["slurmctld", "-D"])
        for index in range(1, NUM_NODES + 1):
            (self._folder / f"n{index}").mkdir()
            self._daemon(stack, f"slurmd-n{index}", ["slurmd", "-D", "-N", f"n{index}"])
        _wait_for(self._is_idle, "the nodes")

    def stop(self) -> None:
        """End all jobs, and whatever they have left."""
        with suppress(AssertionError):
            self.ask("scancel", "--user=root")
            self.ask("scancel", "--user=root", "--signal=KILL", "--full")
        gone = time.monotonic() + TIMEOUT_S
        while time.monotonic() < gone and (family := self._family()):
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=1)

    def _family(self) -> list[psutil.Process]:
        """Return the processes of jobs, which know this Slurm's settings and are not its daemons."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_ours = process.environ().get("SLURM_CONF") == self._environment["SLURM_CONF"]
                if is_ours and process.name() not in _DAEMONS:
                    found.append(process)
        return found

    def _is_idle(self) -> bool:
        with suppress(AssertionError):
            return self.ask("sinfo", "--noheader", "--partition=low", "--format=%D %T").strip() == f"{NUM_NODES} idle"
        return False

    def _daemon(self, stack: ExitStack, name: str, command: list[str]) -> None:
        with (self._folder / f"{name}.txt").open("wb") as output:
            process = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        stack.callback(_end, process)


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Give a Slurm of two nodes, which ends with the context."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True))
        cluster = SlurmCluster(Path(folder))
        cluster.start(stack)
        stack.callback(cluster.stop)
        yield cluster


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come up"
        time.sleep(POLL_S)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]

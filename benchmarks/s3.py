"""How fast, and with how much processor time and memory, bytes go to an S3 server and come back.

    benchmarks/ceph.sh start && source .ceph/env.sh && python -m benchmarks.s3
    python -m benchmarks.s3 --links 30x90 --objects 8
    python -m benchmarks.s3 --megabytes 64 --links direct

The first one takes about ten minutes on a quiet machine, and gives three tables: 1 GB as one object and as eight, and
one object behind a link of 30 ms and 90 MB/s per connection. Below each stand the targets, reached or not.

The server is that of AWS_ENDPOINT_URL; without one, moto's is started, which is slow, and good for a try alone.
Client and server share this machine, so processor time counts for more than rates. What was downloaded is compared.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import MemoryCopy, timed
from benchmarks.contenders.object_stores import REGION, Mover, Place, open_movers
from benchmarks.options import RESULTS
from benchmarks.report import Report
from benchmarks.rounds import Cell, Rules, interleave
from benchmarks.targets import Column
from benchmarks.team import Team

ABOUT = "seconds to upload and to download, from memory and to memory"
COPY = "memory copy"
OWN = ("distckpt", "distckpt, obstore")
DCP = "DCP FsspecWriter, FsspecReader"
WAYS = ("upload", "download")
GIB, MIB = 1 << 30, 1 << 20
MOST_CPU = {
    "upload": {"distckpt": 2.0, "distckpt, obstore": 0.6},
    "download": {"distckpt": 1.2, "distckpt, obstore": 1.2},
}
MOST_MEMORY = {"upload": 128 * MIB, "download": 64 * MIB}


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What lies between client and server.

    Attributes:
        latency_ms: A round trip, in milliseconds.
        connection_mb_s: The rate of each connection; 0 is no limit.
    """

    latency_ms: float = 0.0
    connection_mb_s: float = 0.0

    @property
    def is_slow(self) -> bool:
        """Whether there is anything in between."""
        return bool(self.latency_ms or self.connection_mb_s)

    @property
    def text(self) -> str:
        """The link in words."""
        if not self.is_slow:
            return "none"
        return f"{self.latency_ms:g} ms, {self.connection_mb_s:g} MB/s per connection"

    @classmethod
    def parsed(cls, text: str) -> Link:
        """Return what "direct" or "30x90" means: milliseconds, and MB/s per connection."""
        if text == "direct":
            return cls()
        latency_ms, _, connection_mb_s = text.partition("x")
        return cls(latency_ms=float(latency_ms), connection_mb_s=float(connection_mb_s))


def measure(arguments: argparse.Namespace, place: Place, team: Team, *, num_objects: int, link: Link) -> None:
    """Measure one number of objects over one link, and report."""
    num_bytes = arguments.megabytes * 1_000_000 // num_objects
    objects = {f"object-{i}": memoryview(bytearray(os.urandom(MIB) * (num_bytes // MIB + 1)))[:num_bytes]
               for i in range(num_objects)}  # fmt: skip
    into = {key: memoryview(bytearray(num_bytes)) for key in objects}
    movers, absent = open_movers(place, arguments.only)
    copy = MemoryCopy([torch.frombuffer(view, dtype=torch.uint8) for view in objects.values()])
    copy.copy()
    cells: dict[str, Cell] = {COPY: lambda: {"upload_s": timed(copy.copy)}}
    for mover in movers.values():
        _warm_up(mover)
    cells |= {name: _cell(mover, objects, into, place, arguments.server) for name, mover in movers.items()}
    rules = Rules(
        num_rounds=arguments.rounds,
        max_noise=arguments.max_noise,
        limit_s=arguments.max_seconds,
        slow_s=arguments.slow_seconds,
    )
    run = interleave(cells, team=team, rules=rules, references=((COPY, "upload_s"),))
    peers = [name for name in movers if name not in OWN]
    Report(
        benchmark="s3",
        about=ABOUT,
        facts={
            "objects": num_objects,
            "bytes": num_bytes * num_objects,
            "server": arguments.server,
            "link": link.text,
        },
        columns=[column for way in WAYS for column in _columns(way, peers)],
        checks=[check for way in WAYS for check in _checks(way, link)],
        run=run,
        absent=absent,
        own=OWN,
        limits=(COPY,),
    ).give(arguments.results)


def _columns(way: str, peers: Sequence[str]) -> list[Column]:
    """Return what the table shows of one way."""
    return [
        Column(
            title=f"{way} s",
            measure=f"{way}_s",
            ceiling=[(name, f"{way}_s") for name in peers],
            against="x best peer",
            target=1 / 0.9,
            aim=1.0,
            figure=f"{way} / best peer",
        ),
        Column(title="cpu s/GiB", measure=f"{way}_cpu_per_gib"),
        Column(
            title="extra MiB",
            measure=f"{way}_peak",
            scale=1 / MIB,
            target=MOST_MEMORY[way],
            figure=f"{way}, bytes of memory beyond the caller's",
        ),
    ]


def _checks(way: str, link: Link) -> list[Column]:
    """Return what has to be reached beyond the columns of one way."""
    checks = [
        Column(title="", measure=f"{way}_cpu_per_gib", target=most, figure=f"{way}, cpu s per GiB", of=(contender,))
        for contender, most in MOST_CPU[way].items()
    ]
    if link.is_slow:
        ceiling = [(DCP, f"{way}_s")]
        checks.append(Column(title="", measure=f"{way}_s", ceiling=ceiling, target=1 / 3, figure=f"{way} / DCP"))
    return checks


def _warm_up(mover: Mover) -> None:
    """Let a contender make its client and connect; what fails now fails again where it is reported."""
    with suppress(Exception):
        mover.upload({"warm": memoryview(bytearray(MIB))})
        mover.download({"warm": memoryview(bytearray(MIB))})


def _cell(
    mover: Mover, objects: Mapping[str, memoryview], into: Mapping[str, memoryview], place: Place, server: str
) -> Cell:
    total = sum(map(len, objects.values()))

    def cell() -> Mapping[str, float]:
        measured: dict[str, float] = {}
        for way, move in (("upload", lambda: mover.upload(objects)), ("download", lambda: mover.download(into))):
            if way == "download":
                for view in into.values():
                    view[:] = bytes(len(view))
            before, base = _cpu_s(), _reset_peak()
            measured[f"{way}_s"] = timed(move)
            measured[f"{way}_cpu_per_gib"] = (_cpu_s() - before) / (total / GIB)
            measured[f"{way}_peak"] = float(max(0, _peak() - base))
        if any(into[key] != view for key, view in objects.items()):
            raise RuntimeError("what came back is not what was sent")
        _bucket(place.bucket, server).objects.all().delete()
        return measured

    return cell


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _reset_peak() -> int:
    """Let the kernel forget this process's peak of memory, and return what it holds now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the URL of the server that is given, or of moto's."""
    if given := os.environ.get("AWS_ENDPOINT_URL"):
        yield given
        return
    os.environ.update(AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing", AWS_DEFAULT_REGION=REGION)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield next(line.split()[-1] for line in process.stdout if "Running on http://127" in line)
        finally:
            process.terminate()


@contextmanager
def _linked(link: Link, server: str) -> Iterator[str]:
    """Yield the URL of a long and narrow link to a server, or the server's own if none is asked for."""
    if not link.is_slow:
        yield server
        return
    settings = [f"--latency-ms={link.latency_ms}", f"--connection-mb-s={link.connection_mb_s}"]
    command = [sys.executable, "-m", "benchmarks.slow_link", server, *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=ABOUT)
    parser.add_argument("--megabytes", type=int, default=1024, help="in all")
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 8], help="in how many objects")
    parser.add_argument(
        "--links",
        nargs="+",
        default=["direct", "30x90"],
        metavar="LINK",
        help='"direct", or milliseconds of a round trip x MB/s of a connection, for the first of --objects alone',
    )
    parser.add_argument("--rounds", type=int, default=3, help="good rounds; up to twice as many are run")
    parser.add_argument(
        "--slow-seconds", type=float, default=15.0, help="who takes longer rests in two of three rounds"
    )
    parser.add_argument("--max-seconds", type=float, default=200.0, help="of a table; no round begins after")
    parser.add_argument("--max-noise", type=float, default=0.5, help="how far the memory copy may stray")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON lines go")
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help="leave the others out")
    parsed = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")  # of peers; they would hide the tables
    team = Team()
    with _server(parsed) as server, tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        bucket = f"bench-{int(time.time())}"
        parsed.server = server
        _bucket(bucket, server).create()
        for link in map(Link.parsed, parsed.links):
            with _linked(link, server) as endpoint:
                place = Place(bucket=bucket, endpoint=endpoint, scratch=Path(folder))
                for num_objects in parsed.objects[:1] if link.is_slow else parsed.objects:
                    measure(parsed, place, team, num_objects=num_objects, link=link)
        _bucket(bucket, server).delete()
    team.close()
    return 0


def _bucket(name: str, server: str) -> Any:
    """Return boto3's bucket on the server itself, past the link."""
    import boto3

    return boto3.resource("s3", endpoint_url=server, region_name=REGION).Bucket(name)


if __name__ == "__main__":
    sys.exit(main())

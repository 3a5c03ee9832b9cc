"""How fast, and with how much processor time and memory, bytes go to an S3 server and come back.

    benchmarks/ceph.sh start && source .ceph/env.sh && python -m benchmarks.s3
    python -m benchmarks.s3 --latency-ms 30 --connection-mb-s 90
    python -m benchmarks.s3 --megabytes 64

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
GIB, MIB = 1 << 30, 1 << 20


def measure(arguments: argparse.Namespace, place: Place, team: Team, num_objects: int) -> None:
    """Measure one number of objects, and report."""
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
    rules = Rules(num_rounds=arguments.rounds, max_noise=arguments.max_noise, limit_s=arguments.max_seconds)
    run = interleave(cells, team=team, rules=rules, references=((COPY, "upload_s"),))
    peers = [name for name in movers if name not in OWN]
    columns = []
    for way, default_cpu in (("upload", 2.0), ("download", 1.2)):
        columns += [
            Column(
                title=f"{way} s",
                measure=f"{way}_s",
                ceiling=[(name, f"{way}_s") for name in peers],
                against="x best peer",
                target=1 / 0.9,
                aim=1.0,
                figure=f"{way} / best peer",
            ),
            Column(title="cpu s/GiB", measure=f"{way}_cpu_per_gib", target=default_cpu, figure=f"{way}, cpu s per GiB"),
            Column(
                title="extra MiB",
                measure=f"{way}_peak",
                scale=1 / MIB,
                target=(128 if way == "upload" else 64) * MIB,
                figure=f"{way}, peak memory",
            ),
        ]
    Report(
        benchmark="s3",
        about=ABOUT,
        facts={
            "objects": num_objects,
            "bytes": num_bytes * num_objects,
            "server": arguments.server,
            "latency_ms": arguments.latency_ms,
            "connection_mb_s": arguments.connection_mb_s,
        },
        columns=columns,
        run=run,
        absent=absent,
        own=OWN,
        limits=(COPY,),
    ).give(arguments.results)


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
def _link(arguments: argparse.Namespace, server: str) -> Iterator[str]:
    """Yield the URL of a long and narrow link to a server, or the server's own if none is asked for."""
    if not arguments.latency_ms and not arguments.connection_mb_s:
        yield server
        return
    settings = [f"--latency-ms={arguments.latency_ms}", f"--connection-mb-s={arguments.connection_mb_s}"]
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
    parser.add_argument("--latency-ms", type=float, default=0.0, help="a round trip of a link in between")
    parser.add_argument("--connection-mb-s", type=float, default=0.0, help="the rate of each of its connections")
    parser.add_argument("--rounds", type=int, default=5, help="good rounds; up to twice as many are run")
    parser.add_argument("--max-seconds", type=float, default=1800.0, help="no round begins after")
    parser.add_argument("--max-noise", type=float, default=0.5, help="how far the memory copy may stray")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON lines go")
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help="leave the others out")
    parsed = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")  # of peers; they would hide the tables
    team = Team()
    with _server(parsed) as server, _link(parsed, server) as endpoint, tempfile.TemporaryDirectory(dir="/dev/shm") as d:
        bucket = f"bench-{int(time.time())}"
        parsed.server = server
        _bucket(bucket, server).create()
        for num_objects in parsed.objects:
            measure(parsed, Place(bucket=bucket, endpoint=endpoint, scratch=Path(d)), team, num_objects)
        _bucket(bucket, server).delete()
    team.close()
    return 0


def _bucket(name: str, server: str) -> Any:
    """Return boto3's bucket on the server itself, past the link."""
    import boto3

    return boto3.resource("s3", endpoint_url=server, region_name=REGION).Bucket(name)


if __name__ == "__main__":
    sys.exit(main())

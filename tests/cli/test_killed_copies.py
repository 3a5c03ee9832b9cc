"""A copy of one large file that is killed in the middle is ended by the next, without all of it being copied again.

Bytes are counted by the kernel (`/proc/PID/io`) and by a proxy before the S3 server.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_proxy import FaultProxy

import distckpt
from distckpt import catalog, verification
from distckpt.storage import open_storage

MIB = 1 << 20
WAIT_S = 300.0
LEAST_DONE = 0.3  # of the file, when the copy is killed


def made(directory: Path, num_bytes: int) -> Path:
    """Save one checkpoint of one file."""
    words = np.random.default_rng(1).integers(0, 2**63, num_bytes // 8)
    distckpt.save(directory / "step-000000000100", {"words": words}, step=100, rng=False)
    return directory


def copying(source: Path, target: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "distckpt.cli", "cp", str(source), target, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed_once(process: subprocess.Popen[str], *, is_time: Callable[[], bool]) -> None:
    """Kill a copy once it is time; it must not have ended before."""
    deadline = time.monotonic() + WAIT_S
    while not is_time():
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"it ended with {process.wait(0.02)}: {process.communicate()}")
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == -signal.SIGKILL


def finished(process: subprocess.Popen[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """Wait for a copy; return its answer, and the kernel's counters of the process that made it."""
    assert process.stdout is not None
    assert process.stderr is not None
    text = process.stdout.read()  # to its end: the process is there still, as nobody has waited for it
    counters = Path(f"/proc/{process.pid}/io").read_text()
    assert process.wait(WAIT_S) == 0, process.stderr.read()
    process.stderr.close()
    process.stdout.close()
    return json.loads(text), {name: int(value) for name, value in (line.split(": ") for line in counters.splitlines())}


def written(pid: int) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def is_whole(url: str) -> bool:
    storage = open_storage(url)
    folder, manifest = catalog.locate(storage)
    return not list(verification.verify(storage, manifest, folder=folder))


def check_nothing_is_visible(url: str) -> None:
    assert [folder.committed for folder in catalog.scan(open_storage(url))] in ([], [False])


def check_local(folder: Path, num_bytes: int) -> None:
    source, target = made(folder / "run", num_bytes), folder / "copy"
    first = copying(source, str(target))
    killed_once(first, is_time=lambda: written(first.pid) > 0.8 * num_bytes)
    check_nothing_is_visible(str(target))
    answer, counters = finished(copying(source, str(target)))
    assert answer["bytes"] + answer["reused_bytes"] > num_bytes
    assert answer["reused_bytes"] >= LEAST_DONE * num_bytes
    assert counters["wchar"] < answer["bytes"] + MIB, "nothing was written that was there"
    assert is_whole(str(target))
    assert not list(target.rglob("*.copied"))


def check_s3(folder: Path, num_bytes: int, url: str, proxy: FaultProxy) -> None:
    source = made(folder / "run", num_bytes)
    proxy.reset()
    killed_once(copying(source, url), is_time=lambda: proxy.num_uploaded() > 0.7 * num_bytes)
    check_nothing_is_visible(url)
    proxy.reset()
    answer, _ = finished(copying(source, url))
    assert answer["reused_bytes"] >= LEAST_DONE * num_bytes
    assert proxy.num_uploaded() < answer["bytes"] + MIB
    assert is_whole(url)


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the kernel does not count")  # noqa: PTH110
def test_a_killed_local_copy_is_gone_on_with(tmp_path: Path) -> None:
    check_local(tmp_path, 256 * MIB)


def test_a_killed_upload_is_gone_on_with(tmp_path: Path, s3_bucket: str, proxied: FaultProxy) -> None:
    check_s3(tmp_path, 80 * MIB, f"s3://{s3_bucket}/run", proxied)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_local_copy_of_a_gigabyte_is_gone_on_with(tmp_path: Path) -> None:
    check_local(tmp_path, 1000 * MIB)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_upload_of_a_gigabyte_is_gone_on_with(tmp_path: Path, s3_bucket: str, proxied: FaultProxy) -> None:
    check_s3(tmp_path, 1000 * MIB, f"s3://{s3_bucket}/run", proxied)

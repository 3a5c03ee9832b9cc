"""The benchmark of object stores runs to its end; no figure is looked at but those that must be exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import s3fs
from s3_server import S3Server

ROOT = Path(__file__).parents[2]
CONTENDERS = ["distckpt", "boto3 transfer manager"]


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def test_the_benchmark_measures_every_contender_through_a_link(s3_bucket: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *python("benchmarks.s3", "--megabytes", "4", "--rounds", "1", "--max-noise", "1000", "--objects", "2"),
            *("--links", "1x500", "--results", str(tmp_path), "--only", *CONTENDERS),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "s3.jsonl").read_text())
    assert found["failed"] == {}
    measured = {(figure["contender"], figure["measure"]) for figure in found["figures"]}
    for name in CONTENDERS:
        assert {(name, "upload_s"), (name, "download_s"), (name, "upload_peak")} <= measured


def test_a_link_hands_on_every_byte_and_keeps_its_latency_and_rate(s3_server: S3Server, s3_bucket: str) -> None:
    command = python("benchmarks.slow_link", s3_server.endpoint, "--latency-ms", "20", "--connection-mb-s", "8")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            endpoint = process.stdout.readline().strip()
            fs = s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True, use_listings_cache=False)
            data = os.urandom(2_000_000)
            begun = time.monotonic()
            fs.pipe_file(f"{s3_bucket}/f", data)
            assert time.monotonic() - begun >= 2 / 8 * 0.9 + 0.020
            assert fs.cat_file(f"{s3_bucket}/f") == data
        finally:
            process.terminate()

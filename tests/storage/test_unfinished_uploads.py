"""`ls` shows uploads that were never finished, and `prune` aborts the old ones of this run and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_proxy import Fault, FaultProxy
from s3_server import S3Server
from typer.testing import CliRunner

import distckpt
from distckpt.cli import uploads
from distckpt.cli.application import application
from distckpt.storage import UnfinishedUpload
from distckpt.storage.contract import DAY_S


def command(*arguments: object) -> Any:
    """Run `distckpt`, which must end well; the result has `stdout` and `stderr`."""
    result = CliRunner().invoke(application, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result


def save(url: object) -> None:
    with distckpt.CheckpointManager(str(url), background=False) as manager:
        manager.save(8, {"weight": torch.ones(3)})


@pytest.fixture
def url(s3_server: S3Server, s3_bucket: str) -> str:
    """Leave two uploads in a run's directory and one in another's; moto says that they began in 2010."""
    if not s3_server.is_moto:
        pytest.skip("nothing is a day old on this server")
    for key in ("run/step-000000000007/a/rank-00000.safetensors", "run/odd", "run-2/step-000000000007/a/f"):
        begun = s3_server.client.create_multipart_upload(Bucket=s3_bucket, Key=key)
        s3_server.client.upload_part(
            Bucket=s3_bucket, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=bytes(1000)
        )
    return f"s3://{s3_bucket}/run"


def unfinished(server: S3Server, bucket: str) -> list[str]:
    return sorted(each["Key"] for each in server.client.list_multipart_uploads(Bucket=bucket).get("Uploads", []))


def test_ls_counts_them_with_size_and_age_where_nothing_was_ever_committed(url: str) -> None:
    result = command("ls", url)
    assert "no checkpoint; 0 B in all" in result.stderr
    assert "2 unfinished uploads, 2.0 kB, the oldest begun " in result.stderr
    assert f"; distckpt prune {url} --partial aborts the 2 older than a day" in result.stderr
    listed = json.loads(command("ls", url, "--json").stdout)
    assert listed["checkpoints"] == []
    assert [each.keys() for each in listed["uploads"]] == [{"path", "id", "started", "bytes"}] * 2
    assert {(each["path"], each["bytes"]) for each in listed["uploads"]} == {
        (f"{url}/odd", 1000),
        (f"{url}/step-000000000007/a/rank-00000.safetensors", 1000),
    }


def test_prune_shows_them_and_aborts_them_with_yes_alone(url: str, s3_server: S3Server, s3_bucket: str) -> None:
    shown = command("prune", url, "--partial")
    assert [line.split()[:5] for line in sorted(shown.stdout.splitlines()[1:])] == [
        ["7", "upload", "1.0", "kB", "abort"],
        ["?", "upload", "1.0", "kB", "abort"],
    ]
    assert "would delete 0 of 0 and abort 2 uploads, 2.0 kB; nothing is deleted without --yes" in shown.stderr
    assert len(unfinished(s3_server, s3_bucket)) == 3
    done = json.loads(command("prune", url, "--partial", "--yes", "--json").stdout)
    assert (done["deleted"], done["bytes"]) == (True, 2000)
    assert {each["action"] for each in done["uploads"]} == {"abort"}
    assert unfinished(s3_server, s3_bucket) == ["run-2/step-000000000007/a/f"]


def test_a_job_that_starts_again_aborts_what_a_killed_one_left(url: str, s3_server: S3Server, s3_bucket: str) -> None:
    save(url)
    assert unfinished(s3_server, s3_bucket) == ["run-2/step-000000000007/a/f"]


def test_where_uploads_may_not_be_listed_all_else_goes_on(proxy: FaultProxy, s3_bucket: str) -> None:
    url = f"s3://{s3_bucket}/run"
    proxy.fail(Fault(method="GET", where="uploads", action="answer", times=100, status=403, code="AccessDenied"))
    save(url)
    result = command("ls", url, "--json")
    listed = json.loads(result.stdout)
    assert [each["step"] for each in listed["checkpoints"]] == [8]
    assert listed["uploads"] is None
    assert "unfinished uploads are not shown: could not list" in result.stderr
    assert json.loads(command("prune", url, "--keep", 1, "--yes", "--json").stdout)["uploads"] == []
    assert proxy.count("GET", "uploads") == 3


def test_only_uploads_that_surely_began_a_day_ago_go() -> None:
    moments = {"old": 1e9 - DAY_S - 1, "new": 1e9 - DAY_S + 60, "unknown": 0.0}
    found = [UnfinishedUpload(name=name, id="1", started=moment) for name, moment in moments.items()]
    assert {item.upload.name: item.goes for item in uploads.plan(found, now=1e9)} == {
        "old": True, "new": False, "unknown": False,
    }  # fmt: skip


def test_local_directories_have_none(tmp_path: Path) -> None:
    save(tmp_path)
    assert json.loads(command("ls", tmp_path, "--json").stdout)["uploads"] == []
    assert json.loads(command("prune", tmp_path, "--keep", 9, "--json").stdout)["uploads"] == []

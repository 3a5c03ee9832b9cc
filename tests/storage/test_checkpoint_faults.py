"""Every kind of fault at every request of a save, a prune and a restore: they succeed, and nothing is left over."""

from __future__ import annotations

import pytest
import s3fs
import torch
from fault_proxy import FaultProxy
from test_s3_faults import FAULTS, READ_TIMEOUT_S

import distckpt

OPTIONS = {"engine": "s3fs", "config_kwargs": {"read_timeout": READ_TIMEOUT_S}}
KINDS = [kind if kind == "answer lost" else pytest.param(kind, marks=pytest.mark.slow) for kind in FAULTS]


def save(url: str) -> None:
    """Save two checkpoints; the second one makes the first one superfluous."""
    with distckpt.CheckpointManager(url, keep=1, background=False, storage_options=OPTIONS) as manager:
        for step in (1, 2):
            manager.save(step, {"weight": torch.full((64,), float(step))})


def restore(url: str) -> None:
    """Restore the second checkpoint."""
    state = {"weight": torch.zeros(64)}
    with distckpt.CheckpointManager(url, storage_options=OPTIONS) as manager:
        assert manager.restore(state) == 2
    assert state["weight"].tolist() == [2.0] * 64


def num_requests_of(proxy: FaultProxy, url: str) -> int:
    proxy.reset()
    save(url)
    restore(url)
    return len(proxy.seen)


@pytest.mark.parametrize("kind", KINDS)
def test_one_fault_at_any_request_of_saving_pruning_and_restoring_is_mended(
    proxy: FaultProxy, s3_filesystem: s3fs.S3FileSystem, s3_bucket: str, kind: str
) -> None:
    num_requests = num_requests_of(proxy, f"s3://{s3_bucket}/count")
    assert num_requests > 10
    for fail_at in range(num_requests):
        proxy.reset()
        fault = FAULTS[kind]()
        fault.skip = fail_at
        proxy.fail(fault)
        url = f"s3://{s3_bucket}/run-{fail_at}"
        save(url)
        restore(url)
        assert fault.times == 0, f"nothing failed at request {fail_at}"
        left = [path.removeprefix(f"{s3_bucket}/run-{fail_at}/") for path in s3_filesystem.find(url)]
        assert len(left) == 3, f"fault at request {fail_at}: {left}"
        assert {path.partition("/")[0] for path in left} == {"lease", "step-000000000002"}
    assert s3_filesystem.list_multipart_uploads(s3_bucket) == []


@pytest.mark.parametrize("code", ["SlowDown", "AccessDenied"])
def test_a_save_that_the_server_refuses_fails_and_the_older_checkpoint_stays(
    proxy: FaultProxy, s3_bucket: str, code: str
) -> None:
    url = f"s3://{s3_bucket}/run"
    options = {"engine": "s3fs", "config_kwargs": {"retries": {"total_max_attempts": 2}}}
    with distckpt.CheckpointManager(url, keep=1, background=False, storage_options=options) as manager:
        manager.save(1, {"weight": torch.ones(4)})
        status = 503 if code == "SlowDown" else 403
        refuse = FAULTS["503"]()
        refuse.method, refuse.status, refuse.code, refuse.times = "PUT", status, code, 1000
        proxy.fail(refuse)
        with pytest.raises(distckpt.errors.DistckptError, match=code):
            manager.save(2, {"weight": torch.zeros(4)})
        proxy.reset()
        assert manager.latest is not None
        assert manager.latest.step == 1

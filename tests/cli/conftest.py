"""The command line in this process, and a small real run to look at."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from s3_server import S3Server
from typer.testing import CliRunner

from distckpt.cli.application import application


@pytest.fixture
def command() -> Callable[..., Any]:
    """Run `distckpt` with some arguments; the result has `exit_code`, `stdout` and `stderr`."""

    def run(*args: object) -> Any:
        result = CliRunner().invoke(application, [str(arg) for arg in args], prog_name="distckpt")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run with checkpoints 10, 20 and 30 whose loss gets worse; tests take a copy."""
    import torch
    from torch import nn

    import distckpt

    directory = tmp_path_factory.mktemp("made") / "run"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "epoch": 0, "history": [1.0, float("nan")]}
    config = {"seed": 1, "model": {"name": "tiny"}}
    with distckpt.CheckpointManager(directory, every=10, keep=9, background=False, config=config) as manager:
        for step in manager.steps(state, until=30):
            state["epoch"] = step // 10
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            if step % 10 == 0:
                manager.save(step, state, metrics={"val/loss": step / 100, "val/top1": 0.5})
    return directory


@pytest.fixture
def run(made_run: Path, tmp_path: Path) -> Path:
    """Give a copy of the run."""
    return Path(shutil.copytree(made_run, tmp_path / "run-7"))


@pytest.fixture
def proxied(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Put a proxy that counts before the S3 server, for this process and its children."""
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy

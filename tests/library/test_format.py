"""FORMAT.md is true: the reader that stands on it, without distckpt and torch, reads checkpoints."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import distckpt

PAGE = (Path(distckpt.__file__).parent / "FORMAT.md").read_text()
MOST_LINES = 70

Read = Callable[[Path], tuple[dict[str, Any], list[dict[str, Any]]]]


def reader_text() -> str:
    [code] = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    return str(code)


@pytest.fixture
def read() -> Read:
    """The page's own reader."""
    namespace: dict[str, Any] = {}
    exec(compile(reader_text(), "FORMAT.md", "exec"), namespace)
    return namespace["read"]  # type: ignore[no-any-return]


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_the_pages_reader_reads_a_checkpoint(tmp_path: Path, read: Read):
    model, optimizer = trained()
    distckpt.save(tmp_path, {"model": model, "optimizer": optimizer}, step=12)
    manifest, [state] = read(tmp_path)
    assert manifest["step"] == 12
    assert list(manifest) == sorted(manifest)
    for name, tensor in model.state_dict().items():
        assert np.array_equal(state["model"][name], tensor.numpy())
    moment = optimizer.state_dict()["state"][0]["exp_avg"].numpy()
    assert np.array_equal(state["optimizer"]["state"][0]["exp_avg"], moment)
    assert state["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert state["_rng"]["python"]["words"].shape == (625,)


@pytest.mark.parametrize(
    "value",
    [
        (1, "x", None, [True, 2.5]),
        {"b": 1, "a": {2: "two", (3, 4): "pair"}, "$odd": b"\x00\xff"},
        [float("inf"), float("-inf")],
        np.float32(1.5),
        np.complex128(1 - 2j),
        np.arange(6).reshape(2, 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_pages_reader_gives_back_any_value(value: Any, tmp_path: Path, read: Read):
    distckpt.save(tmp_path, {"value": value}, rng=False)
    _, [state] = read(tmp_path)
    assert np.array_equal(state["value"], value) if isinstance(value, np.ndarray) else state["value"] == value
    assert type(state["value"]) is type(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_the_pages_reader_gives_back_the_bits_of_any_dtype(dtype: torch.dtype, tmp_path: Path, read: Read):
    tensor = torch.arange(-4, 5).to(dtype)
    distckpt.save(tmp_path, {"tensor": tensor}, rng=False)
    _, [state] = read(tmp_path)
    assert state["tensor"].tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_the_pages_reader_refuses_a_changed_byte(tmp_path: Path, read: Read):
    distckpt.save(tmp_path, {"weights": torch.ones(1000)}, rng=False)
    [file] = tmp_path.glob("*/rank-00000.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read(tmp_path)


def test_the_pages_reader_is_short_and_needs_neither_distckpt_nor_torch(tmp_path: Path):
    distckpt.save(tmp_path / "saved", {"model": nn.Linear(2, 3)}, step=7)
    script = tmp_path / "reader.py"
    told = 'import sys\nprint(read(sys.argv[1])[0]["step"], {"torch", "distckpt"} & set(sys.modules))\n'
    script.write_text(reader_text() + told)
    assert len(reader_text().splitlines()) <= MOST_LINES
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={key: text for key, text in os.environ.items() if key != "PYTHONPATH"},
    )
    assert run.stdout == "7 set()\n"


def test_a_data_file_is_laid_out_as_the_page_says(tmp_path: Path, read: Read):
    model, optimizer = trained()
    distckpt.save(tmp_path, {"model": model, "optimizer": optimizer})
    manifest, _ = read(tmp_path)
    assert manifest["files"]
    for file in manifest["files"]:
        data = (tmp_path / file["name"]).read_bytes()
        (header_bytes,) = struct.unpack("<Q", data[:8])
        assert (8 + header_bytes) % 4096 == 0
        assert file["segments"][0][0] == 8 + header_bytes
        assert sum(size for size, _ in file["segments"]) == len(data) == file["bytes"]


def test_every_key_of_a_manifest_is_on_the_format_page(tmp_path: Path, read: Read):
    distckpt.save(tmp_path, {"x": 1})
    manifest, _ = read(tmp_path)
    for key in manifest:
        assert f"`{key}`" in PAGE, key


def test_every_random_generator_is_on_the_format_page(tmp_path: Path, read: Read):
    distckpt.save(tmp_path, {"x": 1})
    manifest, _ = read(tmp_path)
    found = [name.removeprefix("rank-00000:_rng.") for name in manifest["tensors"]]
    assert found
    for name in found:
        assert f"`{name}`" in PAGE, name


def test_the_limits_on_the_page_are_those_of_the_code():
    from distckpt import chunks, leasefiles, manifest, runs, values

    assert f"{manifest.MAX_SEGMENT_BYTES:,} bytes" in PAGE
    assert f"at most {chunks.MAX_DIMS} dimensions" in PAGE
    assert f"1 to {runs.MAX_REPEATS} `[dimension, times, step]`" in PAGE
    assert f"at most {chunks.MOST_ROOM_LOOKS:,} files" in PAGE
    assert f"at most {values.MAX_DEPTH} deep" in PAGE
    assert f"at most {manifest.MAX_BYTES >> 30} GiB" in PAGE
    assert f"at most {leasefiles.MOST_DURATION_S:,.0f}" in PAGE


def test_every_key_of_a_lease_is_on_the_format_page():
    from distckpt import leasefiles, owner
    from distckpt.outcome import Outcome

    outcome = Outcome(ending="complete", step=1, time=0.0, host="here")
    record = leasefiles.Record(
        job="0" * 16, owner=owner.this_process(), acquired=0.0, renewed=0.0, duration_s=60.0, outcome=outcome
    )
    section = PAGE.partition("## The lease")[2].partition("## A reader")[0]
    body = json.loads(record.to_bytes())
    for key in (*body, *body["outcome"]):
        assert f"`{key}`" in section, key

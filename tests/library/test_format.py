"""FORMAT.md is true: a reader written from it alone, without distckpt, reads a checkpoint."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

import distckpt

NUMPY = {"F32": "<f4", "I64": "<i8", "U8": "u1", "F64": "<f8", "U32": "<u4"}


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the manifest and every tensor, as FORMAT.md says."""
    text = (folder / "manifest.json").read_bytes()
    manifest = json.loads(text)
    sealed = text[: text.rindex(b',"xxh3":')]
    assert xxhash.xxh3_128_hexdigest(sealed) == manifest["xxh3"]
    assert list(manifest) == sorted(manifest)
    files = []
    for file in manifest["files"]:
        data = (folder / file["name"]).read_bytes()
        assert len(data) == file["bytes"]
        offset = 0
        for size, hexadecimal in file["segments"]:
            assert xxhash.xxh3_128_hexdigest(data[offset : offset + size]) == hexadecimal
            offset += size
        assert offset == len(data)
        (header_bytes,) = struct.unpack("<Q", data[:8])
        assert (8 + header_bytes) % 4096 == 0
        json.loads(data[8 : 8 + header_bytes])
        files.append(data)
    tensors = {}
    for name, entry in manifest["tensors"].items():
        whole = np.empty(entry["shape"], dtype=NUMPY[entry["dtype"]])
        for file, offset, start, shape in entry["chunks"]:
            count = int(np.prod(shape))
            chunk = np.frombuffer(files[file], dtype=whole.dtype, count=count, offset=offset).reshape(shape)
            whole[tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))] = chunk
        tensors[name] = whole
    return manifest, tensors


def test_a_reader_written_from_the_format_page_reads_a_checkpoint(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    distckpt.save(tmp_path, {"model": model, "optimizer": optimizer, "note": (1, "x")}, step=12)
    manifest, tensors = read_checkpoint(tmp_path)
    assert manifest["step"] == 12
    assert manifest["objects"]["note"]["trees"] == [{"$tuple": [1, "x"]}]
    for name, tensor in model.state_dict().items():
        assert np.array_equal(tensors[f"model.{name}"], tensor.numpy())
    moment = optimizer.state_dict()["state"][0]["exp_avg"].numpy()
    assert np.array_equal(tensors["optimizer.state.0.exp_avg"], moment)


def test_every_key_of_a_manifest_is_on_the_format_page(tmp_path: Path):
    distckpt.save(tmp_path, {"x": 1})
    manifest, _ = read_checkpoint(tmp_path)
    page = (Path(distckpt.__file__).parent / "FORMAT.md").read_text()
    for key in manifest:
        assert f"`{key}`" in page, key

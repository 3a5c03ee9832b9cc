"""What is fuzzed: each reader of what may be hostile, as a function of bytes that may raise its own errors only."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from foreign_cases import BOMBS, CALLS, WHOLE, call, held, stacked, whole_dcp, with_pickle
from manifest_cases import sealed
from safetensors.torch import save as save_safetensors

from distckpt import manifest, pickles, values
from distckpt.dcp_folders import read_dcp
from distckpt.errors import CheckpointDamagedError, FormatVersionError, StorageError, UnsafeFileError
from distckpt.foreign import load_pickled, load_tensors
from distckpt.names import checked
from distckpt.outline import outline
from distckpt.safetensors import ITEM_BYTES

OUTLINED = ("step", "run", "attempt", "layout", "world_size", "created", "metrics", "num_bytes")
REFUSALS = (CheckpointDamagedError, UnsafeFileError)


def fuzz_manifest(data: bytes) -> None:
    """Parse bytes as they are, and again under a right digest; what is let through is consistent."""
    for text in (data, sealed(data) if data.endswith(b"}") else sealed(data + b"}")):
        try:
            brief = outline(text, path="p")
        except (CheckpointDamagedError, FormatVersionError):
            brief = None
        try:
            found = manifest.parse(text, path="p")
        except (CheckpointDamagedError, FormatVersionError):
            continue
        assert brief is not None
        assert all(repr(getattr(brief, name)) == repr(getattr(found, name)) for name in OUTLINED)
        assert all(checked(file.name) for file in found.files)
        assert all(len(entry.shape) <= 64 for entry in found.tensors.values())
        assert sum(entry.num_bytes for entry in found.tensors.values()) <= found.num_bytes
        for entry in found.tensors.values():
            for chunk in entry.chunks:
                end = chunk.offset + ITEM_BYTES[entry.dtype] * _product(chunk.shape)
                assert end <= found.files[chunk.file].num_bytes


def _product(sizes: tuple[int, ...]) -> int:
    return functools.reduce(lambda one, other: one * other, sizes, 1)


def fuzz_values(data: bytes) -> None:
    """Decode JSON as a tree; what it stands for can be encoded again."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return
    try:
        values.decode(tree, lambda tag, name: (tag, name))
    except ValueError:
        return


def fuzz_safetensors(data: bytes) -> None:
    try:
        found = load_tensors(data, path="p")
    except CheckpointDamagedError:
        return
    assert sum(tensor.untyped_storage().nbytes() for tensor in found.values()) <= 2 * len(data)


def fuzz_pickles(data: bytes) -> None:
    try:
        found = pickles.inspect(data)
    except ValueError:
        return
    assert found.end <= len(data)


def fuzz_torch(data: bytes) -> None:
    """Open bytes as a file of torch.save, and as the pickle in one."""
    for file in (data, with_pickle(data)):
        try:
            load_pickled(file, path="p")
        except REFUSALS:
            continue


@functools.cache
def _dcp_folder() -> tuple[Path, bytes]:
    """Return a folder of DCP's, and its metadata as they were before anybody wrote others there."""
    folder = whole_dcp(Path(tempfile.mkdtemp(prefix="distckpt-fuzz-")))
    return folder, (folder / ".metadata").read_bytes()


def fuzz_dcp(data: bytes) -> None:
    folder, _ = _dcp_folder()
    (folder / ".metadata").write_bytes(data)
    try:
        read_dcp(folder)
    except (*REFUSALS, StorageError):
        return


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": fuzz_manifest,
    "values": fuzz_values,
    "safetensors": fuzz_safetensors,
    "pickles": fuzz_pickles,
    "torch": fuzz_torch,
    "dcp": fuzz_dcp,
}


def seeds(target: str) -> list[bytes]:
    """Return inputs to begin with: a good one, and each kind of bad one."""
    if target == "manifest":
        body = {
            **{"attempt": "a", "config": None, "created": 1.5, "format": 1, "layout": "full", "metrics": {"x": "nan"}},
            **{"parent": None, "run": "r", "step": 1, "timings": {}, "versions": {}, "world_size": 1, "writer": {}},
            "files": [{"bytes": 24, "name": "a/f", "rank": 0, "segments": [[8, "0" * 32], [16, "1" * 32]]}],
            "objects": {"x": {"kind": "value", "per_rank": False, "trees": [{"$tensor": "t"}]}},
            "tensors": {"t": {"chunks": [[0, 8, [0], [1]], [0, 12, [1], [3]]], "dtype": "F32", "shape": [4]}},
        }
        files = [{**body["files"][0], "name": f"a/{n}", "rank": n} for n in range(6)]
        table = {
            "t": {"chunks": [[0, 0, [0, 0], [1, 2], [[1, 2, 1], [0, 3, 2]]]], "dtype": "U8", "shape": [3, 4]},
            "u": {"chunks": [[1, 8, [0], [1]], [2, 2, [1], [1], [[0, 3, 1]]]], "dtype": "F32", "shape": [4]},
        }
        with_runs = {**body, "format": 2, "files": files, "tensors": table}
        texts = [json.dumps(each, sort_keys=True, separators=(",", ":")).encode() for each in (body, with_runs)]
        return [*texts, *map(sealed, texts)]
    if target == "values":
        trees = ({"$dict": [[1, {"$tuple": [1.5]}]]}, {"$numpy": ["float32", "1.5"]}, {"$bytes": "AA=="})
        more = ({"$float": "nan"}, {"$counter": [["a", 1]]}, {"$tensor": "t"}, [{"a": None}], {"$numpy": ["int8", 3]})
        return [json.dumps(tree).encode() for tree in (*trees, *more)]
    if target == "safetensors":
        import torch

        tensors = {"a": torch.ones(2, 3), "b": torch.zeros(0, dtype=torch.bfloat16), "c": torch.tensor(1)}
        return [save_safetensors(tensors), save_safetensors({}, metadata={"x": "y"})]
    calls = [held(call(*arguments)) for arguments in list(CALLS.values())[:8]]
    bombs = [bomb for bomb in BOMBS.values() if len(bomb) < 1000]
    if target == "dcp":
        _, whole = _dcp_folder()
        return [whole, *(stacked(*arguments) for arguments in list(CALLS.values())[:8]), *bombs]
    import zipfile

    with zipfile.ZipFile(io.BytesIO(WHOLE)) as archive:
        inner = next(archive.read(info) for info in archive.infolist() if info.filename.endswith("data.pkl"))
    return [inner, *calls, *bombs]

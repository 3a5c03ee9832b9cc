"""Weights in the formats of other tools, read without running code: safetensors, torch.save's, and DCP's.

Invariant: a pickle is opened by torch's weights-only unpickler, or by one that knows just DCP's own few record types.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_with_dcp

from distckpt.errors import CheckpointDamagedError, StateMismatchError, StorageError, UnsafeFileError
from distckpt.storage import open_storage

PICKLED = (".pt", ".pth", ".tar", ".bin", ".ckpt")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "state_dict.", "model_state_dict.")


def is_foreign_file(path: str) -> bool:
    """Say whether a path names a single file of another tool.

    Ranks: any.
    """
    return path.endswith((".safetensors", *PICKLED))


def is_dcp(path: str | os.PathLike[str]) -> bool:
    """Say whether a local path is a directory that DCP wrote.

    Ranks: any.
    """
    return "://" not in str(path) and (Path(path).expanduser() / ".metadata").is_file()


def read_file(path: str, *, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a `.safetensors` file, or one that torch.save wrote, holds; tensors on the CPU.

    Raises:
        UnsafeFileError: It is a pickle of more than tensors and plain values.
        CheckpointDamagedError: It cannot be read as what its name says.
        StorageError: There is no such file, or it cannot be read.

    Ranks: any.
    """
    folder, _, name = path.rpartition("/")
    storage = open_storage(folder or ".", storage_options=storage_options)
    try:
        data = storage.read_all(name, limit_bytes=1 << 40)
    except FileNotFoundError as error:
        raise StorageError(path=path, action="read", cause="there is no such file") from error
    if name.endswith(".safetensors"):
        try:
            return dict(load_safetensors(data))
        except SafetensorError as error:
            raise CheckpointDamagedError(path=path, problem=f"is no whole safetensors file: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about old pickle protocols, of which the error says enough
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = str(error).partition("\n")[0]
        raise UnsafeFileError(
            path=path,
            problem=f"it holds more than tensors and plain values ({asked:.200})",
            fix="where you trust it, load it with torch.load(weights_only=False) and save model.state_dict() alone",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointDamagedError(path=path, problem=f"is no whole file of torch.save: {error}") from error
    if not isinstance(content, dict):
        raise StateMismatchError(
            path=path, step=0, problems=[f"it holds a {type(content).__name__}, not a dict of weights"]
        )
    return content


class _RecordUnpickler(pickle.Unpickler):
    """Opens DCP's `.metadata`: only its own record types, torch's dtypes and sizes, and paths."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return {str(layout): layout for layout in (torch.strided,)}.__getitem__
        known = _RECORDS.get((module, name))
        if known is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known


_RECORDS: dict[tuple[str, str], Any] = {
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
            *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,
    ("pathlib", "PurePosixPath"): PurePosixPath,
}


class _SafeReader(FileSystemReader):
    """DCP's own reader, but for the metadata, which it would unpickle whatever is in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        return read_dcp_metadata(cast(Path, self.path))


def read_dcp_metadata(folder: Path) -> metadata.Metadata:
    """Return the metadata of a directory that DCP wrote.

    Raises:
        UnsafeFileError: It holds something else than DCP's records, or names files outside the directory.
        CheckpointDamagedError: It is not whole.

    Ranks: any.
    """
    path = folder / ".metadata"
    try:
        found = _RecordUnpickler(io.BytesIO(path.read_bytes())).load()
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(path=str(path), problem=str(error)) from error
    except (EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointDamagedError(path=str(folder), file=".metadata", problem=f"is not whole: {error}") from error
    if not isinstance(found, metadata.Metadata):
        raise UnsafeFileError(path=str(path), problem=f"it holds a {type(found).__name__}")
    for info in (found.storage_data or {}).values():
        relative = str(info.relative_path)
        if "/" in relative or relative.startswith("."):
            raise UnsafeFileError(path=str(path), problem=f"it names the file {relative!r} outside the directory")
    found.storage_meta = metadata.StorageMeta()
    return found


def read_dcp(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return every tensor of a local directory that DCP wrote, by its flat name, on the CPU; values are left out.

    Raises:
        UnsafeFileError: Its metadata holds more than DCP's records.
        CheckpointDamagedError: It is not whole.

    Ranks: any.
    """
    folder = Path(path).expanduser()
    found = read_dcp_metadata(folder)
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.state_dict_metadata.items()
        if isinstance(entry, metadata.TensorStorageMetadata)
    }
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is asked to be
            load_with_dcp(tensors, storage_reader=_SafeReader(folder), planner=planner, no_dist=True)
    except Exception as error:
        raise CheckpointDamagedError(path=str(path), problem=f"cannot be read: {error}") from error
    except BaseException as error:
        if type(error).__name__ == "CheckpointException":  # DCP's own, which is no Exception
            raise CheckpointDamagedError(path=str(path), problem=f"cannot be read: {error}") from error
        raise
    return tensors


def find_weights(
    content: Mapping[str, Any], expected: set[str], *, key: str | None, path: str
) -> dict[str, torch.Tensor]:
    """Return, from what a file holds, the dict of tensors that fits a model's names best.

    Looks at the dict itself, at dicts in it, and at names below a common prefix; drops what wrappers add to names.

    Args:
        content: What the file holds.
        expected: The names in the model's state dict.
        key: Where the weights stand in it; None finds out.
        path: The file, for errors.

    Raises:
        StateMismatchError: Nothing in it fits a single name.

    Ranks: any.
    """
    candidates: list[Mapping[str, Any]] = []
    if key is not None:
        inner = content.get(key)
        below = {name.removeprefix(f"{key}."): item for name, item in content.items() if name.startswith(f"{key}.")}
        candidates = [inner if isinstance(inner, Mapping) else below]
    else:
        candidates = [content, *(item for item in content.values() if isinstance(item, Mapping))]
    best: dict[str, torch.Tensor] = {}
    for candidate in candidates:
        tensors = {str(name): item for name, item in candidate.items() if isinstance(item, torch.Tensor)}
        for stripped in _without_wrappers(tensors):
            if len(stripped.keys() & expected) > len(best.keys() & expected):
                best = stripped
    if not best:
        where = f"at {key!r} " if key is not None else ""
        raise StateMismatchError(
            path=path,
            step=0,
            problems=[f"no name {where}fits the model: it has {sorted(map(str, content))[:5]}"],
            fix='say where the weights stand: load_weights(path, model, key="...")',
        )
    return best


def _without_wrappers(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return the tensors under their names, and under those without one, two, ... common prefixes."""
    forms = [dict(tensors)]
    seen = True
    while seen:
        seen = False
        for prefix in _WRAPPERS:
            last = forms[-1]
            if any(name.startswith(prefix) for name in last):
                forms.append({n.removeprefix(prefix): t for n, t in last.items() if n.startswith(prefix)})
                seen = True
                break
    return forms

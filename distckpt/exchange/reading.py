"""Reading what other tools wrote, whole, to host memory, without running any of it.

Invariant: safetensors files are parsed by their own library, pickles opened by `foreign` and `dcp_folders` alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from distckpt.dcp_folders import is_dcp, read_dcp
from distckpt.errors import CheckpointDamagedError, StateMismatchError, StorageError, UnsafeFileError
from distckpt.exchange import record as records
from distckpt.exchange.dcp_values import read_dcp_values
from distckpt.exchange.record import Record
from distckpt.exchange.tensor_files import INDEX
from distckpt.foreign import load_pickled

MAX_INDEX_BYTES = 1 << 30
Recognized = Literal["torch", "safetensors", "dcp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """Flat tensors by name, and the record that stood beside them."""

    tensors: dict[str, torch.Tensor]
    record: Record | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpContent:
    """What a folder of DCP's holds.

    Attributes:
        nested: Tensors and values as they were nested.
        record: The record that stood beside them.
    """

    nested: dict[str, Any]
    record: Record | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor in it by its dotted path.

        Ranks: any.
        """
        return dict(_tensors(self.nested, ""))


def parse_record(text: object) -> Record | None:
    """Return the record that a text holds, if it is one.

    Ranks: any.
    """
    return records.read(text)


def recognized(path: Path) -> Recognized:
    """Return which tool wrote what lies at a path, by what it looks like.

    Raises:
        StorageError: It is not known, or cannot be read.

    Ranks: any.
    """
    if is_dcp(path):
        return "dcp"
    if path.is_dir():
        if (path / INDEX).is_file() or any(path.glob("*.safetensors")):
            return "safetensors"
        raise StorageError(
            path=str(path),
            action="import",
            cause="it is a directory with neither DCP's .metadata nor a .safetensors file",
            fix="name the file itself; a distckpt checkpoint is copied by `distckpt cp`",
        )
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise StorageError(path=str(path), action="read", cause=error.strerror or str(error)) from error
    return "safetensors" if path.suffix == ".safetensors" or head[8:9] == b"{" else "torch"


def safetensors(path: Path) -> Tensors:
    """Return what a safetensors file, or a folder of them, holds.

    Raises:
        CheckpointDamagedError: It is not whole, or a tensor stands in two files.
        StorageError: It cannot be read.

    Ranks: any.
    """
    if not path.is_dir():
        return _safetensors_file(path)
    index = path / INDEX
    record = None
    if index.is_file():
        files, record = _index(index)
    else:
        files = sorted(file.name for file in path.glob("*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for name in files:
        found = _safetensors_file(path / name)
        twice = sorted(tensors.keys() & found.tensors.keys())
        if twice:
            raise CheckpointDamagedError(path=str(path), file=name, problem=f"has {twice[0]!r}, which another has too")
        tensors.update(found.tensors)
        record = record or found.record
    return Tensors(tensors=tensors, record=record)


def _index(path: Path) -> tuple[list[str], Record | None]:
    """Return the files that an index names, all in its own folder, and its record."""
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError("it is larger than a GiB")
        body = json.loads(path.read_bytes())
        files = sorted({str(name) for name in body["weight_map"].values()})
        record = records.read((body.get("metadata") or {}).get(records.KEY))
    except OSError as error:
        raise StorageError(path=str(path), action="read", cause=error.strerror or str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointDamagedError(path=str(path.parent), file=path.name, problem=f"is no index: {error}") from error
    for name in files:
        if "/" in name or name.startswith("."):
            raise UnsafeFileError(path=str(path), problem=f"it names the file {name!r:.80} outside its directory")
        if not (path.parent / name).is_file():
            raise CheckpointDamagedError(path=str(path.parent), file=name, problem="is missing")
    return files, record


def _safetensors_file(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        for name in json.loads(metadata.get(records.COMPLEX, "[]")):
            tensors[name] = torch.view_as_complex(tensors[name].contiguous())
    except OSError as error:
        raise StorageError(path=str(path), action="read", cause=error.strerror or str(error)) from error
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        problem = f"is no whole safetensors file: {error!s:.300}"
        raise CheckpointDamagedError(path=str(path), problem=problem) from error
    return Tensors(tensors=tensors, record=records.read(metadata.get(records.KEY)))


def torch_file(path: Path) -> Mapping[str, Any]:
    """Return the dict that torch.save wrote.

    Raises:
        UnsafeFileError: It holds more than tensors and plain values.
        CheckpointDamagedError: It is not whole.
        StateMismatchError: It holds something else than a dict.
        StorageError: It cannot be read.

    Ranks: any.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(path=str(path), action="read", cause=error.strerror or str(error)) from error
    content = load_pickled(data, path=str(path))
    if not isinstance(content, dict):
        raise StateMismatchError(path=str(path), step=0, problems=[f"it holds a {type(content).__name__}, not a dict"])
    return content


def dcp(path: Path) -> DcpContent:
    """Return what a folder of DCP's holds, tensors and values.

    Raises:
        UnsafeFileError: It holds more than DCP's records, tensors and plain values.
        CheckpointDamagedError: It is not whole.
        StorageError: It cannot be read.

    Ranks: any.
    """
    values, places = read_dcp_values(path)
    nested = _Level()
    for name, item in {**read_dcp(path), **values}.items():
        _place(nested, places.get(name, (name,)), item, path)
    opened = {str(key): _as_optimizer(_opened(item)) for key, item in nested.items()}
    return DcpContent(nested=opened, record=records.read(values.get(records.KEY)))


class _Level(dict[Any, Any]):
    """A container that is being put together, as opposed to a value that is a dict."""


def _place(nested: _Level, place: tuple[Any, ...], item: Any, path: Path) -> None:
    level = nested
    for part in place[:-1]:
        level = level.setdefault(part, _Level())
        if not isinstance(level, _Level):
            raise CheckpointDamagedError(path=str(path), file=".metadata", problem=f"places two items at {place!r:.80}")
    level[place[-1]] = item


def _opened(item: Any) -> Any:
    """Return what was put together: dicts, and lists where DCP counted; empty containers it had dropped."""
    if not isinstance(item, _Level):
        return item
    if all(type(part) is int for part in item):
        return [_opened(item[index]) for index in sorted(item)]
    return {str(part): _opened(inner) for part, inner in item.items()}


def _as_optimizer(item: Any) -> Any:
    """Return an optimizer's state as its `state_dict` had it: DCP makes numbers text, and drops an empty dict."""
    if not (isinstance(item, dict) and "param_groups" in item and item.keys() <= {"state", "param_groups"}):
        return item
    state = item.get("state", {})
    if isinstance(state, dict) and all(isinstance(name, str) and name.isdecimal() for name in state):
        state = {int(name): inner for name, inner in sorted(state.items(), key=lambda pair: int(pair[0]))}
    return {"state": state, "param_groups": item["param_groups"]}


def _tensors(item: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(item, torch.Tensor):
        yield name, item
    elif isinstance(item, dict):
        for key, inner in item.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(item, (list, tuple)):
        for index, inner in enumerate(item):
            yield from _tensors(inner, f"{name}.{index}")

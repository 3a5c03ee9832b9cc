"""Folders that DCP wrote, read without DCP: its `.metadata` is a pickle, and so is every tensor in its data files.

Invariant: unpickling `.metadata` makes nothing but records of its own kinds, new classes for each reading, so that what
it does to them touches nothing else; what they say is checked before it is used; nothing outside the folder is read.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distckpt.errors import CheckpointDamagedError, DistckptError, StorageError, UnsafeFileError
from distckpt.foreign import load_pickled
from distckpt.pickles import OversizedPickleError, inspect
from distckpt.tiling import tiles

METADATA = ".metadata"
MAX_METADATA_BYTES = 1 << 30

_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    **{
        (_METADATA, name): name
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
            *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): "_StorageInfo",
    ("pathlib", "PosixPath"): "Path",
    ("pathlib._local", "PosixPath"): "Path",
    ("pathlib", "PurePosixPath"): "Path",
}
_MAX_DIMS = 64
_Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A box of a tensor, and where DCP put it: a file of torch.save's inside a data file."""

    start: _Shape
    shape: _Shape
    file: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    dtype: torch.dtype
    shape: _Shape
    pieces: tuple[_Piece, ...]


def is_dcp(path: str | os.PathLike[str]) -> bool:
    """Say whether a local path is a directory that DCP wrote.

    Ranks: any.
    """
    return "://" not in str(path) and (Path(path).expanduser() / METADATA).is_file()


def read_dcp(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return every tensor of a local directory that DCP wrote, by its flat name, on the CPU; values are left out.

    Raises:
        UnsafeFileError: It holds more than DCP's records and tensors, or points outside the directory.
        CheckpointDamagedError: It is not whole.
        StorageError: It could not be read.

    Ranks: any.
    """
    folder = Path(path).expanduser()
    shown = str(path)
    try:
        found = _parse(_read(folder, METADATA, shown), folder, shown)
        tensors = {name: _whole(folder, name, entry, shown) for name, entry in found.items()}
    except DistckptError:
        raise
    except OSError as error:
        raise StorageError(path=shown, action="read", cause=str(error), errno=error.errno) from error
    except (MemoryError, RecursionError) as error:
        raise UnsafeFileError(path=shown, problem=f"it asks for too much ({type(error).__name__})") from error
    except Exception as error:  # records that were tampered with make anything raise
        raise CheckpointDamagedError(path=shown, file=METADATA, problem=f"is not whole: {error!s:.300}") from error
    return tensors


class _Record:
    """What stands for an object of DCP's: what it was made with, and its state; it does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> _Record:
        made = super().__new__(cls)
        made.__dict__["args"] = args
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


class _RecordUnpickler(pickle.Unpickler):
    """Makes records, torch's dtypes and tuples of numbers, and nothing else.

    The classes are this reading's own: a pickle can set attributes of any class that it is given.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.kinds: dict[str, Any] = {name: type(name, (_Record,), {}) for name in {*_RECORDS.values()}}
        self._size = type("Size", (tuple,), {"__slots__": ()})

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return self._size
        if (module, name) == ("torch.serialization", "_get_layout"):
            return {str(layout): layout for layout in (torch.strided,)}.__getitem__
        known = _RECORDS.get((module, name))
        if known is None:
            raise pickle.UnpicklingError(f"it asks for {module:.80}.{name:.80}")
        return self.kinds[known]


def _parse(data: bytes, folder: Path, shown: str) -> dict[str, _Tensor]:
    """Return the tensors that `.metadata` tells of, everything about them checked.

    Raises:
        UnsafeFileError: It holds something else than DCP's records, or names files outside the directory.
        CheckpointDamagedError: It contradicts itself or the directory.
        Exception: Whatever malformed records lead to.
    """
    path = str(Path(shown) / METADATA)
    try:
        inspect(data)
        unpickler = _RecordUnpickler(data)
        found = unpickler.load()
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(path=path, problem=str(error)) from error
    except OversizedPickleError as error:
        raise UnsafeFileError(path=path, problem=str(error)) from error
    kinds = unpickler.kinds
    if type(found) is not kinds["Metadata"]:
        raise UnsafeFileError(path=path, problem=f"it holds a {type(found).__name__:.80}")
    stored = {}
    for index, info in found.state["storage_data"].items():
        key = index.state if type(index) is kinds["MetadataIndex"] else {}
        if type(info) is kinds["_StorageInfo"] and isinstance(key.get("fqn"), str) and key.get("offset") is not None:
            stored[key["fqn"], _numbers(key["offset"])] = info.state
    tensors = {}
    for name, entry in found.state["state_dict_metadata"].items():
        if type(entry) is kinds["TensorStorageMetadata"]:
            tensors[_text(name)] = _tensor(_text(name), entry.state, stored, path)
    _check_sizes(tensors, folder, shown)
    return tensors


def _tensor(name: str, state: Any, stored: Mapping[tuple[str, _Shape], Any], path: str) -> _Tensor:
    dtype = state["properties"].state[0]
    shape = _numbers(state["size"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r:.80} has no dtype")
    pieces = []
    for chunk in state["chunks"]:
        start, size = _numbers(chunk.state["offsets"]), _numbers(chunk.state["sizes"])
        info = stored[name, start]
        if info.get("transform_descriptors"):
            raise UnsafeFileError(path=path, problem=f"{name!r:.80} is stored through an extension of DCP's")
        piece = _Piece(
            start=start,
            shape=size,
            file=_inside(info["relative_path"], path),
            offset=_number(info["offset"]),
            num_bytes=_number(info["length"]),
        )
        if math.prod(size) * dtype.itemsize > piece.num_bytes:
            raise ValueError(f"a part of {name!r:.80} is larger than what is stored of it")
        pieces.append(piece)
    if not tiles(shape, [(piece.start, piece.shape) for piece in pieces]):
        raise ValueError(f"the parts of {name!r:.80} overlap, or are not all of it")
    return _Tensor(dtype=dtype, shape=shape, pieces=tuple(pieces))


def _check_sizes(tensors: Mapping[str, _Tensor], folder: Path, shown: str) -> None:
    """Refuse what reaches behind the end of its file, and what is stored once and told of many times."""
    pieces = [piece for tensor in tensors.values() for piece in tensor.pieces]
    sizes: dict[str, int] = {}
    for name in sorted({piece.file for piece in pieces}):
        fd = _open(folder, name, shown)
        sizes[name] = os.fstat(fd).st_size
        os.close(fd)
    for piece in pieces:
        if piece.offset + piece.num_bytes > sizes[piece.file]:
            raise CheckpointDamagedError(path=shown, file=piece.file, problem="is shorter than its tensors")
    if sum(piece.num_bytes for piece in pieces) > sum(sizes.values()):
        raise ValueError("its tensors overlap in their files")


def _whole(folder: Path, name: str, entry: _Tensor, shown: str) -> torch.Tensor:
    """Return a tensor, put together from its pieces."""
    whole = torch.empty(entry.shape, dtype=entry.dtype)
    for piece in entry.pieces:
        data = _read(folder, piece.file, shown, offset=piece.offset, num_bytes=piece.num_bytes)
        part = load_pickled(data, path=str(Path(shown) / piece.file))
        if not isinstance(part, torch.Tensor) or (tuple(part.shape), part.dtype) != (piece.shape, entry.dtype):
            raise CheckpointDamagedError(path=shown, file=piece.file, problem=f"holds something else for {name!r:.80}")
        place = tuple(slice(start, start + size) for start, size in zip(piece.start, piece.shape, strict=True))
        whole[place] = part
    return whole


def _open(folder: Path, name: str, shown: str) -> int:
    """Open a regular file that lies in the folder itself; a link is none, and a pipe does not hang this."""
    try:
        fd = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointDamagedError(path=shown, file=name, problem="is missing") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UnsafeFileError(path=shown, problem=f"{name!r} in it is no regular file")
    return fd


def _read(folder: Path, name: str, shown: str, *, offset: int = 0, num_bytes: int | None = None) -> bytes:
    with open(_open(folder, name, shown), "rb") as file:
        if num_bytes is None:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes > MAX_METADATA_BYTES:
                raise UnsafeFileError(path=shown, problem=f"{name!r} in it has {num_bytes:,} bytes")
        file.seek(offset)
        return file.read(num_bytes)


def _inside(name: Any, path: str) -> str:
    """Return a file's name if it is one, of a file in the folder itself."""
    if not isinstance(name, str) or not name or "/" in name or "\0" in name or name.startswith("."):
        raise UnsafeFileError(path=path, problem=f"it names the file {name!r:.80} outside the directory")
    return name


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is no text")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r:.80} is no number from 0 on")
    return value


def _numbers(value: Any) -> _Shape:
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMS:
        raise ValueError(f"{value!r:.80} is no shape")
    return tuple(_number(item) for item in value)

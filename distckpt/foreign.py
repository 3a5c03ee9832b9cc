"""Weights in the formats of other tools, read without running code: safetensors, and torch.save's.

Invariant: a pickle is opened by torch's weights-only unpickler alone, and only after it was found to stay about as
small as it is; what comes out takes no more memory than a few times the file.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from distckpt.errors import CheckpointDamagedError, StateMismatchError, StorageError, UnsafeFileError
from distckpt.pickles import OversizedPickleError, inspect
from distckpt.storage import open_storage

PICKLED = (".pt", ".pth", ".tar", ".bin", ".ckpt")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "state_dict.", "model_state_dict.")

_LEGACY_PICKLES = 5  # a file of torch.save's old format begins with so many
_GROWING = {"builtins.bytearray", "__builtin__.bytearray"}  # makes room for whatever number it is given
_ZIP_END = struct.Struct("<4s4H2LH")
_ZIP64_LOCATOR = struct.Struct("<4sLQL")
_ZIP64_END = struct.Struct("<4sQ2H2L4Q")


def is_foreign_file(path: str) -> bool:
    """Say whether a path names a single file of another tool.

    Ranks: any.
    """
    return path.endswith((".safetensors", *PICKLED))


def read_file(path: str, *, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a `.safetensors` file, or one that torch.save wrote, holds; tensors on the CPU.

    Raises:
        UnsafeFileError: It is a pickle of more than tensors and plain values, or one that would grow without bounds.
        CheckpointDamagedError: It cannot be read as what its name says.
        StateMismatchError: It holds something else than a dict.
        StorageError: There is no such file, or it cannot be read.

    Ranks: any.
    """
    # The user names this file: a link may lead to it, as caches of downloads have it.
    real = path if "://" in path else str(Path(path).expanduser().resolve())
    folder, _, name = real.rpartition("/")
    storage = open_storage(folder or ("/" if real.startswith("/") else "."), storage_options=storage_options)
    try:
        data = storage.read_all(name, limit_bytes=1 << 40)
    except FileNotFoundError as error:
        raise StorageError(path=path, action="read", cause="there is no such file") from error
    except ValueError as error:  # no name that a storage takes
        data = _read_odd_name(real, path, error)
    if path.endswith(".safetensors"):
        return load_tensors(data, path=path)
    content = load_pickled(data, path=path)
    if not isinstance(content, dict):
        raise StateMismatchError(
            path=path, step=0, problems=[f"it holds a {type(content).__name__}, not a dict of weights"]
        )
    return content


def _read_odd_name(real: str, path: str, error: ValueError) -> bytes:
    """Return a local file whose name has spaces or the like, which distckpt itself would not give."""
    if "://" in path:
        raise StorageError(path=path, action="read", cause=str(error)) from error
    try:
        if not os.path.isfile(real):  # noqa: PTH113  a pipe must not hang us
            raise StorageError(path=path, action="read", cause="there is no such file")
        return Path(real).read_bytes()
    except (OSError, ValueError) as failed:
        raise StorageError(path=path, action="read", cause=str(failed)) from failed


def load_tensors(data: bytes, *, path: str) -> dict[str, Any]:
    """Return what a safetensors file holds, on the CPU.

    Raises:
        CheckpointDamagedError: It is not whole.

    Ranks: any.
    """
    try:
        return dict(load_safetensors(data))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointDamagedError(path=path, problem=f"is no whole safetensors file: {error!s:.300}") from error


def load_pickled(data: bytes, *, path: str) -> Any:
    """Return what torch.save wrote, tensors on the CPU.

    Raises:
        UnsafeFileError: It holds more than tensors and plain values, or would grow far beyond its size.
        CheckpointDamagedError: It is not whole.

    Ranks: any.
    """
    try:
        _check_growth(data, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats and odd tensors, of which the error says enough
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = str(error).partition("\n")[0]
        raise UnsafeFileError(
            path=path,
            problem=f"it holds more than tensors and plain values ({asked:.200})",
            fix="where you trust it, load it with torch.load(weights_only=False) and save model.state_dict() alone",
        ) from error
    except UnsafeFileError:
        raise
    except (MemoryError, RecursionError) as error:
        raise UnsafeFileError(path=path, problem=f"it asks for too much ({type(error).__name__})") from error
    except Exception as error:  # a pickle that was tampered with makes torch's own code raise anything
        raise CheckpointDamagedError(path=path, problem=f"is no whole file of torch.save: {error!s:.300}") from error


def _check_growth(data: bytes, path: str) -> None:
    """Refuse what becomes far more than it is when it is opened.

    Raises:
        UnsafeFileError: It would.
        ValueError: It is malformed.
        zipfile.BadZipFile: Likewise.
    """
    asked: set[str] = set()
    try:
        if data[:4] == b"PK\x03\x04":
            for found in _zipped_pickles(data, path):
                asked |= inspect(found).names
        else:
            end = 0
            for index in range(_LEGACY_PICKLES):
                inspection = inspect(data, end)
                asked |= inspection.names
                end = inspection.end
                if index == 0 and asked:  # no file of torch.save's: a pickle of something, which torch refuses
                    break
    except OversizedPickleError as error:
        raise UnsafeFileError(path=path, problem=str(error)) from error
    if asked & _GROWING:
        raise UnsafeFileError(
            path=path,
            problem="it holds a bytearray, which can ask for any amount of memory",
            fix="save model.state_dict() alone",
        )


def _zipped_pickles(data: bytes, path: str) -> list[bytes]:
    """Return the pickles in a zip archive that is written as torch.save does: nothing compressed, nothing twice.

    Raises:
        UnsafeFileError: Something is; it could become any size.
        zipfile.BadZipFile: It is no whole archive, or two readers could see two things in it.
    """
    _check_end(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise UnsafeFileError(
                path=path,
                problem="it is compressed, which torch.save does not do, and could become any size",
                fix="where you trust it, load it with torch.load and save model.state_dict() anew",
            )
        if sum(member.file_size for member in members) > len(data):
            raise UnsafeFileError(path=path, problem="its parts overlap, so that it could become any size")
        if any(member.orig_filename != member.filename for member in members):
            raise zipfile.BadZipFile("a name in it is cut short")
        return [archive.read(member) for member in members if member.filename.lower().endswith(".pkl")]


def _check_end(data: bytes) -> None:
    """Refuse an archive whose table of contents different readers would look for at different places."""
    if len(data) < _ZIP_END.size:
        raise zipfile.BadZipFile("it ends too early")
    mark, *_, table_bytes, table, comment_bytes = _ZIP_END.unpack(data[-_ZIP_END.size :])
    behind = _ZIP_END.size
    locator_at = len(data) - behind - _ZIP64_LOCATOR.size
    if locator_at >= 0 and data[locator_at : locator_at + 4] == b"PK\x06\x07":
        _, _, end_at, _ = _ZIP64_LOCATOR.unpack_from(data, locator_at)
        behind += _ZIP64_LOCATOR.size + _ZIP64_END.size
        if end_at != len(data) - behind or data[end_at : end_at + 4] != b"PK\x06\x06":
            raise zipfile.BadZipFile("its end is malformed")
        *_, table_bytes, table = _ZIP64_END.unpack_from(data, end_at)
    if mark != b"PK\x05\x06" or comment_bytes or table + table_bytes + behind != len(data):
        raise zipfile.BadZipFile("its end is malformed")


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
        below = {
            name.removeprefix(f"{key}."): item for name, item in content.items() if str(name).startswith(f"{key}.")
        }
        candidates = [inner if isinstance(inner, Mapping) else below]
    else:
        candidates = [content, *(item for item in content.values() if isinstance(item, Mapping))]
    best: dict[str, torch.Tensor] = {}
    for candidate in candidates:
        tensors = {n: item for n, item in candidate.items() if isinstance(n, str) and isinstance(item, torch.Tensor)}
        for stripped in _without_wrappers(tensors):
            if len(stripped.keys() & expected) > len(best.keys() & expected):
                best = stripped
    if not best:
        where = f"at {key!r} " if key is not None else ""
        raise StateMismatchError(
            path=path,
            step=0,
            problems=[f"no name {where}fits the model: it has {sorted(f'{name!s:.80}' for name in content)[:5]}"],
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

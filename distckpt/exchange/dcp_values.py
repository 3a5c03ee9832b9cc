"""The values of a folder that DCP wrote, and how its flat names were nested: what `dcp_folders` leaves out.

Invariant: as there: nothing but records is made of `.metadata`, and values are opened by torch's weights-only one.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from distckpt import dcp_folders
from distckpt.errors import CheckpointDamagedError, DistckptError, StorageError, UnsafeFileError
from distckpt.foreign import load_pickled
from distckpt.pickles import inspect

Paths = dict[str, tuple[str | int, ...]]


def read_dcp_values(path: Path) -> tuple[dict[str, Any], Paths]:
    """Return every value that is no tensor by its flat name, and the path that each flat name stands for.

    Raises:
        UnsafeFileError: It holds more than DCP's records, tensors and plain values, or points outside the directory.
        CheckpointDamagedError: It is not whole.
        StorageError: It could not be read.

    Ranks: any.
    """
    try:
        return _read(path)
    except DistckptError:
        raise
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(path=str(path), problem=str(error)) from error
    except OSError as error:
        raise StorageError(path=str(path), action="read", cause=str(error), errno=error.errno) from error
    except (MemoryError, RecursionError) as error:
        raise UnsafeFileError(path=str(path), problem=f"it asks for too much ({type(error).__name__})") from error
    except Exception as error:  # records that were tampered with make anything raise
        problem = f"is not whole: {error!s:.300}"
        raise CheckpointDamagedError(path=str(path), file=dcp_folders.METADATA, problem=problem) from error


def _read(folder: Path) -> tuple[dict[str, Any], Paths]:
    shown = str(folder)
    data = dcp_folders._read(folder, dcp_folders.METADATA, shown)
    inspect(data)
    unpickler = dcp_folders._RecordUnpickler(data)
    state = unpickler.load().state
    is_value = unpickler.kinds["BytesStorageMetadata"]
    values = {}
    for index, info in state["storage_data"].items():
        name = index.state["fqn"]
        if type(state["state_dict_metadata"].get(name)) is not is_value:
            continue
        file = dcp_folders._inside(info.state["relative_path"], shown)
        offset, length = (dcp_folders._number(info.state[fact]) for fact in ("offset", "length"))
        stored = dcp_folders._read(folder, file, shown, offset=offset, num_bytes=length)
        if len(stored) != length:
            raise CheckpointDamagedError(path=shown, file=file, problem=f"is too short for {name!r:.80}")
        values[str(name)] = load_pickled(stored, path=str(folder / file))
    return values, _paths(state.get("planner_data"))


def _paths(planned: Any) -> Paths:
    """Return what DCP's planner kept of the nesting; other planners keep other things, or nothing."""
    if not isinstance(planned, dict):
        return {}
    return {
        name: tuple(path)
        for name, path in planned.items()
        if isinstance(name, str) and isinstance(path, tuple) and path and all(type(part) in (str, int) for part in path)
    }

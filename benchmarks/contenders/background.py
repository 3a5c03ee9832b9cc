"""Contenders that save in the background: training waits for the start, and goes on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save

import distckpt
from benchmarks.ceilings import MemoryCopy, RawBytes
from benchmarks.contenders.synchronous import opened, torchsnapshot_objects
from benchmarks.disk import make_durable
from benchmarks.states import State
from benchmarks.team import Team


class BackgroundSaver(Protocol):
    """Saves one state, on all ranks together; is made outside of what is timed, and then has saved nothing yet."""

    def start(self, path: Path) -> None:
        """Begin a save to a path that is new; when this returns, training may go on."""

    def finish(self) -> None:
        """Return once what was begun is durable; called on another thread."""

    def close(self) -> None:
        """Give back what it holds."""


class Distckpt:
    """distckpt's manager with its defaults."""

    def __init__(self, state: State, team: Team) -> None:
        self._state = state
        self._manager: distckpt.CheckpointManager | None = None

    def start(self, path: Path) -> None:
        """Save as the manager's next checkpoint, which then stands at `path`."""
        if self._manager is None:
            self._manager = distckpt.CheckpointManager(path.parent, keep=1_000_000, signals=())
        self._manager.save(int(path.name.removeprefix("step-")), self._state.objects)

    def finish(self) -> None:
        """Wait for the commit."""
        if self._manager is not None:
            self._manager.wait()

    def close(self) -> None:
        """Close the manager."""
        if self._manager is not None:
            self._manager.close()


class RawCopyAndWrite:
    """The ceiling: one memory copy, then one direct write on a thread; no format, no digest, no commit."""

    def __init__(self, state: State, team: Team) -> None:
        tensors = list(state.tensors().values())
        self._copy = MemoryCopy(tensors)
        self._copy.copy()
        self._bytes = RawBytes(state.num_bytes // team.world_size)
        self._rank = team.rank
        self._path = Path()

    def start(self, path: Path) -> None:
        """Copy."""
        path.mkdir(exist_ok=True)
        self._path = path / f"rank-{self._rank}"
        self._copy.copy()

    def finish(self) -> None:
        """Write."""
        self._bytes.write_direct(self._path)

    def close(self) -> None:
        """Hold nothing."""


class DcpAsync:
    """torch.distributed.checkpoint's async_save: as it comes, with a kept stager and a cached plan, or in a process."""

    def __init__(self, state: State, team: Team, *, kept: bool = False, process: bool = False) -> None:
        self._state = state
        self._team = team
        self._path = Path()
        self._future: Future[Any] | None = None
        self._planner = DefaultSavePlanner(enable_plan_caching=True) if kept else None
        self._stager: DefaultStager | None = None
        self._kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        if kept:
            gpu = torch.cuda.is_available()
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=gpu,
                    use_shared_memory=process,
                    use_async_staging=False,
                    use_non_blocking_copy=gpu,
                )
            )

    def start(self, path: Path) -> None:
        """Stage, and hand over."""
        self._path = path
        found = async_save(
            self._state.tree(),
            checkpoint_id=path,
            planner=self._planner,
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        self._future = found.upload_completion if isinstance(found, AsyncSaveResponse) else found

    def finish(self) -> None:
        """Wait for its writer, which syncs its files, and sync the folders."""
        if self._future is not None:
            self._future.result()
            make_durable(self._path, part=self._team.rank, num_parts=self._team.world_size)

    def close(self) -> None:
        """Close the stager."""
        if self._stager is not None:
            self._stager.close()


class TorchsnapshotAsync:
    """torchsnapshot's async_take."""

    def __init__(self, state: State, team: Team) -> None:
        self._library = importlib.import_module("torchsnapshot")
        self._objects = torchsnapshot_objects(self._library, state)
        self._team = team
        self._path = Path()
        self._pending: Any = None

    def start(self, path: Path) -> None:
        """Copy."""
        self._path = path
        self._pending = self._library.Snapshot.async_take(str(path), self._objects, replicated=["**"])

    def finish(self) -> None:
        """Wait, then sync."""
        self._pending.wait()
        make_durable(self._path, part=self._team.rank, num_parts=self._team.world_size)

    def close(self) -> None:
        """Hold nothing."""


class TorchCheckpointingAsync:
    """torch_checkpointing with its process, staging before save() returns; its direct writes fail on ext4."""

    def __init__(self, state: State, team: Team) -> None:
        library = importlib.import_module("torch_checkpointing")
        files = importlib.import_module("torch_checkpointing.storage.filesystem")
        config = library.CheckpointManager.Config.with_async_save()
        config.storage_config = files.LocalFileSystemStorageConfig(use_direct_io=False)
        config.save.staging_config.use_async_staging = False
        self._manager = config.build()
        self._state = state
        self._team = team
        self._path = Path()
        self._future: Any = None

    def start(self, path: Path) -> None:
        """Stage to shared memory."""
        self._path = path
        self._future = self._manager.save(str(path), self._state.tree())

    def finish(self) -> None:
        """Wait for the process, then sync."""
        self._future.result()
        make_durable(self._path, part=self._team.rank, num_parts=self._team.world_size)

    def close(self) -> None:
        """End the process."""
        self._manager.close()


RAW = "raw copy and direct write"
BACKGROUND_SAVERS: Mapping[str, Callable[[State, Team], BackgroundSaver]] = {
    RAW: RawCopyAndWrite,
    "distckpt": Distckpt,
    "DCP async": DcpAsync,
    "DCP async, kept stager and plan": lambda state, team: DcpAsync(state, team, kept=True),
    "DCP async, process, shared memory": lambda state, team: DcpAsync(state, team, kept=True, process=True),
    "torchsnapshot": TorchsnapshotAsync,
    "torch_checkpointing": TorchCheckpointingAsync,
}


def openable(
    state: State, team: Team, only: list[str] | None = None
) -> tuple[dict[str, Callable[[State, Team], BackgroundSaver]], dict[str, str]]:
    """Return the makers of those that can be made here, and why each of the others cannot."""
    made, absent = opened(BACKGROUND_SAVERS, state, team, only)
    for each in made.values():
        each.close()
    return {name: BACKGROUND_SAVERS[name] for name in made}, absent

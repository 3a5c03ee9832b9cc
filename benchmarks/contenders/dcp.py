"""torch.distributed.checkpoint, as it comes and tuned."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.ceilings import NUM_THREADS
from benchmarks.disk import make_durable
from benchmarks.states import State
from benchmarks.team import Team


class Dcp:
    """A synchronous save: as it comes, or with its plan cached and several writing threads."""

    def __init__(self, state: State, team: Team, *, tuned: bool = False) -> None:
        self._state = state
        self._team = team
        self._tuned = tuned

    def save(self, path: Path) -> None:
        """Save; its writer syncs its files, and the folders are synced after it."""
        planner = DefaultSavePlanner(enable_plan_caching=True) if self._tuned else None
        writer = FileSystemWriter(path, thread_count=NUM_THREADS if self._tuned else 1)
        dcp_save(self._state.tree(), storage_writer=writer, planner=planner)
        make_durable(path, part=self._team.rank, num_parts=self._team.world_size)
        self._team.barrier()

    def load(self, path: Path) -> None:
        """Load into the tensors' own memory."""
        dcp_load(self._state.tree(), storage_reader=FileSystemReader(path))

    def other_loads(self) -> dict[str, Callable[[Path], object]]:
        """Return nothing: its reader has no settings that make it faster."""
        return {}

    def close(self) -> None:
        """Hold nothing."""


class DcpAsync:
    """async_save: as it comes, or tuned.

    Args:
        state: What it saves.
        team: The ranks.
        tuned: Whether it keeps its stager, with pinned memory for a GPU, caches its plan, and writes with threads.
        process: Whether it writes in a process, from shared memory.
    """

    def __init__(self, state: State, team: Team, *, tuned: bool = False, process: bool = False) -> None:
        self._state = state
        self._team = team
        self._tuned = tuned
        self._path = Path()
        self._future: Future[Any] | None = None
        self._planner = DefaultSavePlanner(enable_plan_caching=True) if tuned else None
        self._stager: DefaultStager | None = None
        self._kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        if tuned:
            on_gpu = state.device == "cuda"
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=on_gpu,
                    use_shared_memory=process,
                    use_async_staging=False,
                    use_non_blocking_copy=on_gpu,
                )
            )

    def prepare(self, directory: Path) -> None:
        """Have nothing to prepare."""

    def start(self, path: Path) -> None:
        """Stage, and hand over."""
        self._path = path
        found = async_save(
            self._state.tree(),
            checkpoint_id=path,
            # Without a stager of its own a writer would stage, too, and anew at every save.
            storage_writer=FileSystemWriter(path, thread_count=NUM_THREADS) if self._tuned else None,
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

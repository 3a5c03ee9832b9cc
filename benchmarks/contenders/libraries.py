"""torchsnapshot and torch_checkpointing, as they come and tuned."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.ceilings import NUM_THREADS
from benchmarks.disk import make_durable
from benchmarks.states import State
from benchmarks.team import Team


def torchsnapshot_objects(library: Any, state: State) -> dict[str, Any]:
    """Return the state as torchsnapshot takes it: plain dicts in a wrapper."""
    return {
        key: each if hasattr(each, "state_dict") else library.StateDict(**each) for key, each in state.objects.items()
    }


class Torchsnapshot:
    """torchsnapshot, its writing of replicated state shared by all ranks."""

    def __init__(self, state: State, team: Team) -> None:
        self._library = importlib.import_module("torchsnapshot")
        self._team = team
        self._objects = torchsnapshot_objects(self._library, state)

    def save(self, path: Path) -> None:
        """Take a snapshot, then sync it."""
        self._library.Snapshot.take(str(path), self._objects, replicated=["**"])
        make_durable(path, part=self._team.rank, num_parts=self._team.world_size)
        self._team.barrier()

    def load(self, path: Path) -> None:
        """Restore."""
        self._library.Snapshot(str(path)).restore(self._objects)

    def other_loads(self) -> dict[str, Callable[[Path], object]]:
        """Return nothing: there is one way to load."""
        return {}

    def close(self) -> None:
        """Hold nothing."""


class TorchsnapshotAsync:
    """torchsnapshot's async_take."""

    def __init__(self, state: State, team: Team) -> None:
        self._library = importlib.import_module("torchsnapshot")
        self._objects = torchsnapshot_objects(self._library, state)
        self._team = team
        self._path = Path()
        self._pending: Any = None

    def prepare(self, directory: Path) -> None:
        """Have nothing to prepare."""

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


class TorchCheckpointing:
    """torch_checkpointing's synchronous saver; each rank writes its own copy, which is its default.

    Args:
        state: What it saves.
        team: The ranks.
        direct: Whether to write past the page cache, which is its default.
        num_writers: Its writing threads.
    """

    def __init__(self, state: State, team: Team, *, direct: bool = False, num_writers: int = 1) -> None:
        config = importlib.import_module("torch_checkpointing").CheckpointManager.Config.with_sync_save()
        _configure(config, direct=direct, num_writers=num_writers)
        self._manager = config.build()
        self._state = state
        self._team = team

    def save(self, path: Path) -> None:
        """Save, then sync."""
        self._manager.save(str(path), self._state.tree())
        make_durable(path, part=self._team.rank, num_parts=self._team.world_size)
        self._team.barrier()

    def load(self, path: Path) -> None:
        """Load into the tensors' own memory."""
        self._manager.load(str(path), self._state.tree())

    def other_loads(self) -> dict[str, Callable[[Path], object]]:
        """Return nothing: it maps files as it comes."""
        return {}

    def close(self) -> None:
        """Close its manager."""
        self._manager.close()


def _configure(config: Any, *, direct: bool, num_writers: int) -> None:
    files = importlib.import_module("torch_checkpointing.storage.filesystem")
    config.storage_config = files.LocalFileSystemStorageConfig(use_direct_io=direct)
    config.save.writer_config.file_write_max_threads = num_writers


class TorchCheckpointingAsync:
    """torch_checkpointing with its process.

    Args:
        state: What it saves.
        team: The ranks.
        background_staging: Whether it stages on a thread, too, which is its default; the optimizer then waits for it.
        prewarm: Whether it makes its buffers before the first save.
    """

    def __init__(self, state: State, team: Team, *, background_staging: bool = False, prewarm: bool = False) -> None:
        config = importlib.import_module("torch_checkpointing").CheckpointManager.Config.with_async_save()
        _configure(config, direct=False, num_writers=NUM_THREADS)
        config.save.staging_config.use_async_staging = background_staging
        self._manager = config.build()
        self._state = state
        self._team = team
        self._prewarm = prewarm
        self._path = Path()
        self._future: Any = None
        self._hooks: list[Any] = []
        if background_staging:
            self._guard(state.objects.get("optimizer"))

    def _guard(self, optimizer: Any) -> None:
        """Let each step of the optimizer hold the manager's lock, as its documentation asks for."""
        if optimizer is None:
            return
        held = ExitStack()

        def enter(*_: Any) -> None:
            held.enter_context(self._manager.lock())

        def leave(*_: Any) -> None:
            held.close()

        self._hooks = [optimizer.register_step_pre_hook(enter), optimizer.register_step_post_hook(leave)]

    def prepare(self, directory: Path) -> None:
        """Make its buffers, if that is what is measured."""
        if self._prewarm:
            self._manager.prewarm_staging(self._state.tree())
            pending = getattr(self._manager, "_prewarm_staging_future", None)  # or the first save would wait for it
            if pending is not None:
                pending.result()

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
        for hook in self._hooks:
            hook.remove()
        self._manager.close()

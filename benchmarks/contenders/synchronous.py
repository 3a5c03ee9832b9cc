"""Contenders that save while training waits, and load."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import distckpt
from benchmarks.disk import make_durable
from benchmarks.states import State
from benchmarks.team import Team


class Saver(Protocol):
    """Saves and loads one state, on all ranks together; is made outside of what is timed."""

    def save(self, path: Path) -> None:
        """Save to a path that is new; every byte is durable when this returns."""

    def load(self, path: Path) -> None:
        """Load all of what `save` wrote into the state."""

    def close(self) -> None:
        """Give back what it holds."""


class Distckpt:
    """distckpt, by its manager, which keeps what it needs for the next save."""

    def __init__(self, state: State, team: Team) -> None:
        self._state = state
        self._managers: dict[Path, distckpt.CheckpointManager] = {}

    def save(self, path: Path) -> None:
        """Save as the manager's next checkpoint, which then stands at `path`."""
        manager = self._managers.get(path.parent)
        if manager is None:
            self.close()
            manager = distckpt.CheckpointManager(path.parent, background=False, keep=1_000_000, signals=())
            self._managers[path.parent] = manager
        step = int(path.name.removeprefix("step-"))
        manager.save(step, self._state.objects)

    def load(self, path: Path) -> None:
        """Load, with every digest checked."""
        distckpt.load(path, self._state.objects)

    def close(self) -> None:
        """Close the managers."""
        for manager in self._managers.values():
            manager.close()
        self._managers.clear()


class _OnRankZero:
    """A file that rank 0 writes, and all ranks read."""

    def __init__(self, state: State, team: Team) -> None:
        self._state = state
        self._team = team

    def save(self, path: Path) -> None:
        """Write on rank 0, sync, and let the others wait."""
        if self._team.rank == 0:
            path.mkdir()
            self._write(path / "checkpoint")
            make_durable(path)
        self._team.barrier()

    def load(self, path: Path) -> None:
        """Read on every rank."""
        self._read(path / "checkpoint")
        self._team.barrier()

    def close(self) -> None:
        """Hold nothing."""

    def _write(self, file: Path) -> None:
        raise NotImplementedError

    def _read(self, file: Path) -> None:
        raise NotImplementedError

    def _put(self, tree: Mapping[str, Any]) -> None:
        """Load a tree as the objects' own users do."""
        for key, each in self._state.objects.items():
            if hasattr(each, "load_state_dict"):
                each.load_state_dict(tree[key])
            else:
                for name, tensor in each.items():
                    tensor.copy_(tree[key][name])


class TorchSave(_OnRankZero):
    """torch.save and torch.load, as PyTorch's own tutorials have them."""

    def _write(self, file: Path) -> None:
        torch.save(self._state.tree(), file)

    def _read(self, file: Path) -> None:
        self._put(torch.load(file, weights_only=True))


class Safetensors(_OnRankZero):
    """safetensors, with what is no tensor in its header."""

    def _write(self, file: Path) -> None:
        from safetensors.torch import save_file

        optimizer = self._state.tree().get("optimizer")
        rest = json.dumps(optimizer["param_groups"]) if optimizer else ""
        # A tensor that two names share is refused by it; the second is left out, as it advises.
        seen: dict[int, str] = {}
        tensors = {
            name: tensor
            for name, tensor in self._state.tensors().items()
            if seen.setdefault(tensor.data_ptr() or -len(seen) - 1, name) == name
        }
        save_file(tensors, file, metadata={"param_groups": rest})

    def _read(self, file: Path) -> None:
        from safetensors.torch import load_file

        loaded = load_file(file)
        with torch.no_grad():
            for name, tensor in self._state.tensors().items():
                if name in loaded:
                    tensor.copy_(loaded[name])


class LightningFabric(_OnRankZero):
    """Lightning Fabric's TorchCheckpointIO, which its strategies call on rank 0."""

    def __init__(self, state: State, team: Team) -> None:
        super().__init__(state, team)
        self._io = importlib.import_module("lightning_fabric.plugins").TorchCheckpointIO()

    def _write(self, file: Path) -> None:
        self._io.save_checkpoint(self._state.tree(), file)

    def _read(self, file: Path) -> None:
        self._put(self._io.load_checkpoint(file))


class Accelerate:
    """Accelerate's save_state and load_state."""

    def __init__(self, state: State, team: Team) -> None:
        if team.world_size > 1:
            raise NotImplementedError("measured in one process only: it would wrap the model anew")
        if "model" not in state.objects:
            raise NotImplementedError("saves modules and optimizers only")
        self._accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
        self._accelerator.prepare(state.objects["model"], state.objects["optimizer"])

    def save(self, path: Path) -> None:
        """Save, then sync."""
        self._accelerator.save_state(str(path))
        make_durable(path)

    def load(self, path: Path) -> None:
        """Load."""
        self._accelerator.load_state(str(path))

    def close(self) -> None:
        """Let go of model and optimizer."""
        self._accelerator.free_memory()


class Dcp:
    """torch.distributed.checkpoint as it comes, or with its plan cached and two writing threads."""

    def __init__(self, state: State, team: Team, *, tuned: bool = False) -> None:
        self._state = state
        self._team = team
        self._tuned = tuned

    def save(self, path: Path) -> None:
        """Save; its writer syncs its files, and the folders are synced after it."""
        planner = DefaultSavePlanner(enable_plan_caching=True) if self._tuned else None
        writer = FileSystemWriter(path, thread_count=2 if self._tuned else 1)
        dcp_save(self._state.tree(), storage_writer=writer, planner=planner)
        make_durable(path, part=self._team.rank, num_parts=self._team.world_size)
        self._team.barrier()

    def load(self, path: Path) -> None:
        """Load into the tensors' own memory."""
        dcp_load(self._state.tree(), storage_reader=FileSystemReader(path))

    def close(self) -> None:
        """Hold nothing."""


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

    def close(self) -> None:
        """Hold nothing."""


def torchsnapshot_objects(library: Any, state: State) -> dict[str, Any]:
    """Return the state as torchsnapshot takes it: plain dicts in a wrapper."""
    return {
        key: each if hasattr(each, "state_dict") else library.StateDict(**each) for key, each in state.objects.items()
    }


class TorchCheckpointing:
    """torch_checkpointing's synchronous saver; each rank writes its own copy, which is its default.

    Its default of direct writes fails on ext4 with EINVAL, so it is told not to.
    """

    def __init__(self, state: State, team: Team) -> None:
        library = importlib.import_module("torch_checkpointing")
        files = importlib.import_module("torch_checkpointing.storage.filesystem")
        config = library.CheckpointManager.Config.with_sync_save()
        config.storage_config = files.LocalFileSystemStorageConfig(use_direct_io=False)
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

    def close(self) -> None:
        """Close its manager."""
        self._manager.close()


SAVERS: Mapping[str, Callable[[State, Team], Saver]] = {
    "distckpt": Distckpt,
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "Lightning Fabric": LightningFabric,
    "Accelerate": Accelerate,
    "DCP": Dcp,
    "DCP, plan cache and 2 threads": lambda state, team: Dcp(state, team, tuned=True),
    "torchsnapshot": Torchsnapshot,
    "torch_checkpointing": TorchCheckpointing,
}


def open_savers(state: State, team: Team, only: list[str] | None = None) -> tuple[dict[str, Saver], dict[str, str]]:
    """Return the savers, and why each of the others is not there.

    Args:
        state: What they save.
        team: The ranks.
        only: The names of the only ones wanted; None is all.
    """
    return opened(SAVERS, state, team, only)


def opened(
    makers: Mapping[str, Callable[[State, Team], Any]], state: State, team: Team, only: list[str] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Make contenders; return them, and why each of the others is not there."""
    made: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        if only is not None and name not in only:
            absent[name] = "not asked for"
            continue
        try:
            made[name] = make(state, team)
        except Exception as error:  # noqa: BLE001  whatever keeps a peer from running is reported
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return made, absent

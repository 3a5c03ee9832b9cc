"""Peers that write one file on rank 0: torch.save, safetensors, Lightning, Accelerate."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.disk import make_durable
from benchmarks.states import State, named_tensors
from benchmarks.team import Team

FILE = "checkpoint"


def put(state: State, tree: Mapping[str, Any]) -> None:
    """Load a tree as the objects' own users do."""
    for key, each in state.objects.items():
        if hasattr(each, "load_state_dict"):
            each.load_state_dict(tree[key])
        else:
            for name, tensor in each.items():
                tensor.copy_(tree[key][name])


class _OnRankZero:
    """A file that rank 0 writes, and all ranks read."""

    def __init__(self, state: State, team: Team) -> None:
        self._state = state
        self._team = team

    def save(self, path: Path) -> None:
        """Write on rank 0, sync, and let the others wait."""
        if self._team.rank == 0:
            path.mkdir()
            self._write(path / FILE)
            make_durable(path)
        self._team.barrier()

    def load(self, path: Path) -> None:
        """Read on every rank."""
        self._read(path / FILE)
        self._team.barrier()

    def other_loads(self) -> dict[str, Callable[[Path], object]]:
        """Return nothing: there is one way to load."""
        return {}

    def close(self) -> None:
        """Hold nothing."""

    def _write(self, file: Path) -> None:
        raise NotImplementedError

    def _read(self, file: Path) -> None:
        raise NotImplementedError


class TorchSave(_OnRankZero):
    """torch.save and torch.load, as PyTorch's own tutorials have them."""

    def other_loads(self) -> dict[str, Callable[[Path], object]]:
        """Return the tuned load, which maps the file and copies from there."""
        return {"torch.load, mmap and copy": lambda path: self._copy(path / FILE)}

    def _write(self, file: Path) -> None:
        torch.save(self._state.tree(), file)

    def _read(self, file: Path) -> None:
        put(self._state, torch.load(file, weights_only=True))

    @torch.no_grad()
    def _copy(self, file: Path) -> None:
        # `load_state_dict` of an optimizer keeps what it is given, here the mapped file: that would be no load at all.
        loaded = named_tensors(torch.load(file, weights_only=True, mmap=True, map_location="cpu"))
        for name, tensor in self._state.tensors().items():
            tensor.copy_(loaded[name])


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

        loaded = load_file(file, device=self._state.device)
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
        put(self._state, self._io.load_checkpoint(file))


class Accelerate:
    """Accelerate's save_state and load_state."""

    def __init__(self, state: State, team: Team) -> None:
        if team.world_size > 1:
            raise NotImplementedError("measured in one process only: it would wrap the model anew")
        if "model" not in state.objects:
            raise NotImplementedError("saves modules and optimizers only")
        self._accelerator = importlib.import_module("accelerate").Accelerator(cpu=state.device == "cpu")
        self._accelerator.prepare(state.objects["model"], state.objects["optimizer"])

    def save(self, path: Path) -> None:
        """Save, then sync."""
        self._accelerator.save_state(str(path))
        make_durable(path)

    def load(self, path: Path) -> None:
        """Load."""
        self._accelerator.load_state(str(path))

    def other_loads(self) -> dict[str, Callable[[Path], object]]:
        """Return nothing: there is one way to load."""
        return {}

    def close(self) -> None:
        """Let go of model and optimizer."""
        self._accelerator.free_memory()


class TorchSaveOnAThread:
    """What many write by hand: a clone of every tensor, then torch.save on a thread of rank 0."""

    def __init__(self, state: State, team: Team) -> None:
        self._state = state
        self._team = team
        self._threads = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def prepare(self, directory: Path) -> None:
        """Have nothing to prepare."""

    def start(self, path: Path) -> None:
        """Clone, and hand over."""
        if self._team.rank == 0:
            tree = _cloned(self._state.tree())
            self._pending = self._threads.submit(self._write, tree, path)

    def _write(self, tree: Any, path: Path) -> None:
        path.mkdir()
        torch.save(tree, path / FILE)
        make_durable(path)

    def finish(self) -> None:
        """Wait for the thread."""
        if self._pending is not None:
            self._pending.result()

    def close(self) -> None:
        """End the thread."""
        self._threads.shutdown()


def _cloned(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _cloned(each) for key, each in tree.items()}
    return [_cloned(each) for each in tree] if isinstance(tree, list) else tree


class LightningAsync:
    """Lightning's AsyncCheckpointIO, which clones and then saves on a thread of rank 0."""

    def __init__(self, state: State, team: Team) -> None:
        self._io = importlib.import_module("pytorch_lightning.plugins.io").AsyncCheckpointIO(
            importlib.import_module("lightning_fabric.plugins").TorchCheckpointIO()
        )
        self._state = state
        self._team = team
        self._path = Path()

    def prepare(self, directory: Path) -> None:
        """Have nothing to prepare."""

    def start(self, path: Path) -> None:
        """Clone, and hand over."""
        self._path = path
        if self._team.rank == 0:
            path.mkdir()
            self._io.save_checkpoint(self._state.tree(), path / FILE)

    def finish(self) -> None:
        """Wait for the thread, then sync."""
        if self._team.rank == 0:
            self._io.teardown()
            make_durable(self._path)

    def close(self) -> None:
        """End the thread."""
        self._io.teardown()

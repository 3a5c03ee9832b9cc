"""distckpt: distributed training for PyTorch that never loses a checkpoint.

The names below are imported when they are first used, so that what needs no torch starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distckpt.garbage import kept_off
from distckpt.version import __version__ as __version__

if TYPE_CHECKING:
    from distckpt import errors, events
    from distckpt.catalog import Checkpoint
    from distckpt.manager import CheckpointManager
    from distckpt.readahead import prefetch
    from distckpt.retention import Retention
    from distckpt.single import load, save
    from distckpt.slots import PerRank
    from distckpt.trainer import TrainConfig, Trainer
    from distckpt.weights import load_weights

_MODULES = ("errors", "events")
_HOMES = {
    "Checkpoint": "catalog",
    "CheckpointManager": "manager",
    "PerRank": "slots",
    "Retention": "retention",
    "TrainConfig": "trainer",
    "Trainer": "trainer",
    "load": "single",
    "load_weights": "weights",
    "prefetch": "readahead",
    "save": "single",
}

__all__ = [
    "Checkpoint",
    "CheckpointManager",
    "PerRank",
    "Retention",
    "TrainConfig",
    "Trainer",
    "errors",
    "events",
    "load",
    "load_weights",
    "prefetch",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"distckpt.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with kept_off():  # where torch is imported, the collector has much to walk over, and nothing to find
        return getattr(importlib.import_module(f"distckpt.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

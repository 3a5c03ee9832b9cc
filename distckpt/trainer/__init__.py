"""The training framework: a configuration in, a resumable run out.

The names below are imported when they are first used: a configuration is read, and refused, before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distckpt.garbage import kept_off

if TYPE_CHECKING:
    from distckpt.trainer.command_line import parse_config
    from distckpt.trainer.config import (
        CheckpointConfig,
        DataConfig,
        LoopConfig,
        ModelConfig,
        OptimizerConfig,
        ScheduleConfig,
        TrainConfig,
    )
    from distckpt.trainer.console import print_classes, show_messages
    from distckpt.trainer.loop import FitResult, Trainer

_HOMES = {
    "CheckpointConfig": "config",
    "DataConfig": "config",
    "FitResult": "loop",
    "LoopConfig": "config",
    "ModelConfig": "config",
    "OptimizerConfig": "config",
    "ScheduleConfig": "config",
    "TrainConfig": "config",
    "Trainer": "loop",
    "parse_config": "command_line",
    "print_classes": "console",
    "show_messages": "console",
}

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "FitResult",
    "LoopConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "TrainConfig",
    "Trainer",
    "parse_config",
    "print_classes",
    "show_messages",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with kept_off():  # torch, as it is imported, would be walked over again and again
        return getattr(importlib.import_module(f"distckpt.trainer.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

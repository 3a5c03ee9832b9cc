"""The training framework: a configuration in, a resumable run out."""

from __future__ import annotations

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

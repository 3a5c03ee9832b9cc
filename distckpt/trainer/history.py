"""What the checkpoints in the directory were trained with, compared with what is asked for now.

Invariant: a run never goes on from another training's checkpoints, and never replaces them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distckpt.errors import ConfigError
from distckpt.manager import CheckpointManager
from distckpt.ranks import Ranks
from distckpt.trainer.config import TrainConfig

_FIXED = (
    "seed",
    "model",
    "data.name",
    "data.augment",
    "dataset",
    "optimizer.name",
    "train.global_batch_size",
    "train.precision",  # fp16 keeps a loss scale that the others do not have
)
_SHOWN = 60  # characters of a value


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """The newest checkpoint of the directory.

    Attributes:
        step: Its step.
        config: The configuration that it was trained with.
    """

    step: int
    config: dict[str, Any]


def find_past(manager: CheckpointManager, wanted: Mapping[str, Any], ranks: Ranks) -> Past | None:
    """Return what the newest checkpoint was trained with; None if there is none.

    Args:
        manager: The run's manager.
        wanted: The configuration of the training that is about to start.
        ranks: All ranks; rank 0 looks, for all of them.

    Raises:
        ConfigError: It is another training's; names the settings that differ.

    Ranks: all (collective); blocks until rank 0 has read the newest manifest.
    """

    def look(_: list[None]) -> dict[str, Any] | None:
        latest = manager.latest
        if latest is None:
            return None
        check_same_training(dict(latest.config or {}), wanted, manager.directory)
        return {"step": latest.step, "config": dict(latest.config or {})}

    found = ranks.agree("reading of the newest checkpoint's configuration", lambda: None, look)
    return None if found is None else Past(step=found["step"], config=found["config"])


def check_same_training(found: Mapping[str, Any], wanted: Mapping[str, Any], directory: str) -> None:
    """Return if a training with one configuration may go on with the other.

    Raises:
        ConfigError: They differ in what a training cannot change; names it.

    Ranks: any.
    """
    fix = "use another --checkpoint.directory"
    if not is_trainers(found):
        problem = f"{directory} holds checkpoints that no Trainer made; {fix}"
        raise ConfigError(source="checkpoint.directory", problem=problem)
    differing = [
        f"{key} is {_shown(old)} there and {_shown(new)} here"
        for key, old, new in _differences(found, wanted)
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED)
    ]
    if differing:
        problem = f"{directory} holds checkpoints of another training: {', '.join(differing)}; {fix}"
        raise ConfigError(source="checkpoint.directory", problem=problem)


def changed_settings(past: Past, wanted: Mapping[str, Any]) -> list[str]:
    """Return in words which settings differ from the checkpoint's.

    Ranks: any.
    """
    return [f"{key} {_shown(old)} -> {_shown(new)}" for key, old, new in _differences(past.config, wanted)]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, old value, new value) for each leaf that differs."""
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def recorded(config: TrainConfig, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint's manifest records of a training: the settings, and facts of the data.

    Ranks: any.
    """
    return {**config.as_json(), "dataset": dict(dataset)}


def is_trainers(config: Mapping[str, Any] | None) -> bool:
    """Return whether a manifest's configuration is one that `recorded` made.

    Ranks: any.
    """
    return config is not None and "dataset" in config and "model" in config

"""A trained model, rebuilt from a checkpoint that the trainer made: structure from the manifest, weights from its data.

Invariant: nothing is unpickled, and nothing but the checkpoint is needed.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from distckpt.catalog import locate
from distckpt.errors import ConfigError
from distckpt.storage import open_storage
from distckpt.trainer.config import ModelConfig
from distckpt.trainer.history import is_trainers
from distckpt.trainer.models import build_model
from distckpt.weights import load_weights


def load_model(
    directory: str | os.PathLike[str], *, step: int | None = None, storage_options: dict[str, Any] | None = None
) -> nn.Module:
    """Return a run's model, in eval mode on the CPU; see `Trainer.load_model`.

    Ranks: any.
    """
    storage = open_storage(directory, storage_options=storage_options)
    folder, manifest = locate(storage, step=step)
    config = manifest.config or {}
    if not is_trainers(config):
        raise ConfigError(
            source=storage.url,
            problem=f"the checkpoint of step {manifest.step} does not say what its model is; no Trainer made it",
            fix="build the model yourself, and fill it: distckpt.load_weights(path, model)",
        )
    facts = config["dataset"]
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and overwritten
        model = build_model(
            ModelConfig(**config["model"]), num_classes=facts["num_classes"], image_shape=tuple(facts["shape"])
        )
    path = f"{storage.url.rstrip('/')}/{folder}" if folder else storage.url
    return load_weights(path, model, key="model", storage_options=storage_options).eval()

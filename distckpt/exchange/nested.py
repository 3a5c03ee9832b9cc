"""A checkpoint's state as nested Python values with tensors, as torch.save and DCP take them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from distckpt.arrays import batches, read
from distckpt.exchange import record
from distckpt.exchange.chosen import Chosen
from distckpt.tensors import DTYPES
from distckpt.values import Json, decode, encode


def content(chosen: Chosen, *, advance: Callable[[int], object]) -> dict[str, Any]:
    """Return what is chosen as a dict that torch's weights-only unpickler can open.

    What differs by rank is a list, with one value for each rank. NumPy arrays become tensors, NumPy scalars plain
    numbers; the record beside them, which a whole checkpoint gets, knows better. Tied weights stay one tensor.

    Args:
        chosen: What to return; one key alone is returned without the key.
        advance: Is told of bytes that were read.

    Raises:
        CheckpointDamagedError: The checkpoint's bytes are not the ones that were written.
        StorageError: They could not be read.

    Ranks: any; it takes memory for all chosen tensors.
    """
    tensors = _tensors(chosen, advance)

    def filled(tree: Any) -> Any:
        return _plain(decode(tree, lambda _, name: tensors[name]))

    made: dict[str, Any] = {}
    for key, entry in chosen.objects.items():
        made[key] = [filled(tree) for tree in entry.trees] if entry.per_rank else filled(entry.trees[0])
    if chosen.key is not None:
        alone = made[chosen.key]
        return alone if isinstance(alone, dict) else made
    if chosen.whole:
        made[record.KEY] = record.write(chosen.source.manifest)
    return made


def _tensors(chosen: Chosen, advance: Callable[[int], object]) -> dict[str, torch.Tensor]:
    source = chosen.source
    found: dict[str, torch.Tensor] = {}
    for batch in batches(source, {*chosen.tensors().values()}):
        for name, data in read(source, batch).items():
            entry = source.manifest.tensors[name]
            found[name] = torch.from_numpy(data.reshape(-1)).view(DTYPES[entry.dtype]).reshape(entry.shape)
            advance(entry.num_bytes)
    return found


def _plain(value: Any) -> Any:
    """Return a value without NumPy's scalars."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Counter):
        return value
    if isinstance(value, dict):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value


def normal(tree: Json, key: str) -> Json:
    """Return the tree that a value has once it has gone through `content` and is encoded anew.

    Raises:
        ValueError: It is no tree.

    Ranks: any.
    """
    value = _plain(decode(tree, lambda _, name: _Named(name)))
    return encode(value, key, lambda _, item: {"$tensor": item.name} if isinstance(item, _Named) else None)


class _Named:
    """Stands where a tensor of this name does."""

    def __init__(self, name: str) -> None:
        self.name = name

"""Slots: what a user's state is made up of, object by object, and where each stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from distckpt import names
from distckpt.errors import UsageError

T = TypeVar("T")

# Types of which no object is stateful, and that hold none.
_BARE = frozenset({torch.Tensor, nn.Parameter, np.ndarray, str, int, float, bool, type(None)})


class PerRank(Generic[T]):
    """Marks state that differs from rank to rank, such as a position in this rank's own data.

    Each rank's state is saved, and given back to the rank of the same number.
    On a restore with more ranks than the checkpoint has, those that it does not know keep what they have, with a
    warning; state that is not marked, and was found to differ, they take from rank 0.

    Attributes:
        value: The object itself.
    """

    def __init__(self, value: T) -> None:
        self.value = value


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One object of the state, and where it stands.

    Attributes:
        key: Its key; parts of nested ones joined by dots.
        value: The object, without its `PerRank`.
        per_rank: Whether it was in one.
        parent: The dict, list or tuple that holds it.
        place: Its key or index there.
    """

    key: str
    value: Any
    per_rank: bool
    parent: Any
    place: Any


def slots(state: Mapping[str, Any]) -> Iterator[Slot]:
    """Yield each object of `state`; dicts and lists that hold stateful objects are opened.

    Raises:
        UsageError: `state` is no dict with string keys, or uses a reserved key.

    Ranks: any.
    """
    if not isinstance(state, Mapping):
        raise UsageError(
            problem=f"the state is a {type(state).__name__}, not a dict",
            fix='state = {"model": model, "optimizer": optimizer}',
        )
    for key, value in state.items():
        if not isinstance(key, str) or not key:
            raise UsageError(problem=f"the state has the key {key!r}; keys are non-empty strings")
        if key == names.RNG:
            raise UsageError(problem=f"the state's key {names.RNG!r} is reserved", fix="rename it")
        yield from _opened(key, value, state, key)


def _opened(key: str, value: Any, parent: Any, place: Any) -> Iterator[Slot]:
    if isinstance(value, (dict, list, tuple)) and _holds_stateful(value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from _opened(f"{key}.{name}", item, value, name)
        return
    per_rank = isinstance(value, PerRank)
    yield Slot(
        key=key,
        value=value.value if isinstance(value, PerRank) else value,
        per_rank=per_rank,
        parent=parent,
        place=place,
    )


def _holds_stateful(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        items = value.values() if isinstance(value, dict) else value
        # A question to each type: there may be a great many tensors, and to ask each takes 12 ms for 20,000.
        return not _BARE.issuperset(map(type, items)) and any(map(_holds_stateful, items))
    return isinstance(value, PerRank) or is_stateful(value)


def is_stateful(value: Any) -> bool:
    """Say whether `value` has `state_dict` and `load_state_dict`.

    Ranks: any.
    """
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def kind_of(value: Any) -> str:
    """Return which kind of object `value` is: "module", "optimizer", "stateful" or "value".

    Ranks: any.
    """
    if isinstance(value, nn.Module):
        return "module"
    if isinstance(value, torch.optim.Optimizer):
        return "optimizer"
    return "stateful" if is_stateful(value) else "value"

"""Applying: what was read is given to the user's objects.

Invariant: nothing is cast; what was read into a tensor of the state itself is not copied again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distckpt.errors import DistckptError, StateLoadError, UsageError
from distckpt.matching import Match, Part, Reference, references
from distckpt.modules import module_state, plain_names, unwrap
from distckpt.slots import PerRank, kind_of
from distckpt.tensors import local


def settled(matched: Match, staged: Mapping[str, torch.Tensor]) -> list[Part]:
    """Return the parts whose tensors are all read in place: what is left of them can be applied while that goes on.

    Ranks: any.
    """
    return [
        part
        for part in matched.parts
        if part.is_row
        or (
            kind_of(part.slot.value) != "stateful"
            and all(matched.targets.get(name) is staged[name] for name, _ in references(part.content))
        )
    ]


def apply(
    matched: Match, staged: Mapping[str, torch.Tensor], *, only: Sequence[Part] | None = None, but: Sequence[Part] = ()
) -> None:
    """Change the state; every byte is known to be good by now, but for those of `settled` parts.

    Args:
        matched: What goes where.
        staged: What was read, or is read in place.
        only: The parts to apply; None is all.
        but: Parts that are applied already.

    Raises:
        StateLoadError: An object's own method raised.

    Ranks: any.
    """
    for part in matched.parts if only is None else only:
        if any(part is done for done in but):
            continue

        def tensor(reference: Reference) -> Any:
            value = staged[reference.name]
            like = matched.likes.get(reference.name)
            if reference.array:
                return value.numpy()
            if isinstance(like, DTensor) and not isinstance(value, DTensor):
                return _like(value, like)
            return value

        content = _filled(part.content, tensor)
        try:
            _apply_part(part, content)
        except DistckptError:
            raise
        except Exception as error:  # whatever an object's own method raises
            raise StateLoadError(key=part.slot.key, cause=f"{type(error).__name__}: {error}") from error


def _apply_part(part: Part, content: Any) -> None:
    match kind_of(part.slot.value):
        case "module":
            _apply_module(part, content)
        case "optimizer":
            _apply_optimizer(part.slot.value, content)
        case "stateful":
            part.slot.value.load_state_dict(content)
        case _:
            _apply_value(part, content)


def _filled(content: Any, tensor: Any) -> Any:
    """Return `content` with a tensor for each reference."""
    if type(content) is Reference:
        return tensor(content)
    if isinstance(content, dict):
        made = {
            name: tensor(item) if type(item) is Reference else _filled(item, tensor) for name, item in content.items()
        }
        return made if type(content) is dict else type(content)(made)
    if isinstance(content, list):
        return [_filled(item, tensor) for item in content]
    if isinstance(content, tuple):
        return tuple(_filled(item, tensor) for item in content)
    return content


def _like(value: torch.Tensor, like: DTensor) -> DTensor:
    """Return `value`, this rank's part, as a DTensor that lies as `like` does."""
    return DTensor.from_local(
        value.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _apply_module(part: Part, content: dict[str, Any]) -> None:
    module = unwrap(cast(nn.Module, part.slot.value))
    expected, _, is_stock = module_state(module)
    if is_stock and all(_is_same(expected.get(name), value) for name, value in content.items()):
        return  # it was read into the parameters themselves
    plain = plain_names(module)
    here = module.state_dict()
    chosen = OrderedDict((name, content[plain(name)]) for name in here if plain(name) in content)
    metadata = getattr(here, "_metadata", None)
    if metadata is not None:
        chosen._metadata = metadata  # type: ignore[attr-defined]  # versions of modules, for their own load hooks
    module.load_state_dict(chosen, strict=part.whole)


def _is_same(one: Any, other: Any) -> bool:
    """Say whether two tensors are one memory, seen in one way."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    here, there = local(one), local(other)
    return here.data_ptr() == there.data_ptr() and here.shape == there.shape and here.stride() == there.stride()


def _apply_optimizer(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Load an optimizer; its own method casts some states to the parameter's dtype, which is undone."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [index for group in content["param_groups"] for index in group["params"]]
    states = {parameter: content["state"].get(index) for index, parameter in zip(order, parameters, strict=True)}
    if _is_stock(optimizer) and all(_is_there(optimizer.state.get(p), saved) for p, saved in states.items()):
        # Each tensor was read in place: what its own method would do with them, one by one, is to keep them.
        optimizer.load_state_dict({**content, "state": {}})
        optimizer.state.update({parameter: saved for parameter, saved in states.items() if saved is not None})
        return
    optimizer.load_state_dict(content)
    for parameter, saved in states.items():
        for name, value in (saved or {}).items():
            loaded = optimizer.state[parameter].get(name)
            if isinstance(value, torch.Tensor) and isinstance(loaded, torch.Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][name] = value.to(loaded.device)


def _is_stock(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether an optimizer is one of torch's own, and loads as such."""
    kind = type(optimizer)
    return (
        kind.__module__.startswith("torch.optim.")
        and kind.load_state_dict is torch.optim.Optimizer.load_state_dict
        and "load_state_dict" not in vars(optimizer)
        and not optimizer._optimizer_load_state_dict_pre_hooks
        and not optimizer._optimizer_load_state_dict_post_hooks
    )


def _is_there(known: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> bool:
    """Say whether a parameter's saved state is nothing but the tensors that the optimizer has of it."""
    if known is None or saved is None:
        return known is saved
    return known.keys() == saved.keys() and all(
        value is known[name] and isinstance(value, torch.Tensor) for name, value in saved.items()
    )


def _apply_value(part: Part, content: Any) -> None:
    slot = part.slot
    if not part.whole:
        for name, item in content.items():
            slot.value[name] = _merged(slot.value.get(name), item)
        return
    merged = _merged(slot.value, content)
    if merged is slot.value:
        return
    if isinstance(slot.parent, tuple):
        raise UsageError(problem=f"{slot.key} stands in a tuple and cannot be replaced", fix="use a list")
    holder = slot.parent[slot.place]
    if isinstance(holder, PerRank):
        holder.value = merged
    else:
        slot.parent[slot.place] = merged


def _merged(old: Any, new: Any) -> Any:
    """Return `new`, in the memory and containers of `old` where they fit."""
    if old is new:
        return old
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.shape == new.shape:
        with torch.no_grad():
            local(old).copy_(local(new))
        return old
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray) and (old.shape, old.dtype) == (new.shape, new.dtype):
        np.copyto(old, new)
        return old
    if type(old) is dict and type(new) is dict:
        made = {name: item if old.get(name) is item else _merged(old.get(name), item) for name, item in new.items()}
        old.clear()
        old.update(made)
        return old
    if type(old) is list and type(new) is list:
        old[:] = [_merged(old[index] if index < len(old) else None, item) for index, item in enumerate(new)]
        return old
    return new

"""Modules: their state under the names that they have without wrappers, and whether loading one is only copying.

Wrappers are DDP, torch.compile, activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_SAVE_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")
_LOAD_METHODS = ("load_state_dict", "_load_from_state_dict", "set_extra_state")
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


class ModuleState(NamedTuple):
    """A module's state.

    Attributes:
        content: Its state dict, under its names without wrappers.
        buffers: Which of these names are buffers. They are apart because DDP makes rank 0's the ones that count: each
            rank changes its own in forward, and the next forward begins by copying rank 0's to all.
        is_stock: Whether it and all inside it save and load as `nn.Module` does, so that loading is only copying.
    """

    content: dict[str, Any]
    buffers: set[str]
    is_stock: bool


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile wrappers.

    Ranks: any.
    """
    while True:
        if isinstance(module, _PARALLEL):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):  # torch.compile
            module = cast(nn.Module, module._orig_mod)
        else:
            return module


def module_state(module: nn.Module) -> ModuleState:
    """Return the state of a module, without what is wrapped around it.

    Ranks: any.
    """
    module = unwrap(module)
    stock = _stock_state(module)
    if stock is not None:
        return stock
    plain = plain_names(module)
    buffers = {plain(name) for name, _ in module.named_buffers(remove_duplicate=False)}
    content = {plain(name): value for name, value in module.state_dict().items()}
    return ModuleState(content, buffers & content.keys(), is_stock=False)


def _stock_state(module: nn.Module) -> ModuleState | None:
    """Return what `state_dict()` would, gone through once; None if a part of the module makes its own in another way.

    Source: of ResNet-50 it takes a third of the time.
    """
    content: dict[str, Any] = {}
    buffers: set[str] = set()
    is_stock = True
    waiting = [("", module)]
    while waiting:
        prefix, inner = waiting.pop()
        facts = vars(inner)
        if facts["_state_dict_hooks"] or facts["_state_dict_pre_hooks"] or not _has_stock(inner, _SAVE_METHODS):
            return None
        if facts["_load_state_dict_pre_hooks"] or facts["_load_state_dict_post_hooks"]:
            is_stock = False
        is_stock = is_stock and _has_stock(inner, _LOAD_METHODS)
        for name, parameter in facts["_parameters"].items():
            if parameter is not None:
                if is_lazy(parameter):
                    return None
                content[prefix + name] = parameter.detach()
        if facts["_buffers"]:
            passing = facts["_non_persistent_buffers_set"]
            for name, buffer in facts["_buffers"].items():
                if buffer is not None and name not in passing:
                    content[prefix + name] = buffer.detach()
                    buffers.add(prefix + name)
        children = facts["_modules"]
        if children:
            skipped = {"module"} if isinstance(inner, _PARALLEL) else _WRAPPERS
            waiting += [
                (prefix if name in skipped else f"{prefix}{name}.", child)
                for name, child in reversed(children.items())
                if child is not None
            ]
    return ModuleState(content, buffers, is_stock)


def _has_stock(module: nn.Module, methods: tuple[str, ...]) -> bool:
    """Say whether all of these methods of one module come from `nn.Module`, or from another class of torch.nn."""
    return _has_stock_kind(cast(Hashable, type(module)), methods) and vars(module).keys().isdisjoint(methods)


@lru_cache(maxsize=4096)
def _has_stock_kind(kind: Hashable, methods: tuple[str, ...]) -> bool:
    """Say the same of all modules of a class."""
    kinds = cast(type, kind).__mro__
    if torch.jit.ScriptModule in kinds:
        return False
    definers = [next((each for each in kinds if name in vars(each)), None) for name in methods]
    return all(each is None or each.__module__.startswith("torch.nn.") for each in definers)


def plain_names(module: nn.Module) -> Callable[[str], str]:
    """Return the function from a name in `module.state_dict()` to the name that it has without wrappers inside.

    Ranks: any.
    """
    skipped: set[str] = set()
    for prefix, inner in module.named_modules(remove_duplicate=False):
        if isinstance(inner, _PARALLEL):
            skipped.add(names_join(prefix, "module"))
        for child in _WRAPPERS.intersection(inner._modules.keys()):
            skipped.add(names_join(prefix, child))
    if not skipped:
        return lambda name: name

    def plain(name: str) -> str:
        parts = name.split(".")
        kept = [part for index, part in enumerate(parts) if ".".join(parts[: index + 1]) not in skipped]
        return ".".join(kept)

    return plain


def names_join(prefix: str, name: str) -> str:
    """Return the dotted name of `name` below `prefix`.

    Ranks: any.
    """
    return f"{prefix}.{name}" if prefix else name

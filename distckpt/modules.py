"""Modules: what is inside their wrappers, and whether loading one is only copying.

A module has the names that it has without wrappers (DDP, torch.compile, activation checkpointing).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, cast

from torch import nn

_STATE_METHODS = (
    *("state_dict", "_save_to_state_dict", "get_extra_state"),
    *("load_state_dict", "_load_from_state_dict", "set_extra_state"),
)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile wrappers.

    Ranks: any.
    """
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):  # torch.compile
            module = cast(nn.Module, module._orig_mod)
        else:
            return module


def module_state(module: nn.Module) -> tuple[dict[str, Any], set[str]]:
    """Return a module's state dict under its names without wrappers, and which of these names are buffers.

    Buffers are apart because DDP makes rank 0's the ones that count: each rank changes its own in forward, and the
    next forward begins by copying rank 0's to all.

    Ranks: any.
    """
    module = unwrap(module)
    plain = plain_names(module)
    buffers = {plain(name) for name, _ in module.named_buffers(remove_duplicate=False)}
    content = {plain(name): value for name, value in module.state_dict().items()}
    return content, buffers & content.keys()


def is_stock(module: nn.Module) -> bool:
    """Say whether a module and all inside it save and load as `nn.Module` does, so that loading is only copying.

    Ranks: any.
    """
    for inner in module.modules():
        kind = cast(Hashable, type(inner))
        if (
            inner._state_dict_hooks
            or inner._state_dict_pre_hooks
            or inner._load_state_dict_pre_hooks
            or inner._load_state_dict_post_hooks
            or any(_definer(kind, name) != "torch.nn" for name in _STATE_METHODS)
        ):
            return False
    return True


@lru_cache(maxsize=4096)
def _definer(kind: Hashable, name: str) -> str:
    """Return the package of the class that defines a method of `kind`: "torch.nn", or another."""
    for each in cast(type, kind).__mro__:
        if name in vars(each):
            return "torch.nn" if each.__module__.startswith("torch.nn.") else each.__module__
    return ""


def plain_names(module: nn.Module) -> Callable[[str], str]:
    """Return the function from a name in `module.state_dict()` to the name that it has without wrappers inside.

    Ranks: any.
    """
    wrappers = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
    skipped: set[str] = set()
    for prefix, inner in module.named_modules(remove_duplicate=False):
        if isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            skipped.add(names_join(prefix, "module"))
        for child in wrappers & inner._modules.keys():
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

"""State: the user's objects as flat entries, and back.

`flatten` turns a state dict of objects into entries (named tensors) and trees (JSON with references to them).
A module is flattened under the names that it has without wrappers (DDP, torch.compile, activation checkpointing), and
tensors that share memory are stored once.
Invariant: flattening changes nothing, and an entry's tensor is the user's own memory, not a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distckpt import names
from distckpt.checksum import digest
from distckpt.errors import UnsupportedStateError, UsageError
from distckpt.rng import RandomState
from distckpt.tensors import DTYPE_NAMES, check_storable, host_bytes, local
from distckpt.values import Json, encode, rename

T = TypeVar("T")

COMPARED_BYTES = 1 << 20
_SAMPLES = 4096


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
class Entry:
    """One tensor of the flattened state.

    Attributes:
        name: Its name, the path to it joined by dots.
        tensor: The user's tensor, on its device; a DTensor where the user has one.
        owner: The one rank whose values count and which writes it; None if all ranks hold the same.
    """

    name: str
    tensor: torch.Tensor
    owner: int | None = None

    @property
    def dtype(self) -> str:
        """The dtype's name on storage.

        Ranks: any.
        """
        return DTYPE_NAMES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape.

        Ranks: any.
        """
        return tuple(self.tensor.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatObject:
    """One key of the state, flattened.

    Attributes:
        key: The key; parts of nested ones joined by dots.
        kind: "module", "optimizer", "stateful" or "value".
        tree: The object as JSON, with references to entries.
        entries: Its tensors.
        per_rank: Whether it is this rank's own.
    """

    key: str
    kind: str
    tree: Json
    entries: tuple[Entry, ...]
    per_rank: bool

    def fingerprint(self) -> str:
        """Return a digest that is the same on two ranks if this object may be stored once for both.

        It covers names, shapes, dtypes and plain values, and, of objects that are neither modules nor optimizers, the
        tensors' content: all of it up to `COMPARED_BYTES` a tensor, else a sample.

        Ranks: any.
        """
        parts = [repr(self.tree)]
        for entry in self.entries:
            parts.append(f"{entry.name} {entry.dtype} {entry.shape}")
            if self.kind in ("stateful", "value") and not isinstance(entry.tensor, DTensor):
                parts.append(_content(entry.tensor))
        return digest("\n".join(parts).encode())

    def for_rank(self, rank: int) -> FlatObject:
        """Return this object as one of `rank`'s own: its entries carry the rank in their names.

        Ranks: any.
        """

        def renamed(name: str) -> str:
            return f"rank-{rank:05d}:{name}"

        entries = tuple(Entry(name=renamed(e.name), tensor=e.tensor, owner=rank) for e in self.entries)
        return FlatObject(key=self.key, kind=self.kind, tree=rename(self.tree, renamed), entries=entries, per_rank=True)


@dataclass(slots=True)
class _Collector:
    """Gathers the entries of one object while its values are encoded."""

    entries: list[Entry] = field(default_factory=list)
    owners: Mapping[str, int] = field(default_factory=dict)
    seen: dict[tuple[Any, ...], str] = field(default_factory=dict)
    share_memory: bool = False

    def __call__(self, key: str, value: Any) -> Json | None:
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._add(key, value)}
        if isinstance(value, np.ndarray):
            return {"$array": self._add(key, _from_array(key, value))}
        return None

    def _add(self, key: str, tensor: torch.Tensor) -> str:
        if torch.nn.parameter.is_lazy(tensor):
            raise UnsupportedStateError(
                key=key, problem="is not initialized yet", fix="run the model once before saving"
            )
        check_storable(tensor, key)
        if self.share_memory and tensor.numel():
            part = local(tensor)
            same = (part.data_ptr(), part.device, part.dtype, tuple(part.shape), part.stride())
            if same in self.seen:
                return self.seen[same]
            self.seen[same] = key
        self.entries.append(Entry(name=key, tensor=tensor.detach(), owner=self.owners.get(key)))
        return key


def flatten(state: Mapping[str, Any], *, rng: bool) -> list[FlatObject]:
    """Return every object of `state`, flattened, in the state's order.

    Args:
        state: Objects with `state_dict` and `load_state_dict`, tensors, plain values, and dicts and lists of these;
            any of them in a `PerRank`.
        rng: Whether to add this rank's random-number generators, under the key `names.RNG`.

    Raises:
        UnsupportedStateError: Something in it cannot be saved; names the key.
        UsageError: It is no dict with string keys, or two entries would have one name.

    Ranks: any.
    """
    flat: list[FlatObject] = []
    taken: set[str] = set()
    random_state = Slot(key=names.RNG, value=RandomState(), per_rank=True, parent=None, place=None)
    for slot in [*slots(state), *([random_state] if rng else [])]:
        made = _flatten_object(slot)
        for name in (entry.name for entry in made.entries):
            if name in taken:
                raise UsageError(
                    problem=f"two entries of the state have the name {name!r}", fix="rename one of the keys"
                )
            taken.add(name)
        flat.append(made)
    return flat


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
    if isinstance(value, dict):
        return any(_holds_stateful(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_stateful(item) for item in value)
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


def _flatten_object(slot: Slot) -> FlatObject:
    key, value = slot.key, slot.value
    kind = kind_of(value)
    collector = _Collector()
    if isinstance(value, nn.Module):
        content, buffers = module_state(value)
        collector = _Collector(share_memory=True, owners={f"{key}.{name}": 0 for name in buffers})
    else:
        content = value.state_dict() if kind != "value" else value
    tree = encode(content, key, collector)
    return FlatObject(key=key, kind=kind, tree=tree, entries=tuple(collector.entries), per_rank=slot.per_rank)


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


def _from_array(key: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise UnsupportedStateError(
            key=key, problem=f"is a NumPy array of dtype {array.dtype}", fix="save numbers or plain lists"
        ) from error


def _content(tensor: torch.Tensor) -> str:
    flat = local(tensor).reshape(-1)  # [items]
    if flat.numel() * flat.element_size() > COMPARED_BYTES:
        step = max(1, flat.numel() // _SAMPLES)
        flat = flat[::step]
    return digest(host_bytes(flat))


def gathered(flat: FlatObject, *, keep: bool) -> FlatObject:
    """Return the object with every DTensor made whole, on the CPU.

    Args:
        flat: The object.
        keep: Whether this rank needs the result; the others only help, and keep empty tensors.

    Ranks: all (collective, on the DTensors' own process groups); blocks on them.
    """
    entries = []
    for entry in flat.entries:
        tensor = entry.tensor
        if isinstance(tensor, DTensor):
            full = tensor.full_tensor()
            tensor = full.cpu() if keep else torch.empty(full.shape, dtype=full.dtype, device="meta")
        entries.append(Entry(name=entry.name, tensor=tensor, owner=entry.owner))
    return FlatObject(key=flat.key, kind=flat.kind, tree=flat.tree, entries=tuple(entries), per_rank=flat.per_rank)

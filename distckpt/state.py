"""State: the user's objects as flat entries, and back.

`flatten` turns a state dict of objects into entries (named tensors) and trees (JSON with references to them).
A module is flattened under the names that it has without wrappers (DDP, torch.compile, activation checkpointing), and
tensors that share memory are stored once.
Invariant: flattening changes nothing, and an entry's tensor is the user's own memory, not a copy.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distckpt import names
from distckpt.blueprint import Blueprint, Unknown
from distckpt.checksum import digest
from distckpt.errors import UnsupportedStateError, UsageError
from distckpt.manifest import to_text
from distckpt.modules import module_state
from distckpt.rng import RandomState
from distckpt.slots import Slot, kind_of, slots
from distckpt.tensors import DTYPE_NAMES, check_storable, host_bytes, local
from distckpt.values import Json, encode, rename

COMPARED_BYTES = 1 << 20
_SAMPLES = 4096


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


class Structure:
    """What is known of an object's tensors without looking into them; the same object as long as nothing changes.

    Attributes:
        names: Their names.
        owners: For each the one rank whose values count, or None.
        num_bytes: How many bytes they take, by their owner.
    """

    def __init__(self, names: Sequence[str], owners: Sequence[int | None], tensors: Sequence[torch.Tensor]) -> None:
        self.names = tuple(names)
        self.owners = tuple(owners)
        self.num_bytes: dict[int | None, int] = {}
        for owner, tensor in zip(owners, tensors, strict=True):
            self.num_bytes[owner] = self.num_bytes.get(owner, 0) + tensor.numel() * tensor.element_size()
        self._facts = [f"{n} {DTYPE_NAMES[t.dtype]} {tuple(t.shape)}" for n, t in zip(names, tensors, strict=True)]
        self._fingerprint = ""
        self._of_rank: dict[int, Structure] = {}

    @property
    def fingerprint(self) -> str:
        """A digest of names, dtypes and shapes.

        Ranks: any.
        """
        if not self._fingerprint:
            self._fingerprint = digest("\n".join(self._facts).encode())
        return self._fingerprint

    def for_rank(self, rank: int, tensors: Sequence[torch.Tensor]) -> Structure:
        """Return the structure of the same tensors as `rank`'s own.

        Ranks: any.
        """
        if rank not in self._of_rank:
            own = [names.of_rank(rank, name) for name in self.names]
            self._of_rank[rank] = Structure(own, [rank] * len(own), tensors)
        return self._of_rank[rank]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatObject:
    """One key of the state, flattened.

    Attributes:
        key: The key; parts of nested ones joined by dots.
        kind: "module", "optimizer", "stateful" or "value".
        tree: The object as JSON, with references to entries.
        text: The same as text.
        structure: The names of its tensors.
        tensors: They themselves.
        per_rank: Whether it is this rank's own.
    """

    key: str
    kind: str
    tree: Json
    text: str
    structure: Structure
    tensors: tuple[torch.Tensor, ...]
    per_rank: bool

    @property
    def entries(self) -> list[Entry]:
        """Its tensors, with what is known of them.

        Ranks: any.
        """
        of_each = zip(self.structure.names, self.tensors, self.structure.owners, strict=True)
        return [Entry(name=name, tensor=tensor, owner=owner) for name, tensor, owner in of_each]

    def fingerprint(self) -> str:
        """Return a digest that is the same on two ranks if this object may be stored once for both.

        It covers names, shapes, dtypes and plain values, and, of objects that are neither modules nor optimizers, the
        tensors' content: all of it up to `COMPARED_BYTES` a tensor, else a sample.

        Ranks: any.
        """
        parts = [digest(self.text.encode()), self.structure.fingerprint]
        if self.kind in ("stateful", "value"):
            parts += _contents(self.tensors)
        return digest("\n".join(parts).encode())[:16]

    def for_rank(self, rank: int) -> FlatObject:
        """Return this object as one of `rank`'s own: its entries carry the rank in their names.

        Ranks: any.
        """
        tree = rename(self.tree, partial(names.of_rank, rank))
        structure = self.structure.for_rank(rank, self.tensors)
        return replace(self, tree=tree, text=to_text(tree), structure=structure, per_rank=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What the save before knew of an object."""

    blueprint: Blueprint
    structure: Structure
    buffers: frozenset[str]


class Blueprints:
    """What the saves before have learned of the state's objects, by their keys."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], _Known] = {}
        self._distinct: list[Structure] = []

    def follow(self, key: str, kind: str, content: Any, buffers: frozenset[str]) -> tuple[_Known, list[Any]] | None:
        """Return what is known of an object, and its tensors now, if its structure is the one of the save before.

        Ranks: any.
        """
        known = self._known.pop((key, kind), None)
        tensors = known.blueprint.follow(content) if known is not None and known.buffers == buffers else None
        if known is None or tensors is None:
            return None
        self._known[key, kind] = known
        return known, tensors

    def learn(self, key: str, kind: str, blueprint: Blueprint, structure: Structure, buffers: frozenset[str]) -> None:
        """Remember how an object was made up.

        Ranks: any.
        """
        self._known[key, kind] = _Known(blueprint=blueprint, structure=structure, buffers=buffers)

    def check_names(self, flat: Sequence[FlatObject]) -> None:
        """Refuse two entries of one name.

        Raises:
            UsageError: There are such; says which.

        Ranks: any.
        """
        structures = [each.structure for each in flat]
        if len(structures) == len(self._distinct) and all(map(operator.is_, structures, self._distinct)):
            return
        taken: set[str] = set()
        for structure in structures:
            for name in structure.names:
                if name in taken:
                    problem = f"two entries of the state have the name {name!r}"
                    raise UsageError(problem=problem, fix="rename one of the keys")
                taken.add(name)
        self._distinct = structures


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


def flatten(state: Mapping[str, Any], *, rng: bool, blueprints: Blueprints | None = None) -> list[FlatObject]:
    """Return every object of `state`, flattened, in the state's order.

    Args:
        state: Objects with `state_dict` and `load_state_dict`, tensors, plain values, and dicts and lists of these;
            any of them in a `PerRank`.
        rng: Whether to add this rank's random-number generators, under the key `names.RNG`.
        blueprints: What the saves before have learned; this one adds to it.

    Raises:
        UnsupportedStateError: Something in it cannot be saved; names the key.
        UsageError: It is no dict with string keys, or two entries would have one name.

    Ranks: any.
    """
    blueprints = Blueprints() if blueprints is None else blueprints
    random_state = Slot(key=names.RNG, value=RandomState(), per_rank=True, parent=None, place=None)
    flat = [_flatten_object(slot, blueprints) for slot in [*slots(state), *([random_state] if rng else [])]]
    blueprints.check_names(flat)
    return flat


def _flatten_object(slot: Slot, blueprints: Blueprints) -> FlatObject:
    key, value = slot.key, slot.value
    kind = kind_of(value)
    buffers: set[str] = set()
    if isinstance(value, nn.Module):
        content, buffers, _ = module_state(value)
    else:
        content = value.state_dict() if kind != "value" else value
    found = blueprints.follow(key, kind, content, frozenset(buffers))
    if found is not None:
        known, raw = found
        tensors = tuple(_from_array(key, t) if isinstance(t, np.ndarray) else t for t in raw)
        blueprint, structure = known.blueprint, known.structure
        tree, text = blueprint.tree, blueprint.text
    else:
        collector = _Collector(share_memory=kind == "module", owners={f"{key}.{name}": 0 for name in buffers})
        tree = encode(content, key, collector)
        tensors = tuple(entry.tensor for entry in collector.entries)
        entry_names, owners = [e.name for e in collector.entries], [e.owner for e in collector.entries]
        structure = Structure(entry_names, owners, tensors)
        try:
            blueprint = Blueprint(content, key, tree, shares_memory=kind == "module")
            blueprints.learn(key, kind, blueprint, structure, frozenset(buffers))
            text = blueprint.text
        except Unknown:
            text = to_text(tree)
    return FlatObject(
        key=key, kind=kind, tree=tree, text=text, structure=structure, tensors=tensors, per_rank=slot.per_rank
    )


def _from_array(key: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise UnsupportedStateError(
            key=key, problem=f"is a NumPy array of dtype {array.dtype}", fix="save numbers or plain lists"
        ) from error


def _contents(tensors: Sequence[torch.Tensor]) -> list[str]:
    """Return digests of the content of tensors, or of samples of it; few, however many tensors there are."""
    rows: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            continue
        flat = local(tensor).reshape(-1)  # [items]
        if flat.numel() * flat.element_size() > COMPARED_BYTES:
            flat = flat[:: max(1, flat.numel() // _SAMPLES)]
        rows.setdefault((flat.dtype, flat.device), []).append(flat)
    return [digest(host_bytes(row[0] if len(row) == 1 else torch.cat(row))) for row in rows.values()]


def gathered(flat: FlatObject, *, keep: bool) -> FlatObject:
    """Return the object with every DTensor made whole, on the CPU.

    Args:
        flat: The object.
        keep: Whether this rank needs the result; the others only help, and keep empty tensors.

    Ranks: all (collective, on the DTensors' own process groups); blocks on them.
    """
    tensors = []
    for tensor in flat.tensors:
        if isinstance(tensor, DTensor):
            with torch.no_grad():
                full = tensor.full_tensor()
            tensors.append(full.cpu() if keep else torch.empty(full.shape, dtype=full.dtype, device="meta"))
        else:
            tensors.append(tensor)
    return replace(flat, tensors=tuple(tensors))

"""What of a checkpoint goes where in the state, and everything that does not fit, found before anything is changed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distckpt import names
from distckpt.errors import UsageError
from distckpt.manifest import Manifest, TensorEntry
from distckpt.modules import module_state
from distckpt.rng import RandomState
from distckpt.slots import Slot, kind_of, slots
from distckpt.tensors import DTYPE_NAMES, DTYPES
from distckpt.values import Json, decode

# Optimizer states that have their parameter's shape.
_ELEMENTWISE = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta"),
    *("sum", "exp_inf", "ax", "prev", "step_size"),
}


class Reference(NamedTuple):
    """A tensor entry's name, standing in a decoded value for its tensor. A tuple, as there may be a great many."""

    name: str
    array: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One object of the state, and the tree of the checkpoint that goes into it.

    Attributes:
        slot: The object, and where it stands in the state.
        content: The decoded value, with a `Reference` for each tensor.
        whole: Whether it is all of the object; else some of a module's entries are left as they are.
        is_row: Whether the object, a dict or a module, is made of `Match.targets` and nothing else: once they are
            filled, it is loaded.
    """

    slot: Slot
    content: Any
    whole: bool = True
    is_row: bool = False


@dataclass(slots=True)
class Match:
    """What of a checkpoint goes where.

    Attributes:
        parts: The objects to load, in the state's order, the random-number generators last.
        problems: What does not fit, a line each.
        likes: For tensors of which the state holds just a part (DTensors): the state's tensor, by the entry's name.
        targets: Tensors of the state that may be filled in place, by the entry's name: with that, they are loaded.
        kept: Keys of which the checkpoint has nothing for this rank: what is marked by `PerRank` stays as it is.
        borrowed: Likewise, but not marked: these take rank 0's.
    """

    parts: list[Part] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    likes: dict[str, torch.Tensor] = field(default_factory=dict)
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    borrowed: list[str] = field(default_factory=list)
    _wanted: list[str] | None = None

    def wanted(self) -> list[str]:
        """Return the names of all tensor entries that have to be read; asked for once the match is made.

        Ranks: any.
        """
        if self._wanted is None:
            found: dict[str, None] = {}
            for part in self.parts:
                for reference in references(part.content):
                    found[reference.name] = None
            self._wanted = list(found)
        return self._wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which entries to load: shell patterns over their names; a name also stands for everything below it."""

    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def is_all(self) -> bool:
        """Whether every entry is to be loaded."""
        return not self.skip and not self.only

    def takes(self, name: str) -> bool:
        """Say whether the entry of this name is to be loaded.

        Ranks: any.
        """
        return self.is_all or ((not self.only or _any(self.only, name)) and not _any(self.skip, name))

    def check(self, known: Sequence[str]) -> None:
        """Refuse a pattern that fits nothing: it is a slip.

        Raises:
            UsageError: Names the pattern.

        Ranks: any.
        """
        for pattern in (*self.skip, *self.only):
            if not any(_any((pattern,), name) for name in known):
                raise UsageError(
                    problem=f"the pattern {pattern!r} fits no entry of the checkpoint or the state",
                    fix=f"entries are named like {known[0]!r}" if known else None,
                )


def _any(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def match(state: Mapping[str, Any], manifest: Manifest, *, rank: int, selection: Selection, rng: bool) -> Match:
    """Return what of a checkpoint goes where in `state`; changes nothing.

    Raises:
        UsageError: The state is malformed, or a pattern fits nothing.

    Ranks: any.
    """
    result = Match()
    known: list[str] = []
    seen = set()
    for slot in slots(state):
        seen.add(slot.key)
        entry = manifest.objects.get(slot.key)
        known.append(slot.key)
        if entry is None:
            if selection.takes(slot.key):
                result.problems.append(f"missing in the checkpoint: {slot.key}")
            continue
        tree = _tree_of(entry.trees, rank=rank, per_rank=entry.per_rank)
        if tree is None:
            (result.kept if slot.per_rank else result.borrowed).append(slot.key)
            if slot.per_rank:
                continue
            tree = entry.trees[0]
        content = _decoded(slot.key, tree, result)
        if content is None and tree is not None:
            continue
        if not selection.is_all:
            known += _names_below(slot, content)
        _match_slot(slot, content, manifest, selection, result)
    for key, entry in manifest.objects.items():
        known.append(key)
        if key not in seen and key != names.RNG and selection.takes(key) and not _is_part_of(key, selection):
            result.problems.append(f"not in the state: {key} ({entry.kind})")
    _match_rng(manifest, rank, selection, result, rng=rng)
    selection.check(known)
    return result


def _match_rng(manifest: Manifest, rank: int, selection: Selection, result: Match, *, rng: bool) -> None:
    entry = manifest.objects.get(names.RNG)
    if entry is None or not rng or not selection.takes(names.RNG):
        return
    tree = _tree_of(entry.trees, rank=rank, per_rank=entry.per_rank)
    if tree is not None:
        slot = Slot(key=names.RNG, value=RandomState(), per_rank=True, parent=None, place=None)
        content = _decoded(names.RNG, tree, result)
        result.parts.append(Part(slot=slot, content=content))


def _decoded(key: str, tree: Json, result: Match) -> Any:
    """Return a value with a `Reference` for each tensor; None, with a problem, if the tree stands for none."""
    try:
        return decode(tree, _reference)
    except ValueError as error:
        result.problems.append(f"{key}: the checkpoint holds what no save writes: {error}")
        return None


def _is_part_of(key: str, selection: Selection) -> bool:
    """Say whether `only` picks single entries below `key`, so that the key as a whole is not meant."""
    return bool(selection.only) and not _any(selection.only, key)


def _tree_of(trees: Sequence[Json], *, rank: int, per_rank: bool) -> Json | None:
    if not per_rank:
        return trees[0]
    return trees[rank] if rank < len(trees) else None


def _names_below(slot: Slot, content: Any) -> list[str]:
    if isinstance(content, dict):
        return [f"{slot.key}.{name}" for name in content]
    return []


def _match_slot(slot: Slot, content: Any, manifest: Manifest, selection: Selection, result: Match) -> None:
    found = kind_of(slot.value)
    if found == "module":
        _match_module(slot, content, manifest, selection, result)
        return
    below = [] if selection.is_all else _names_below(slot, content) or [slot.key]
    taken = [name for name in below if selection.takes(name)]
    if below and not taken:
        return
    whole = len(taken) == len(below)
    if not whole and (found != "value" or not isinstance(slot.value, dict)):
        result.problems.append(f"{slot.key}: patterns can pick parts of modules and dicts, not of this {found}")
        return
    if not whole:
        content = {name: item for name, item in content.items() if f"{slot.key}.{name}" in taken}
    is_row = False
    if found == "optimizer":
        _match_optimizer(slot, content, manifest, result)
    elif found == "value":
        is_row = _match_value(slot.key, slot.value, content, manifest, result)
    result.parts.append(Part(slot=slot, content=content, whole=whole, is_row=is_row))


def _match_module(slot: Slot, content: Any, manifest: Manifest, selection: Selection, result: Match) -> None:
    module: nn.Module = slot.value
    if not isinstance(content, dict):
        result.problems.append(f"{slot.key}: the checkpoint holds a {type(content).__name__}, the state a module")
        return
    expected, _, in_place = module_state(module)
    if in_place and selection.is_all and _match_row(expected, content, manifest, result):
        result.parts.append(Part(slot=slot, content=content, is_row=True))
        return
    is_row = in_place
    chosen: dict[str, Any] = {}
    for name, target in expected.items():
        full = f"{slot.key}.{name}"
        if not selection.takes(full):
            continue
        if name not in content:
            result.problems.append(f"missing in the checkpoint: {full}{_facts(target)}")
            continue
        stored = content[name]
        chosen[name] = stored
        if isinstance(target, torch.Tensor) and isinstance(stored, Reference):
            fits = _compare(full, target, manifest.tensors[stored.name], result)
            _remember(stored, target, result)
            if fits and in_place and _is_plain(target):
                is_row = result.targets.setdefault(stored.name, target) is target and is_row
            else:
                is_row = False
        elif isinstance(target, torch.Tensor) or isinstance(stored, Reference):
            result.problems.append(f"{full}: a tensor on one side, a value on the other")
        else:
            is_row = False
    result.problems += [
        f"not in the state: {slot.key}.{name}{_stored_facts(content[name], manifest)}"
        for name in sorted(content.keys() - expected.keys())
        if selection.takes(f"{slot.key}.{name}")
    ]
    if chosen or not expected:
        whole = len(chosen) == len(expected)
        result.parts.append(Part(slot=slot, content=chosen, whole=whole, is_row=is_row and whole))


def _match_optimizer(slot: Slot, content: Any, manifest: Manifest, result: Match) -> None:
    optimizer: torch.optim.Optimizer = slot.value
    saved = content.get("param_groups") if isinstance(content, dict) else None
    if not isinstance(saved, list) or not all(isinstance(group, dict) and "params" in group for group in saved):
        result.problems.append(f"{slot.key}: the checkpoint holds no optimizer state")
        return
    state = content.get("state")
    if (
        not all(isinstance(group["params"], list) and set(map(type, group["params"])) <= {int} for group in saved)
        or not isinstance(state, dict)
        or not all(isinstance(state.get(index, {}), dict) for group in saved for index in group["params"])
    ):
        result.problems.append(f"{slot.key}: the checkpoint's optimizer state is malformed")
        return
    here = [len(group["params"]) for group in optimizer.param_groups]
    there = [len(group["params"]) for group in saved]
    if here != there:
        result.problems.append(
            f"{slot.key}: the checkpoint has {len(there)} parameter groups of {there} parameters, "
            f"the optimizer {len(here)} of {here}"
        )
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [index for group in saved for index in group["params"]]
    for index, parameter in zip(order, parameters, strict=True):
        known, shape = optimizer.state.get(parameter, {}), parameter.shape
        for name, stored in state.get(index, {}).items():
            if type(stored) is not Reference:
                continue
            entry = manifest.tensors[stored.name]
            here_now = known.get(name)
            if isinstance(here_now, torch.Tensor) and _fits(here_now, entry) and _is_plain(here_now):
                result.targets.setdefault(stored.name, here_now)
            if shape == entry.shape:
                _remember(stored, parameter, result)
            elif name in _ELEMENTWISE:
                result.problems.append(
                    f"{stored.name}: the checkpoint holds {entry.shape}, its parameter is {tuple(shape)}"
                )


def _match_value(key: str, value: Any, content: Any, manifest: Manifest, result: Match) -> bool:
    """Compare the tensors that stand at the same place on both sides; say whether it is one row of them."""
    if isinstance(value, torch.Tensor) and isinstance(content, Reference):
        if _compare(key, value, manifest.tensors[content.name], result) and _is_plain(value) and not content.array:
            result.targets.setdefault(content.name, value)
        _remember(content, value, result)
    elif isinstance(value, torch.Tensor):
        result.problems.append(f"{key}: the state has a tensor here, the checkpoint a {type(content).__name__}")
    elif isinstance(value, dict) and isinstance(content, dict):
        if _match_row(value, content, manifest, result):
            return True
        for name, inner in value.items():
            if name in content:
                _match_value(f"{key}.{name}", inner, content[name], manifest, result)
    elif isinstance(value, (list, tuple)) and isinstance(content, (list, tuple)):
        for index, (one, other) in enumerate(zip(value, content, strict=False)):
            _match_value(f"{key}.{index}", one, other, manifest, result)
    return False


def _match_row(value: dict[Any, Any], content: dict[Any, Any], manifest: Manifest, result: Match) -> bool:
    """Match dicts of the same keys that hold plain tensors only, all at once; say whether they are such, and fit.

    Each tensor then is the target of its entry.
    """
    tensors, stored = list(value.values()), list(content.values())
    if not (set(map(type, tensors)) <= {torch.Tensor} and set(map(type, stored)) <= {Reference}):
        return False
    entries = [manifest.tensors[reference.name] for reference in stored]
    fit = (
        value.keys() == content.keys()
        and list(value) == list(content)
        and [tensor.shape for tensor in tensors] == [entry.shape for entry in entries]
        and [tensor.dtype for tensor in tensors] == [DTYPES[entry.dtype] for entry in entries]
        and all(map(_is_plain, tensors))
        and not any(reference.array for reference in stored)
    )
    if fit:
        targets = result.targets
        for tensor, (name, _) in zip(tensors, stored, strict=True):
            fit = targets.setdefault(name, tensor) is tensor and fit
    return fit


def _remember(stored: Reference, target: torch.Tensor, result: Match) -> None:
    if isinstance(target, DTensor):
        result.likes[stored.name] = target


def _fits(target: torch.Tensor, entry: TensorEntry) -> bool:
    return target.shape == entry.shape and DTYPE_NAMES.get(target.dtype) == entry.dtype


def _is_plain(target: torch.Tensor) -> bool:
    """Say whether what lies in a tensor's memory are its values."""
    return not (target.is_conj() or target.is_neg())


def _compare(name: str, target: torch.Tensor, entry: TensorEntry, result: Match) -> bool:
    """Say whether a tensor of the state fits; if not, that is a problem."""
    if _fits(target, entry):
        return True
    result.problems.append(f"{name}: the checkpoint holds{_entry_facts(entry)}, the state expects{_facts(target)}")
    return False


def _facts(target: Any) -> str:
    if not isinstance(target, torch.Tensor):
        return ""
    return f" {tuple(target.shape)} {str(target.dtype).removeprefix('torch.')}"


def _stored_facts(stored: Any, manifest: Manifest) -> str:
    return _entry_facts(manifest.tensors[stored.name]) if isinstance(stored, Reference) else ""


def _entry_facts(entry: TensorEntry) -> str:
    return f" {entry.shape} {str(DTYPES[entry.dtype]).removeprefix('torch.')}"


def _reference(tag: str, name: str) -> Reference:
    return Reference(name, tag == "$array")


def references(content: Any) -> Iterator[Reference]:
    """Yield the references in a decoded value, in the order in which they stand there.

    Ranks: any.
    """
    waiting = [content]
    while waiting:
        node = waiting.pop()
        if type(node) is Reference:
            yield node
        elif isinstance(node, dict):
            waiting.extend(reversed(node.values()))
        elif isinstance(node, (list, tuple)):
            waiting.extend(reversed(node))

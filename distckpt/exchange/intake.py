"""Intake: what another tool wrote, read without running code and committed as a checkpoint.

Invariant: nothing is committed that was not read whole; tensors keep names, dtypes, shapes and bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from distckpt import catalog, names
from distckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigError,
    StorageError,
    UnsupportedStateError,
    UsageError,
)
from distckpt.exchange import reading
from distckpt.exchange.chosen import references
from distckpt.exchange.nested import normal
from distckpt.exchange.record import KEY, Record
from distckpt.manifest import Manifest, ObjectEntry
from distckpt.shards import Header, assemble, own_share, publish, write_share
from distckpt.staging import stage_once
from distckpt.storage import Storage
from distckpt.tensors import check_storable
from distckpt.values import Json, encode, rename

Format = Literal["auto", "torch", "safetensors", "dcp"]
FORMATS: tuple[Format, ...] = get_args(Format)
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(slots=True, kw_only=True)
class Taken:
    """What is to become a checkpoint.

    Attributes:
        objects: The state's keys.
        tensors: Tensor entries by name.
        record: What an export of distckpt's said of it; None of a file of somebody else's.
        dropped: What wrappers had put before names, and was dropped, by key.
    """

    objects: dict[str, ObjectEntry] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    record: Record | None = None
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def read(source: str, *, form: Format = "auto", key: str = "model", renamed: Mapping[str, str] | None = None) -> Taken:
    """Return what another tool wrote, as entries.

    An export of distckpt's comes back as the checkpoint that it was. Of other files, a dict of tensors alone is a
    model's, and stands under `key`; of any other dict each item is a key of the state. What DDP and torch.compile put
    before all of a model's names is dropped.

    Args:
        source: A file of torch.save or safetensors, or a folder of safetensors files or DCP's; a local path.
        form: What it is; "auto" looks.
        key: The key of bare weights.
        renamed: New names for keys of the state, by the old ones.

    Raises:
        ConfigError: The path is a URL, or a key to be renamed is not there.
        UnsafeFileError: It holds more than tensors and plain values; nothing of it was run.
        CheckpointDamagedError: It is not whole.
        UnsupportedStateError: It holds something that distckpt does not save; names the key.
        StorageError: It is not there, or cannot be read.

    Ranks: any; it takes memory for all tensors.
    """
    if "://" in source:
        raise ConfigError(source="SRC", problem=f"{source!r} is no local path", fix="copy it to this machine first")
    path = Path(source).expanduser()
    if not path.exists():
        raise StorageError(path=source, action="read", cause="there is no such file or directory")
    form = reading.recognized(path) if form == "auto" else form
    match form:
        case "safetensors":
            taken = _from_tensors(reading.safetensors(path), key)
        case "dcp":
            taken = _from_dcp(reading.dcp(path), key)
        case "torch":
            taken = _from_nested(reading.torch_file(path), key)
        case _:
            raise ConfigError(source="format", problem=f"must be one of {', '.join(FORMATS)}, is {form!r}")
    return _with_new_keys(taken, renamed or {})


def commit(taken: Taken, storage: Storage, *, step: int | None = None) -> tuple[str, Manifest]:
    """Commit what was read as a checkpoint, and return its folder in the storage and its manifest.

    Args:
        taken: What `read` returned.
        storage: A run's directory, or a folder whose name states its step.
        step: Optimizer steps completed; by default what the export says, or else 0.

    Raises:
        CheckpointExistsError: There is a checkpoint of that step.
        ConfigError: The folder's name states another step.
        UnsupportedStateError: A tensor cannot be stored; names it.
        StorageError: It could not be written.

    Ranks: rank 0, alone; it takes memory for all tensors once more.
    """
    record = taken.record
    named = names.parse_step(storage.url.rstrip("/").rpartition("/")[2])
    if step is None:
        step = record.step if record else named or 0
    if named not in (None, step):
        raise ConfigError(source="step", problem=f"{storage.url!r} is the folder of step {named}, not {step}")
    folder = "" if named is not None else names.step_name(step)
    _refuse_existing(storage, folder)
    for name, tensor in taken.tensors.items():
        check_storable(tensor, name)
    attempt = names.new_attempt()
    share = own_share(taken.tensors, rank=0, num_writers=1)
    staged = stage_once(share) if share else None
    header = Header(
        step=step,
        run=names.new_attempt(),
        attempt=attempt,
        layout="full",
        world_size=record.world_size if record else 1,
        objects=taken.objects,
        metrics=record.metrics if record else {},
        config=record.config if record else None,
    )
    tried = False
    try:
        manifest = assemble(header, [write_share(storage, folder, attempt, rank=0, staged=staged)])
        tried = True
        publish(storage, folder, manifest)
    except BaseException:
        if not tried:
            with contextlib.suppress(Exception):
                catalog.remove_attempt(storage, folder, attempt)
        raise
    return folder, manifest


def _refuse_existing(storage: Storage, folder: str) -> None:
    try:
        there = catalog.read_manifest(storage, folder)
    except CheckpointNotFoundError:
        return
    raise CheckpointExistsError(
        path=names.join(storage.url, folder, names.MANIFEST),
        found=f"attempt {there.attempt} of run {there.run}",
        fix="import it as another step (--step N), or to a directory of its own",
    )


def _from_tensors(found: reading.Tensors, key: str) -> Taken:
    """Return what flat tensors are: an export's whole checkpoint, or a model."""
    record = found.record
    if record is not None and _fits(record, {name: name for name in found.tensors}):
        return Taken(objects=record.objects, tensors=found.tensors, record=record)
    taken = Taken()
    _add(taken, key, found.tensors, "module")
    return taken


def _from_dcp(found: reading.DcpContent, key: str) -> Taken:
    record = found.record
    if record is not None:
        places, tensors = _dcp_names(record), found.tensors()
        if _fits(record, places) and {*places.values()} <= tensors.keys():
            chosen = {name: tensors[place] for name, place in places.items()}
            return Taken(objects=record.objects, tensors=chosen, record=record)
    return _from_nested({name: item for name, item in found.nested.items() if name != KEY or record is None}, key)


def _dcp_names(record: Record) -> dict[str, str]:
    """Return by the checkpoint's name of each tensor the name that DCP has for it."""
    places = {}
    for key, entry in record.objects.items():
        for rank, tree in enumerate(entry.trees):
            for name, stored in references(tree, f"{key}.{rank}" if entry.per_rank else key):
                places[stored] = name
    return places


def _fits(record: Record, known: Mapping[str, str]) -> bool:
    """Say whether a record's values speak of just the tensors that are there."""
    if not record.objects or not all(_has_trees(entry, record.world_size) for entry in record.objects.values()):
        return False
    spoken = {
        stored for key, entry in record.objects.items() for tree in entry.trees for _, stored in references(tree, key)
    }
    return spoken == known.keys()


def _has_trees(entry: ObjectEntry, world_size: int) -> bool:
    return len(entry.trees) == (world_size if entry.per_rank else 1)


def _from_nested(content: Mapping[str, Any], key: str) -> Taken:
    """Return what a nested dict is: an export's checkpoint, a model's weights, or a state of several keys."""
    record = reading.parse_record(content.get(KEY))
    items = {name: item for name, item in content.items() if not (name == KEY and record is not None)}
    taken = Taken(record=record)
    if record is None and items and all(isinstance(item, torch.Tensor) for item in items.values()):
        _add(taken, key, items, "module")
        return taken
    for name, item in items.items():
        if not isinstance(name, str) or not name:
            raise UsageError(problem=f"it has the key {name!r}; keys of a state are non-empty strings")
        known = record.objects.get(name) if record else None
        by_rank = known is not None and known.per_rank and isinstance(item, list)
        if record is not None and by_rank and len(item) == record.world_size:
            _add_by_rank(taken, name, item, known.kind if known else "value")
        else:
            _add(taken, name, item, known.kind if known else _kind(item))
        if known is not None:
            taken.objects[name] = _recorded(known, taken.objects[name], name)
    return taken


def _recorded(known: ObjectEntry, found: ObjectEntry, key: str) -> ObjectEntry:
    """Return what the record has for a key, if the file still says the same: it knows NumPy's types from torch's."""
    if known.per_rank != found.per_rank or len(known.trees) != len(found.trees):
        return found
    try:
        is_same = [normal(tree, key) for tree in known.trees] == list(found.trees)
    except (ValueError, TypeError, RecursionError, UnsupportedStateError):
        return found
    return known if is_same else found


def _kind(item: Any) -> str:
    """Return what an item looks like: a module's state, an optimizer's, or a value."""
    if isinstance(item, dict) and item:
        if {"state", "param_groups"} <= item.keys():
            return "optimizer"
        if all(isinstance(name, str) and isinstance(inner, torch.Tensor) for name, inner in item.items()):
            return "module"
    return "value"


def _add(taken: Taken, key: str, item: Any, kind: str) -> None:
    if kind == "module" and taken.record is None:
        prefix = next((prefix for prefix in _WRAPPERS if all(name.startswith(prefix) for name in item)), None)
        if prefix is not None:
            item = {name.removeprefix(prefix): inner for name, inner in item.items()}
            taken.dropped[key] = prefix
    taken.objects[key] = ObjectEntry(kind=kind, trees=(_encoded(taken, key, item),))


def _add_by_rank(taken: Taken, key: str, items: list[Any], kind: str) -> None:
    trees = []
    for rank, item in enumerate(items):
        alone = Taken()
        tree = _encoded(alone, key, item)
        prefix = f"rank-{rank:05d}:"
        taken.tensors.update({prefix + name: tensor for name, tensor in alone.tensors.items()})
        trees.append(rename(tree, prefix.__add__))
    taken.objects[key] = ObjectEntry(kind=kind, trees=tuple(trees), per_rank=True)


def _encoded(taken: Taken, key: str, item: Any) -> Json:
    """Return an item as JSON; its tensors become entries, those that share all their memory one."""
    seen: dict[tuple[Any, ...], str] = {}

    def leaf(name: str, value: Any) -> Json | None:
        if not isinstance(value, torch.Tensor):
            return None
        check_storable(value, name)
        same = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and same in seen:
            return {"$tensor": seen[same]}
        if name in taken.tensors:
            raise UsageError(problem=f"two of its tensors have the name {name!r}", fix="rename one of them")
        seen[same] = name
        taken.tensors[name] = value.detach()
        return {"$tensor": name}

    return encode(item, key, leaf)


def _with_new_keys(taken: Taken, renamed: Mapping[str, str]) -> Taken:
    """Return what was read, with keys renamed, and so their tensors."""
    for old, new in renamed.items():
        if old not in taken.objects:
            known = ", ".join(sorted(taken.objects))
            raise ConfigError(source="rename", problem=f"there is no key {old!r}; there is {known}")
        if new in taken.objects:
            raise ConfigError(source="rename", problem=f"there is a key {new!r} already")

        def changed(name: str, old: str = old, new: str = new) -> str:
            rank, separator, rest = name.rpartition(":") if name.startswith("rank-") else ("", "", name)
            rest = new + rest.removeprefix(old) if rest == old or rest.startswith(f"{old}.") else rest
            return f"{rank}{separator}{rest}"

        entry = taken.objects.pop(old)
        taken.objects[new] = replace(entry, trees=tuple(rename(tree, changed) for tree in entry.trees))
        taken.tensors = {changed(name): tensor for name, tensor in taken.tensors.items()}
    return taken

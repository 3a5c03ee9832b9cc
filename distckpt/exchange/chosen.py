"""What of a checkpoint is exported: all of it, one key of its state, or the entries that patterns name.

Invariant: an entry's name here is the one that the user's state has for it: tied weights have each of their names.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from distckpt import names, trees
from distckpt.arrays import Source
from distckpt.errors import ConfigError
from distckpt.manifest import ObjectEntry
from distckpt.values import Json

_NOTHING = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A checkpoint, and what of it is exported.

    Attributes:
        source: The checkpoint.
        objects: The keys that are exported, each with what is exported of it.
        key: The one key that is exported, whose entries then have their own names, without it.
        whole: Whether it is all of the checkpoint.
    """

    source: Source
    objects: dict[str, ObjectEntry]
    key: str | None
    whole: bool

    def tensors(self) -> dict[str, str]:
        """Return, by the name that it goes out under, the name of each tensor in the checkpoint.

        Ranks: any.
        """
        if self.whole:
            return {name: name for name in self.source.manifest.tensors}
        found = {}
        for key, entry in self.objects.items():
            for rank, tree in enumerate(entry.trees):
                prefix = f"rank-{rank:05d}:" if entry.per_rank else ""
                for name, stored in references(tree, key):
                    found[prefix + (name.removeprefix(f"{key}.") if self.key else name)] = stored
        return found

    @property
    def num_values(self) -> int:
        """How many values that are no tensors are chosen."""
        leaves = [leaf for entry in self.objects.values() for tree in entry.trees for leaf in trees.leaves(tree)]
        return sum(trees.reference(leaf) is None for leaf in leaves)

    @property
    def num_bytes(self) -> int:
        """The size of the chosen tensors; of one that has two names once."""
        return sum(self.source.manifest.tensors[name].num_bytes for name in {*self.tensors().values()})


def choose(source: Source, *, key: str | None = None, only: Sequence[str] = ()) -> Chosen:
    """Return what is to be exported.

    Args:
        source: The checkpoint.
        key: One key of the state, such as "model"; its entries lose it in their names.
        only: Shell patterns over entries' names in the state ("model.fc.*"); a name also stands for all below it.

    Raises:
        ConfigError: The checkpoint has no such key, or a pattern fits nothing.

    Ranks: any.
    """
    objects = source.manifest.objects
    if key is not None:
        if key not in objects:
            near = difflib.get_close_matches(key, objects, n=1)
            raise ConfigError(
                source="key",
                problem=f"the checkpoint has no key {key!r}; it has {', '.join(sorted(objects))}",
                fix=f"--key {near[0]}" if near else None,
            )
        objects = {key: objects[key]}
    if not only:
        return Chosen(source=source, objects=dict(objects), key=key, whole=key is None)
    _refuse_idle(only, objects)
    kept = {}
    for name, entry in objects.items():
        cut = [_cut(tree, name, lambda inner: matches(only, inner)) for tree in entry.trees]
        if any(tree is not _NOTHING for tree in cut):
            full = tuple({} if tree is _NOTHING else tree for tree in cut)
            kept[name] = ObjectEntry(kind=entry.kind, per_rank=entry.per_rank, trees=full)
    return Chosen(source=source, objects=kept, key=key, whole=False)


def default_key(source: Source) -> str:
    """Return the key of the model: "model", or the only module.

    Raises:
        ConfigError: There are several modules, or none.

    Ranks: any.
    """
    objects = source.manifest.objects
    modules = [key for key, entry in objects.items() if entry.kind == "module"]
    if "model" in objects:
        return "model"
    if len(modules) == 1:
        return modules[0]
    known = ", ".join(modules or [key for key in sorted(objects) if key != names.RNG]) or "none"
    raise ConfigError(source="key", problem=f"which of the state's keys is the model? {known}", fix="--key NAME")


def matches(patterns: Sequence[str], name: str) -> bool:
    """Say whether a pattern names an entry, or what it stands below.

    Ranks: any.
    """
    return any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def references(tree: Json, name: str) -> Iterator[tuple[str, str]]:
    """Yield the name that each tensor has in a value called `name`, and the name that the checkpoint has for it.

    Ranks: any.
    """
    for inner, leaf in _leaves(tree, name):
        stored = trees.reference(leaf)
        if stored is not None:
            yield inner, stored


def _leaves(tree: Json, name: str) -> Iterator[tuple[str, Json]]:
    container = trees.opened(tree)
    if container is None:
        yield name, tree
        return
    for key, item in container[1].items():
        yield from _leaves(item, f"{name}.{trees.label(key)}")


def _refuse_idle(only: Sequence[str], objects: Mapping[str, ObjectEntry]) -> None:
    """Refuse a pattern that fits nothing: it is a slip."""
    known = [name for key, entry in objects.items() for tree in entry.trees for name, _ in _leaves(tree, key)]
    for pattern in only:
        if not any(matches((pattern,), name) for name in (*objects, *known)):
            fix = f"entries are named like {known[0]!r}" if known else None
            raise ConfigError(source="only", problem=f"the pattern {pattern!r} fits no entry", fix=fix)


def _cut(tree: Json, name: str, takes: Callable[[str], bool]) -> Json:
    """Return what of a tree is taken; of a list that is cut, a dict with what is left of it by index."""
    if takes(name):
        return tree
    container = trees.opened(tree)
    if container is None:
        return _NOTHING
    pairs = []
    for key, item in container[1].items():
        kept = _cut(item, f"{name}.{trees.label(key)}", takes)
        if kept is not _NOTHING:
            pairs.append([json.loads(key), kept])
    return {"$dict": pairs} if pairs else _NOTHING

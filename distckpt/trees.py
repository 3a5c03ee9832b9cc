"""Trees: the values of a checkpoint as the manifest has them, opened for looking at rather than for giving back.

Invariant: any JSON is a tree; what `values.encode` does not make is a leaf, never an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from distckpt.values import Json, decode

Container = Literal["dict", "Counter", "list", "tuple"]

_MAPPINGS: dict[str, Container] = {"$dict": "dict", "$counter": "Counter"}


def opened(tree: Json) -> tuple[Container, dict[str, Json]] | None:
    """Return what kind of container a tree is and its items, in order; None if it is a leaf.

    The items stand under `exact_text` of their keys, or under their index.
    """
    if isinstance(tree, list):
        return "list", {str(index): item for index, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return None
    tag = next(iter(tree), "")
    if not tag.startswith("$"):
        return "dict", {exact_text(name): item for name, item in tree.items()}
    body = tree[tag]
    if not isinstance(body, list):
        return None
    if tag == "$tuple":
        return "tuple", {str(index): item for index, item in enumerate(body)}
    if tag in _MAPPINGS and all(isinstance(pair, list) and len(pair) == 2 for pair in body):
        return _MAPPINGS[tag], {exact_text(name): item for name, item in body}
    return None


def reference(tree: Json) -> str | None:
    """Return the name of the tensor that stands in this place; None if none does."""
    if isinstance(tree, dict) and len(tree) == 1:
        tag, name = next(iter(tree.items()))
        if tag in ("$tensor", "$array") and isinstance(name, str):
            return name
    return None


def leaves(tree: Json) -> Iterator[Json]:
    """Yield every leaf: plain values, references, and empty containers."""
    container = opened(tree)
    if container is None or not container[1]:
        yield tree
        return
    for item in container[1].values():
        yield from leaves(item)


def exact_text(tree: Json) -> str:
    """Return JSON as text that is equal for equal values only: 1, 1.0 and true differ, as do 0.0 and -0.0."""
    return json.dumps(tree, sort_keys=True)


def label(key: str) -> str:
    """Return the name of an item that `opened` has under `key`."""
    name = json.loads(key)
    return name if isinstance(name, str) else key if isinstance(name, int) else repr(plain(name))


def plain(tree: Json) -> Any:
    """Return the value that a tree stands for, with `Absent` where its tensors stand; the tree itself if it is odd."""
    try:
        return decode(tree, lambda _, name: Absent(name))
    except (ValueError, TypeError, RecursionError):
        return tree


class Absent:
    """Stands where a tensor does that was not read."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"

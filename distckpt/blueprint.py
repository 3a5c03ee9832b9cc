"""Blueprints: how an object of the state was made up at the save before, so that the next one need not find out again.

Most saves of a run see the same names, shapes and dtypes, and mostly the same plain values. A blueprint goes through
the new content side by side with what it knows: if the structure is the same it gathers the tensors, and encodes only
the plain values that have changed; if not, it says so, and everything is encoded anew.
Invariant: what a blueprint returns is, to the letter, what encoding anew would have returned.
Source: for 20,000 tensors it takes 0.01 s instead of 0.25.
"""

from __future__ import annotations

import marshal
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from distckpt.manifest import to_text
from distckpt.values import Json, encode

_MARSHAL_VERSION = 2  # the last one whose bytes depend on nothing but the value
_DICTS = (dict, OrderedDict, defaultdict)
_PLAIN = (bool, int, float, str, type(None))
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_ROW_TENSORS = frozenset({*_TENSORS, DTensor})


class Unknown(Exception):  # noqa: N818  no error: it never leaves this package's floor
    """Raised for what a blueprint cannot hold, or for content that is not the one it knows."""


class _Node:
    """A part of the content, as JSON and as text."""

    __slots__ = ("text", "tree")
    tree: Json
    text: str

    def follow(self, value: Any, tensors: list[torch.Tensor]) -> bool:
        """Take in `value`, append its tensors, and say whether the JSON is another than before.

        Raises:
            Unknown: The structure is another one.
        """
        raise NotImplementedError


class _Plain(_Node):
    """Values without tensors."""

    __slots__ = ("_key", "_seen")

    def __init__(self, value: Any, key: str, tree: Json) -> None:
        self.tree, self.text = tree, to_text(tree)
        self._key = key
        self._seen = _seen(value)

    def follow(self, value: Any, tensors: list[torch.Tensor]) -> bool:
        seen = _seen(value)
        if seen is not None and seen == self._seen:
            return False
        self.tree = encode(value, self._key, _no_tensor)
        self._seen = seen
        text = to_text(self.tree)
        if text == self.text:
            return False
        self.text = text
        return True


def _seen(value: Any) -> bytes | None:
    """Return bytes that are the same for two values only if these are the same, types included; None if unsure."""
    kind = type(value)
    if kind in _PLAIN or kind in (list, tuple, dict):
        try:
            return None if _holds_bytes(value) else marshal.dumps(value, _MARSHAL_VERSION)
        except ValueError:
            return None
    return None


def _holds_bytes(value: Any) -> bool:
    """Say whether there may be bytes in a value: marshal takes NumPy's scalars for such."""
    kind = type(value)
    if kind is dict:
        return any(map(_holds_bytes, value)) or any(map(_holds_bytes, value.values()))
    if kind in (list, tuple):
        return not _PLAIN_SET.issuperset(set(map(type, value))) and any(map(_holds_bytes, value))
    return kind not in _PLAIN_SET


_PLAIN_SET = frozenset(_PLAIN)


def _no_tensor(key: str, value: Any) -> Json | None:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        raise Unknown(key)
    return None


class _Tensor(_Node):
    """One tensor, or NumPy array."""

    __slots__ = ("_facts",)

    def __init__(self, value: Any, tree: Json) -> None:
        self.tree, self.text = tree, to_text(tree)
        self._facts = _facts(value)

    def follow(self, value: Any, tensors: list[torch.Tensor]) -> bool:
        if _facts(value) != self._facts:
            raise Unknown
        tensors.append(value)
        return False


def _facts(value: Any) -> tuple[Any, ...]:
    if isinstance(value, np.ndarray):
        return type(value), value.dtype, value.shape
    if isinstance(value, DTensor):
        return type(value), value.dtype, value.shape, value.device_mesh, tuple(value.placements), value.device
    return type(value), value.dtype, value.shape, value.layout, value.device


class _Container(_Node):
    """A dict, list or tuple that holds tensors."""

    __slots__ = ("_children", "_keys", "_kind", "_row", "_types")

    def __init__(self, value: Any, children: Sequence[_Node]) -> None:
        self._kind = type(value)
        self._keys = _keys(value)
        # Keys that are equal need not be the same: 1 == True. Only strings are equal to strings alone.
        self._types = None if not self._keys or set(map(type, self._keys)) == {str} else list(map(type, self._keys))
        self._children = list(children)
        self._row = _Row.of(_items(value)) if all(type(child) is _Tensor for child in children) else None
        self._join()

    def follow(self, value: Any, tensors: list[torch.Tensor]) -> bool:
        if type(value) is not self._kind or _keys(value) != self._keys:
            raise Unknown
        if self._types is not None and list(map(type, value)) != self._types:
            raise Unknown
        items = _items(value)
        if self._row is not None:
            self._row.follow(items)
            tensors += items
            return False
        if len(items) != len(self._children):
            raise Unknown
        changed = False
        for child, item in zip(self._children, items, strict=True):
            changed |= child.follow(item, tensors)
        if changed:
            self._join()
        return changed

    def _join(self) -> None:
        """Make the JSON from that of the children, as `values.encode` does."""
        trees, texts = [c.tree for c in self._children], [c.text for c in self._children]
        if self._keys is None:
            joined = f"[{','.join(texts)}]"
            self.tree, self.text = (
                (trees, joined) if self._kind is list else ({"$tuple": trees}, f'{{"$tuple":{joined}}}')
            )
            return
        names = self._keys
        sorted_text = all(type(n) is str and not n.startswith("$") for n in names) and names == sorted(names)
        if sorted_text:
            self.tree = dict(zip(names, trees, strict=True))
            self.text = "{" + ",".join(f"{to_text(n)}:{t}" for n, t in zip(names, texts, strict=True)) + "}"
            return
        keys = [encode(name, "", _no_tensor) for name in names]
        self.tree = {"$dict": [[key, tree] for key, tree in zip(keys, trees, strict=True)]}
        pairs = ",".join(f"[{to_text(key)},{text}]" for key, text in zip(keys, texts, strict=True))
        self.text = f'{{"$dict":[{pairs}]}}'


class _Row:
    """Tensors side by side, compared all at once."""

    __slots__ = ("_devices", "_dtypes", "_layouts", "_places", "_shapes", "_specs", "_types")

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._specs = _specs(tensors)
        self._places = _places(tensors) if self._specs else []
        self._types = [type(t) for t in tensors]
        self._dtypes = [t.dtype for t in tensors]
        self._shapes = [t.shape for t in tensors]
        self._devices = [t.device for t in tensors]
        self._layouts = [t.layout for t in tensors]

    @classmethod
    def of(cls, values: Sequence[Any]) -> _Row | None:
        """Return the row of plain tensors and DTensors, or None if some are neither."""
        return cls(values) if all(type(value) in _ROW_TENSORS for value in values) else None

    def follow(self, values: Sequence[Any]) -> None:
        if (
            [type(t) for t in values] != self._types
            or [t.dtype for t in values] != self._dtypes
            or [t.shape for t in values] != self._shapes
            or [t.device for t in values] != self._devices
            or [t.layout for t in values] != self._layouts
        ):
            raise Unknown
        if self._specs:
            specs = _specs(values)
            if not all(map(operator.is_, specs, self._specs)):
                if _places(values) != self._places:
                    raise Unknown
                self._specs = specs


def _specs(values: Sequence[Any]) -> list[Any]:
    """Return what each DTensor keeps of how it lies, mostly the same object as before; nothing, if there is none."""
    if DTensor not in set(map(type, values)):
        return []
    return [t._spec if type(t) is DTensor else None for t in values]


def _places(values: Sequence[Any]) -> list[Any]:
    """Return how each DTensor lies on its mesh."""
    return [(t.device_mesh, tuple(t.placements)) if type(t) is DTensor else None for t in values]


def _keys(value: Any) -> list[Any] | None:
    """Return a dict's keys in order; None for a list or tuple."""
    return list(value) if type(value) in _DICTS else None


def _items(value: Any) -> list[Any]:
    return list(value.values()) if type(value) in _DICTS else list(value)


class Blueprint:
    """How one object was made up.

    Args:
        content: Its content, just encoded.
        key: Its key in the state.
        tree: The JSON of it.
        shares_memory: Whether tensors that share memory were stored once.

    Raises:
        Unknown: It has parts that a blueprint cannot hold.
    """

    def __init__(self, content: Any, key: str, tree: Json, *, shares_memory: bool) -> None:
        self._root = _build(content, key, tree)
        self._shares_memory = shares_memory
        tensors: list[torch.Tensor] = []
        self._root.follow(content, tensors)
        self._ties = _ties(tensors) if shares_memory else None

    @property
    def tree(self) -> Json:
        """The content as JSON."""
        return self._root.tree

    @property
    def text(self) -> str:
        """The content as JSON text."""
        return self._root.text

    def follow(self, content: Any) -> list[Any] | None:
        """Take in new content of the same structure, and return its tensors and arrays; None if it is another.

        Of tensors that share memory, where that counts, only the first is returned.

        Raises:
            UnsupportedStateError: A plain value cannot be saved; the blueprint is then of no use any more.

        Ranks: any.
        """
        tensors: list[Any] = []
        try:
            self._root.follow(content, tensors)
        except (Unknown, AttributeError):
            return None
        if self._ties is None:
            return tensors
        if _ties(tensors) != self._ties:
            return None
        return tensors if not self._ties else [t for i, t in enumerate(tensors) if i not in self._ties]


def _ties(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """Return, for each tensor that is the same memory as an earlier one, which that is."""
    if all(type(t) in _TENSORS for t in tensors):
        places = [place for t in tensors if (place := t.data_ptr())]  # empty ones have none
        if len(set(places)) == len(places):
            return {}
    first: dict[tuple[Any, ...], int] = {}
    ties = {}
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            continue
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        same = (part.data_ptr(), part.device, part.dtype, tuple(part.shape), part.stride())
        if first.setdefault(same, index) != index:
            ties[index] = first[same]
    return ties


def _build(value: Any, key: str, tree: Json) -> _Node:
    """Return the node of `value`, whose JSON is `tree`."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _Tensor(value, tree)
    if not _holds_tensors(value):
        return _Plain(value, key, tree)
    parts = zip(_names(value), _items(value), _parts(tree), strict=True)
    return _Container(value, [_build(item, f"{key}.{name}", part) for name, item, part in parts])


def _holds_tensors(value: Any) -> bool:
    """Say whether a value is a container with tensors in it; one of a rarer kind only shows when it is encoded."""
    kind = type(value)
    if kind not in (*_DICTS, list, tuple):
        return False
    items = _items(value)
    if _PLAIN_SET.issuperset(map(type, items)):
        return False
    return any(isinstance(item, (torch.Tensor, np.ndarray)) or _holds_tensors(item) for item in items)


def _names(value: Any) -> Sequence[Any]:
    return list(value) if type(value) in _DICTS else range(len(value))


def _parts(tree: Json) -> list[Json]:
    """Return the JSON of a container's items, in order."""
    if isinstance(tree, list):
        return tree
    if "$tuple" in tree and len(tree) == 1:
        return list(tree["$tuple"])
    if "$dict" in tree and len(tree) == 1:
        return [item for _, item in tree["$dict"]]
    return list(tree.values())

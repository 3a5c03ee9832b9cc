"""Values as JSON and back, exactly: the tree of a state object, with its tensors as references.

A mapping with plain, sorted string keys is a JSON object.
Everything that JSON does not know carries a tag, a key that begins with "$":

| tag | holds |
|---|---|
| `$tensor`, `$array` | the name of a tensor entry, to be given back as a tensor, or as a NumPy array |
| `$tuple` | a list of values |
| `$dict` | a list of [key, value] pairs: keys that are no strings, or an order that is not the sorted one |
| `$counter` | the same, for a `collections.Counter` |
| `$bytes` | base64 |
| `$float` | "nan", "inf" or "-inf" |
| `$numpy` | [dtype, value]: a NumPy scalar |

Invariant: `decode(encode(value)) == value`, types and the order of keys included; nothing in the JSON is ever executed.
"""

from __future__ import annotations

import base64
import math
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from distckpt.errors import UnsupportedStateError

if TYPE_CHECKING:
    import numpy as np  # imported below, where it is met: what lists checkpoints needs none

Json = Any
MAX_DEPTH = 200
_NUMPY_SCALARS = "?bhilqBHILQefdFD"  # NumPy's type codes that JSON can carry exactly
# Their names. NumPy itself would compile what stands in other ones: "(2,3)i4".
_NUMPY_NAMES = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
}
_FIX = "save its tensors and plain values instead, for instance through a state_dict() method"

Leaf = Callable[[str, Any], Json | None]


def encode(value: Any, key: str, leaf: Leaf) -> Json:
    """Return `value` as JSON.

    Args:
        value: None, bool, int, float, str, bytes, list, tuple, dict, NumPy scalar, or what `leaf` knows.
        key: The value's name in the state, for `leaf` and for errors.
        leaf: Is asked first, with (key, value), for everything that is no container or plain value.
            Returns the JSON for it, such as {"$tensor": name}, or None if it does not know the value.

    Raises:
        UnsupportedStateError: Something in it can be saved neither safely nor exactly; names the key.
    """
    return _encode(value, key, leaf, 0)


def _encode(value: Any, key: str, leaf: Leaf, depth: int) -> Json:
    if depth > MAX_DEPTH:
        raise UnsupportedStateError(key=key[:200], problem=f"is nested more than {MAX_DEPTH} deep", fix=_FIX)
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind in (bytes, bytearray):
        return {"$bytes": base64.b64encode(value).decode()}
    if _is_numpy_scalar(value):
        return _encode_numpy(value, key)
    if kind in (dict, OrderedDict, defaultdict, Counter):
        return _encode_mapping(value, key, leaf, depth)
    if kind is list:
        return [_encode(item, f"{key}.{index}", leaf, depth + 1) for index, item in enumerate(value)]
    if kind is tuple or (kind.__module__ == "torch" and isinstance(value, tuple)):  # torch.Size
        return {"$tuple": [_encode(item, f"{key}.{index}", leaf, depth + 1) for index, item in enumerate(value)]}
    known = leaf(key, value)
    if known is not None:
        return known
    name = f"{kind.__module__}.{kind.__qualname__}"
    raise UnsupportedStateError(key=key, problem=f"is a {name}, which cannot be saved safely and exactly", fix=_FIX)


def _is_numpy_scalar(value: Any) -> bool:
    numpy = sys.modules.get("numpy")  # where nobody has imported it there are none
    return numpy is not None and isinstance(value, numpy.generic)


def _encode_numpy(value: np.generic, key: str) -> Json:
    if value.dtype.char not in _NUMPY_SCALARS:
        raise UnsupportedStateError(key=key, problem=f"is a NumPy scalar of type {value.dtype}", fix=_FIX)
    item = value.item()
    if isinstance(item, complex):
        return {"$numpy": [value.dtype.name, repr(item.real), repr(item.imag)]}
    return {"$numpy": [value.dtype.name, repr(item) if isinstance(item, float) else item]}


def _encode_mapping(value: Mapping[Any, Any], key: str, leaf: Leaf, depth: int) -> Json:
    for name in value:
        if not (name is None or type(name) in (str, int, bool, float, tuple)):
            raise UnsupportedStateError(
                key=key, problem=f"has a key of type {type(name).__name__}", fix="use str or int keys"
            )
    pairs = [(name, _encode(item, f"{key}.{name}", leaf, depth + 1)) for name, item in value.items()]
    if type(value) is Counter:
        return {"$counter": [[_encode(name, key, leaf, depth + 1), item] for name, item in pairs]}
    names = list(value)
    if (
        all(type(name) is str for name in names)
        and names == sorted(names)
        and not any(n.startswith("$") for n in names)
    ):
        return dict(pairs)
    return {"$dict": [[_encode(name, key, leaf, depth + 1), item] for name, item in pairs]}


def decode(tree: Json, leaf: Callable[[str, str], Any]) -> Any:
    """Return the value that `encode` turned into `tree`.

    Args:
        tree: The JSON.
        leaf: Is called with (tag, name) for every "$tensor" and "$array"; returns the value that stands there.

    Raises:
        ValueError: The JSON is none that `encode` makes.
    """
    try:
        return _decode(tree, leaf, 0)
    except (TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(f"a value that cannot be: {error!s:.200}") from error


def _decode(tree: Json, leaf: Callable[[str, str], Any], depth: int) -> Any:
    if depth > 2 * MAX_DEPTH + 2:
        raise ValueError("the value is nested too deep")
    if isinstance(tree, list):
        return [_decode(item, leaf, depth + 1) for item in tree]
    if not isinstance(tree, dict):
        return tree
    tag = next(iter(tree), "")
    if not tag.startswith("$"):
        return {name: _decode(item, leaf, depth + 1) for name, item in tree.items()}
    body = tree[tag]
    if len(tree) != 1:
        raise ValueError(f"a tag stands among other keys: {sorted(tree)[:5]}")
    if tag in ("$tensor", "$array") and isinstance(body, str):  # by far the most
        return leaf(tag, body)
    return _decode_tag(tag, body, leaf, depth)


def _decode_tag(tag: str, body: Json, leaf: Callable[[str, str], Any], depth: int) -> Any:
    match tag, body:
        case "$tuple", list():
            return tuple(_decode(item, leaf, depth + 1) for item in body)
        case (("$dict" | "$counter"), list()):
            pairs = {}
            for name, item in body:
                key = name if type(name) is str else _decode(name, leaf, depth + 1)
                stored = item.get("$tensor") if type(item) is dict and len(item) == 1 else None
                pairs[key] = leaf("$tensor", stored) if type(stored) is str else _decode(item, leaf, depth + 1)
            return Counter(pairs) if tag == "$counter" else pairs
        case "$bytes", str():
            return base64.b64decode(body, validate=True)
        case "$float", ("nan" | "inf" | "-inf"):
            return float(body)
        case "$numpy", [str(dtype), *parts]:
            return _decode_numpy(dtype, parts)
        case _:
            raise ValueError(f"unknown tag {tag!r}")


def _decode_numpy(dtype: str, parts: list[Json]) -> np.generic:
    import numpy as np

    if dtype not in _NUMPY_NAMES or not 1 <= len(parts) <= 2 or any(isinstance(p, (list, dict)) for p in parts):
        raise ValueError(f"a NumPy scalar of type {dtype[:40]!r}")
    item = complex(float(parts[0]), float(parts[1])) if len(parts) == 2 else parts[0]
    scalar: np.generic = np.dtype(dtype).type(item)
    return scalar


def references(tree: Json) -> Iterator[str]:
    """Yield the name of every tensor entry that `tree` refers to, in the order in which they stand there."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if type(node) is list and len(node) == 2 and type(node[0]) is str:
            node = node[1]  # a row of a "$dict", of which there may be a great many
        if type(node) is list:
            waiting.extend(reversed(node))
        elif type(node) is dict:
            if len(node) == 1:
                ((tag, item),) = node.items()
                if tag in ("$tensor", "$array") and type(item) is str:
                    yield item
                    continue
            waiting.extend(reversed(node.values()))


def rename(tree: Json, renamed: Callable[[str], str]) -> Json:
    """Return `tree` with every reference to a tensor entry renamed."""
    if isinstance(tree, list):
        return [rename(item, renamed) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        tag: renamed(item) if tag in ("$tensor", "$array") and isinstance(item, str) else rename(item, renamed)
        for tag, item in tree.items()
    }

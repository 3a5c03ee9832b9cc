"""The entries of a checkpoint as a tree to be drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from distckpt import names, trees
from distckpt.manifest import Manifest, TensorEntry
from distckpt.values import Json, references

TEXT_CHARS = 60  # a longer value is cut
_MOST_ITEMS = 32  # a larger container without tensors is one row

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "C128": "complex128",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A name in the tree.

    Attributes:
        label: The name.
        kind: The type of a value, the dtype of a tensor, or what a key of the state is.
        text: A value, or a tensor's shape.
        num_bytes: The size of a tensor, or of all those below; None if there are none.
        inner: What is below it.
    """

    label: str
    kind: str = ""
    text: str = ""
    num_bytes: int | None = None
    inner: tuple[Node, ...] = ()


def forest(manifest: Manifest) -> list[Node]:
    """Return a tree for each key of the state; a tensor that several names share counts once."""
    gardener = _Gardener(tensors=manifest.tensors)
    grown = []
    for key in sorted(manifest.objects, key=lambda key: (key == names.RNG, key)):
        entry = manifest.objects[key]
        kind = "" if entry.kind == "value" else entry.kind
        if entry.per_rank and len(entry.trees) > 1:
            inner = [gardener.grow(f"rank {rank}", tree) for rank, tree in enumerate(entry.trees)]
            grown.append(_branch(key, f"{kind} by rank".strip(), inner))
        else:
            grown.append(gardener.grow(key, entry.trees[0], kind=kind, dotted=entry.kind == "module"))
    return grown


def walk(
    nodes: list[Node] | tuple[Node, ...], *, guide: str | None = None, depth: int | None = None
) -> Iterator[tuple[str, Node]]:
    """Yield every node with the lines that lead to it, from above to below; below `depth` levels only how many."""
    below = None if depth is None else depth - 1
    for node in nodes:
        is_last = node is nodes[-1]
        lead, deeper = ("", "") if guide is None else (guide + ("└─ " if is_last else "├─ "), guide)
        if guide is not None:
            deeper += "   " if is_last else "│  "
        if below == 0 and node.inner:
            yield lead, replace(node, text=f"{num_leaves(node):,} entries")
        else:
            yield lead, node
            yield from walk(node.inner, guide=deeper, depth=below)


def num_leaves(node: Node) -> int:
    """Return how many entries are below a node that has some."""
    return sum(num_leaves(inner) if inner.inner else 1 for inner in node.inner)


def value_text(tree: Json) -> str:
    """Return a value as Python writes it, cut to `TEXT_CHARS`."""
    text = repr(trees.plain(tree))
    return text if len(text) <= TEXT_CHARS else f"{text[: TEXT_CHARS - 1]}…"


def tensor_text(dtype: str, shape: list[int] | tuple[int, ...]) -> str:
    """Return a tensor's facts on one line: "(10, 512) float32"."""
    return f"{tuple(shape)} {DTYPES[dtype]}"


@dataclass(slots=True)
class _Gardener:
    """Grows trees, and remembers which tensors it has met."""

    tensors: Mapping[str, TensorEntry]
    met: set[str] = field(default_factory=set)

    def grow(self, label: str, tree: Json, *, kind: str = "", dotted: bool = False) -> Node:
        """Return the tree of a value; `dotted` splits its names at dots, as modules mean them."""
        name = trees.reference(tree)
        if name is not None:
            return self._tensor(label, name)
        container = trees.opened(tree)
        if container is None or self._is_one_row(*container, holds_tensors=any(references(tree))):
            value = trees.plain(tree)
            return Node(label=label, kind=kind or type(value).__name__, text=value_text(tree))
        items = [(trees.label(key), item) for key, item in container[1].items()]
        return _branch(label, kind, self._grouped(items) if dotted else [self.grow(*item) for item in items])

    def _tensor(self, label: str, name: str) -> Node:
        entry = self.tensors[name]
        if name in self.met:
            return Node(label=label, kind=DTYPES[entry.dtype], text=f"is {name}")
        self.met.add(name)
        return Node(label=label, kind=DTYPES[entry.dtype], text=f"{entry.shape}", num_bytes=entry.num_bytes)

    def _is_one_row(self, kind: str, items: Mapping[str, Json], *, holds_tensors: bool) -> bool:
        if holds_tensors:
            return False
        is_flat = all(trees.opened(item) is None for item in items.values())
        return not 0 < len(items) <= _MOST_ITEMS or (is_flat and kind in ("list", "tuple"))

    def _grouped(self, items: list[tuple[str, Json]]) -> list[Node]:
        """Return the nodes of items whose names share what stands before the first dot."""
        groups: dict[str, list[tuple[str, Json]]] = {}
        for name, item in items:
            head, _, rest = name.partition(".")
            groups.setdefault(head, []).append((rest, item))
        nodes = []
        for head, group in groups.items():
            if all(rest for rest, _ in group):
                nodes.append(_branch(head, "", self._grouped(group)))
            else:
                nodes.extend(self.grow(f"{head}.{rest}" if rest else head, item) for rest, item in group)
        return nodes


def _branch(label: str, kind: str, inner: list[Node]) -> Node:
    sizes = [node.num_bytes for node in inner if node.num_bytes is not None]
    return Node(label=label, kind=kind, num_bytes=sum(sizes) if sizes else None, inner=tuple(inner))

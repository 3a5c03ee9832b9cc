"""The comparison: whether two checkpoints hold the same state, and where they differ if not.

State is the step, the keys with their kinds, every value, and every tensor.
How it was saved is not: layout, number of ranks and files, chunks, time, versions, metrics, configuration, parent.
Invariant: no difference is passed over; "the same" means the same types and the same bytes, so that NaN equals NaN,
and 0.0 neither -0.0 nor 0.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Literal

from distckpt.arrays import Deviation, Source, batches, deviation, read
from distckpt.chunks import Runs
from distckpt.manifest import Manifest, ObjectEntry, TensorEntry
from distckpt.safetensors import ITEM_BYTES
from distckpt.trees import exact_text, label, opened, reference
from distckpt.values import Json, references

Kind = Literal["added", "removed", "changed"]
What = Literal["step", "key", "value", "order", "tensor"]

_APART = ("run", "attempt", "layout", "world_size", "created", "metrics", "versions", "timings", "parent", "config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing in which two checkpoints' states differ.

    Attributes:
        what: "step"; "key": a key of the state with its kind and number of trees; "value"; "order": the same keys in
            another order; "tensor".
        kind: "added" if only the second checkpoint has it, "removed" if only the first.
        name: The entry's name; of a rank's own entry it begins with that rank.
        before: What the first one has: a number, a key's or tensor's facts, or a value as the manifest's JSON.
        after: What the second one has.
        deviation: How two tensors of one dtype and shape differ.
    """

    what: What
    kind: Kind
    name: str
    before: Json = None
    after: Json = None
    deviation: Deviation | None = None


def compare(first: Source, second: Source) -> Iterator[Change]:
    """Yield everything in which two checkpoints' states differ; tensors last, for their bytes are read.

    Those of tensors that lie in segments of equal digests are not; whether these are whole, `verify` finds out.
    Of the tensors' bytes, `arrays.BATCH_BYTES` or the largest tensor are held at a time, from each checkpoint.

    Raises:
        CheckpointDamagedError: A data file of either is missing, short, or has other bytes than were written.
        StorageError: One could not be read.
    """
    yield from _compare_manifests(first.manifest, second.manifest)
    yield from _compare_tensors(first, second)


def apart(first: Manifest, second: Manifest) -> dict[str, tuple[Json, Json]]:
    """Return what differs and does not count, by the manifest's names; "files" is their number, "bytes" their size."""
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in _APART}
    pairs["files"] = len(first.files), len(second.files)
    pairs["bytes"] = first.num_bytes, second.num_bytes
    return {name: pair for name, pair in sorted(pairs.items()) if pair[0] != pair[1]}


def _tensor_facts(entry: TensorEntry) -> dict[str, Json]:
    return {"dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.num_bytes}


def _compare_manifests(first: Manifest, second: Manifest) -> Iterator[Change]:
    if first.step != second.step:
        yield Change(what="step", kind="changed", name="step", before=first.step, after=second.step)
    gone, come = first.tensors.keys() - second.tensors.keys(), second.tensors.keys() - first.tensors.keys()
    trees = _Trees(told=gone | come)
    for key in sorted(first.objects.keys() | second.objects.keys()):
        before, after = first.objects.get(key), second.objects.get(key)
        facts = (None if before is None else _key_facts(before)), (None if after is None else _key_facts(after))
        if facts[0] != facts[1]:
            yield _change("key", key, *facts)
        if before is None or after is None:
            continue
        for rank, (old, new) in enumerate(zip(before.trees, after.trees, strict=False)):
            name = f"rank-{rank:05d}:{key}" if before.per_rank else key
            yield from trees.compare(name, old, new)


def _compare_tensors(first: Source, second: Source) -> Iterator[Change]:
    olds, news = first.manifest.tensors, second.manifest.tensors
    alike = []
    for name in sorted(olds.keys() | news.keys()):
        old, new = olds.get(name), news.get(name)
        if old is not None and new is not None and (old.dtype, old.shape) == (new.dtype, new.shape):
            alike.append(name)
        else:
            facts = (None if old is None else _tensor_facts(old)), (None if new is None else _tensor_facts(new))
            yield _change("tensor", name, *facts)
    seals = _Seals(first), _Seals(second)
    for batch in batches(first, [name for name in alike if not _are_same(seals[0].of(name), seals[1].of(name))]):
        before, after = read(first, batch), read(second, batch)
        for name in sorted(batch):
            found = deviation(olds[name].dtype, before[name], after[name])
            if found is not None:
                fact = _tensor_facts(olds[name])
                yield Change(what="tensor", kind="changed", name=name, before=fact, after=fact, deviation=found)


class _Seals:
    """What of a checkpoint's digests covers each tensor: where two have the same, the tensors' bytes are the same."""

    def __init__(self, source: Source) -> None:
        self._manifest = source.manifest
        sizes = [[segment.num_bytes for segment in file.segments] for file in self._manifest.files]
        self._begins = [list(accumulate(of_file, initial=0)) for of_file in sizes]

    def of(self, name: str) -> Iterator[tuple[object, ...]]:
        """Yield each chunk's place in the tensor, and the segments that it lies in, by where they begin from it on."""
        entry = self._manifest.tensors[name]
        chunks = entry.chunks if isinstance(entry.chunks, Runs) else sorted(entry.chunks, key=lambda c: c.start)
        for chunk in chunks:
            begins, segments = self._begins[chunk.file], self._manifest.files[chunk.file].segments
            end = chunk.offset + math.prod(chunk.shape) * ITEM_BYTES[entry.dtype]
            index = bisect_right(begins, chunk.offset) - 1
            yield chunk.start, chunk.shape
            while index < len(segments) and begins[index] < end:
                yield begins[index] - chunk.offset, segments[index].num_bytes, segments[index].digest
                index += 1


def _are_same(first: Iterator[tuple[object, ...]], second: Iterator[tuple[object, ...]]) -> bool:
    """Say whether two iterators yield the same; looks no further than to what differs."""
    return all(one == other for one, other in zip_longest(first, second))


def _key_facts(entry: ObjectEntry) -> Json:
    return {"kind": entry.kind, "per_rank": entry.per_rank, "trees": len(entry.trees)}


def _change(what: What, name: str, before: Json, after: Json) -> Change:
    """Return the change from one thing to another, where None is nothing."""
    kind: Kind = "added" if before is None else "removed" if after is None else "changed"
    return Change(what=what, kind=kind, name=name, before=before, after=after)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trees:
    """Compares trees of values; `told` are tensors that are in one checkpoint only, which is told of elsewhere."""

    told: frozenset[str] | set[str]

    def compare(self, name: str, before: Json, after: Json) -> Iterator[Change]:
        """Yield where two trees differ."""
        if exact_text(before) == exact_text(after) or (self._is_told(before) and self._is_told(after)):
            return
        old, new = opened(before), opened(after)
        if old is None or new is None or old[0] != new[0]:
            yield Change(what="value", kind="changed", name=name, before=before, after=after)
            return
        olds, news = old[1], new[1]
        for key in [*olds, *(key for key in news if key not in olds)]:
            inner = f"{name}.{label(key)}"
            if key in olds and key in news:
                yield from self.compare(inner, olds[key], news[key])
            elif key in olds:
                yield from self._one_sided("removed", inner, olds[key])
            else:
                yield from self._one_sided("added", inner, news[key])
        if olds.keys() == news.keys() and list(olds) != list(news):
            orders = [label(key) for key in olds], [label(key) for key in news]
            yield Change(what="order", kind="changed", name=name, before=orders[0], after=orders[1])

    def _one_sided(self, kind: Kind, name: str, tree: Json) -> Iterator[Change]:
        """Yield what of a tree that one checkpoint lacks is not told of as a tensor."""
        if self._is_told(tree):
            return
        container = opened(tree) if any(references(tree)) else None
        if container is None:
            before, after = (None, tree) if kind == "added" else (tree, None)
            yield Change(what="value", kind=kind, name=name, before=before, after=after)
            return
        for key, item in container[1].items():
            yield from self._one_sided(kind, f"{name}.{label(key)}", item)

    def _is_told(self, tree: Json) -> bool:
        """Say whether a tree is a reference to a tensor that is in one checkpoint only."""
        return reference(tree) in self.told

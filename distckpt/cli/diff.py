"""`distckpt diff A B`: whether two checkpoints hold the same state, whatever their layout and number of files.

JSON: "a" and "b" ({"path", "step"}), "identical", "changes" and "apart".
A change is {"what" ("step", "key", "value", "order" or "tensor"), "kind" ("added", "removed" or "changed"), "name",
"a", "b"}: two numbers; keys' {"kind", "per_rank", "trees"}; values as the manifest has them; lists of keys; or
tensors' {"dtype", "shape", "bytes"}. Of a tensor that has other bytes it also has "elements", "different", "nan" (how
many of these are NaN on one side only), "max_absolute" and "max_relative" (the largest |b - a|, alone and divided by
max(|a|, |b|); null if nothing can be compared).
"apart" is what differs and does not count: {name: {"a", "b"}}.
Tensors whose bytes lie under equal digests are the same, and are not read.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from distckpt import catalog
from distckpt.cli import terminal
from distckpt.cli.entries import tensor_text, value_text
from distckpt.cli.exits import Exit
from distckpt.cli.options import AsJson, StorageOptions, is_local, open_url
from distckpt.cli.tables import Row, print_table
from distckpt.manifest import Manifest
from distckpt.values import Json

if TYPE_CHECKING:
    from distckpt.arrays import Source
    from distckpt.comparison import Change

_MOST_LINES = 200  # of changes, for a reader; JSON has them all
_STYLES = {"added": "green", "removed": "red", "changed": "yellow"}

Side = Annotated[str, typer.Argument(help="A checkpoint's folder, or a run's directory: its newest checkpoint.")]


def diff(a: Side, b: Side, *, as_json: AsJson = False, storage_options: StorageOptions = None) -> None:
    """Compare two checkpoints' state, entry by entry and value by value; exit 0 only if it is all the same.

    The step counts. How it was saved does not: layout, files, times, versions, metrics, configuration, parent.
    Storage options are for those of A and B that are no local paths.
    """
    from distckpt.arrays import Source
    from distckpt.comparison import apart, compare

    is_mixed = is_local(a) != is_local(b)
    storages = [open_url(url, None if is_mixed and is_local(url) else storage_options) for url in (a, b)]
    (folder_a, manifest_a), (folder_b, manifest_b) = (catalog.locate(storage) for storage in storages)
    total_bytes = sum(entry.num_bytes for m in (manifest_a, manifest_b) for entry in m.tensors.values())
    with terminal.watched("comparing", storages, total_bytes=total_bytes) as (storage_a, storage_b):
        first = Source(storage=storage_a, folder=folder_a, manifest=manifest_a)
        second = Source(storage=storage_b, folder=folder_b, manifest=manifest_b)
        changes = list(compare(first, second))
    if as_json:
        _print_json(first, second, changes, apart(manifest_a, manifest_b))
    else:
        _print_changes(first, second, changes)
        _print_apart(apart(manifest_a, manifest_b))
    if changes:
        raise typer.Exit(Exit.DIFFERENT)


def _print_json(first: Source, second: Source, changes: list[Change], apart: dict[str, tuple[Json, Json]]) -> None:
    listed = []
    for change in changes:
        facts = {"what": change.what, "kind": change.kind, "name": change.name, "a": change.before, "b": change.after}
        found = change.deviation
        if found is not None:
            facts |= {"elements": found.num_elements, "different": found.num_different, "nan": found.num_nan}
            facts |= {"max_absolute": found.max_absolute, "max_relative": found.max_relative}
        listed.append(facts)
    terminal.print_json(
        {
            "a": {"path": first.path, "step": first.manifest.step},
            "b": {"path": second.path, "step": second.manifest.step},
            "identical": not changes,
            "changes": listed,
            "apart": {name: {"a": pair[0], "b": pair[1]} for name, pair in apart.items()},
        }
    )


def _print_changes(first: Source, second: Source, changes: list[Change]) -> None:
    from rich.text import Text

    console = terminal.output()
    for name, source in (("a", first), ("b", second)):
        console.print(Text.assemble((name, "cyan"), f"  {source.path}"), soft_wrap=True)
    if not changes:
        console.print(Text.assemble(("the same", "green"), f"  {_content_text(first.manifest)}"))
        return
    console.print()
    shown = changes[:_MOST_LINES]
    rows = [Row(cells=(Text(one.kind, _STYLES[one.kind]), one.name, *_sides(one))) for one in shown]
    print_table(["", "entry", "a", "b"], rows, fixed=1)
    if len(changes) > _MOST_LINES:
        console.print(f"and {len(changes) - _MOST_LINES:,} more: --json has them all")
    counts = Counter("key order" if change.what == "order" else change.what for change in changes)
    texts = [terminal.count_text(count, what) if what != "step" else "the step" for what, count in counts.items()]
    console.print(Text.assemble(("\ndifferent", "bold red"), f"  {', '.join(texts)}"))


def _content_text(manifest: Manifest) -> str:
    size = terminal.size_text(sum(entry.num_bytes for entry in manifest.tensors.values()))
    tensors = terminal.count_text(len(manifest.tensors), "tensor")
    return f"step {manifest.step:,}, {terminal.count_text(len(manifest.objects), 'key')}, {tensors}, {size}"


def _sides(change: Change) -> tuple[str, str]:
    """Return in words what each checkpoint has."""
    found = change.deviation
    if found is not None:
        what = tensor_text(change.before["dtype"], change.before["shape"])
        return what, f"{found.num_different:,} of {found.num_elements:,}{_deviation_text(change)}"
    before = "" if change.kind == "added" else _side_text(change, change.before)
    after = "" if change.kind == "removed" else _side_text(change, change.after)
    return before, after


def _deviation_text(change: Change) -> str:
    found = change.deviation
    if found is None:
        return ""
    text = ""
    if found.max_absolute:
        text = f" by up to {found.max_absolute:.3g} (relative {found.max_relative:.2g})"
    elif found.max_absolute == 0:
        text = " in bits alone"  # 0.0 and -0.0, or one NaN and another
    return f"{text}, {found.num_nan:,} NaN on one side" if found.num_nan else text


def _side_text(change: Change, side: Json) -> str:
    if change.what == "tensor":
        return tensor_text(side["dtype"], side["shape"])
    if change.what == "key":
        return f"{side['kind']}, by rank: {side['trees']}" if side["per_rank"] else str(side["kind"])
    if change.what == "step":
        return f"{side:,}"
    return value_text(side)


def _print_apart(apart: dict[str, tuple[Json, Json]]) -> None:
    """Print what differs and does not count; of mappings what differs in them."""
    rows = []
    texts = {"created": terminal.moment_text, "bytes": terminal.size_text}
    for name, (before, after) in apart.items():
        text = texts.get(name, terminal.setting_text)
        olds, news = (dict(terminal.flattened(side, name, text=text)) for side in (before, after))
        for inner in [*olds, *(inner for inner in news if inner not in olds)]:
            old, new = olds.get(inner, ""), news.get(inner, "")
            if old != new:
                rows.append(Row(cells=(inner, old, new), style="dim"))
    if rows:
        print()
        print_table(["not state", "a", "b"], rows)

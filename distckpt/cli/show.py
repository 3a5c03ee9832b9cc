"""`distckpt show URL`: what one checkpoint holds.

JSON: "url", "path", "step", "run", "attempt", "layout", "world_size", "created", "bytes" (of the data files),
"metrics", "versions", "timings", "parent" ({"step", "attempt"} or null), "writer" ({"host", "pid"}), "config" (or
null), "pinned", "files" ([{"name", "rank", "bytes"}]), "keys" ([{"name", "kind", "per_rank", "values"}]) and
"tensors" ([{"name", "dtype", "shape", "bytes", "share"}], "share" of all tensors' bytes).
"values" is one tree for all ranks, or, if "per_rank", one for each: the manifest's own JSON, with {"$tensor": name} and
{"$array": name} where tensors stand.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from distckpt import catalog, names, trees
from distckpt.cli import terminal
from distckpt.cli.entries import forest, walk
from distckpt.cli.options import AsJson, Step, StorageOptions, Url, open_url
from distckpt.cli.tables import Row, print_facts, print_table
from distckpt.errors import CheckpointNotFoundError
from distckpt.inventory import take
from distckpt.manifest import Manifest

_MOST_ROWS = 2_000  # on a terminal; nobody scrolls further

Depth = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Show N levels of entries, and how many are below.", show_default=False),
]


def show(
    url: Url,
    *,
    step: Step = None,
    depth: Depth = None,
    as_json: AsJson = False,
    storage_options: StorageOptions = None,
) -> None:
    """Show one checkpoint: its facts, configuration and entries. Of a run, the newest one."""
    storage = open_url(url, storage_options)
    try:
        folder, manifest = catalog.locate(storage, step=step)
    except CheckpointNotFoundError:
        take(storage)  # if there is nothing at all, this says what there is instead
        raise
    path = names.join(storage.url, folder)
    is_pinned = any(file.name.endswith(names.PIN) for file in storage.list(folder))
    if as_json:
        terminal.print_json({"url": storage.url, "path": path, "pinned": is_pinned, **_facts(manifest)})
        return
    _print_facts(path, manifest, is_pinned=is_pinned)
    _print_entries(manifest, depth=depth)


def _facts(manifest: Manifest) -> dict[str, Any]:
    whole = sum(entry.num_bytes for entry in manifest.tensors.values()) or 1
    return {
        "step": manifest.step,
        "run": manifest.run,
        "attempt": manifest.attempt,
        "layout": manifest.layout,
        "world_size": manifest.world_size,
        "created": manifest.created,
        "bytes": manifest.num_bytes,
        "metrics": manifest.metrics,
        "versions": manifest.versions,
        "timings": manifest.timings,
        "parent": manifest.parent,
        "writer": manifest.writer,
        "config": manifest.config,
        "files": [{"name": file.name, "rank": file.rank, "bytes": file.num_bytes} for file in manifest.files],
        "keys": [
            {"name": key, "kind": entry.kind, "per_rank": entry.per_rank, "values": list(entry.trees)}
            for key, entry in manifest.objects.items()
        ],
        "tensors": [
            {
                "name": name,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "bytes": entry.num_bytes,
                "share": entry.num_bytes / whole,
            }
            for name, entry in manifest.tensors.items()
        ],
    }


def _print_facts(path: str, manifest: Manifest, *, is_pinned: bool) -> None:
    parent = manifest.parent
    leaves = [leaf for entry in manifest.objects.values() for tree in entry.trees for leaf in trees.leaves(tree)]
    num_values = sum(trees.reference(leaf) is None for leaf in leaves)
    facts = {
        "path": path,
        "step": f"{manifest.step:,}" + (", pinned" if is_pinned else ""),
        "created": f"{terminal.moment_text(manifest.created)}, {terminal.age_text(manifest.created)}, "
        f"by process {manifest.writer.get('pid')} on {manifest.writer.get('host')}",
        "saved by": f"{terminal.count_text(manifest.world_size, 'rank')}, {manifest.layout}",
        "size": f"{terminal.size_text(manifest.num_bytes)} in {terminal.count_text(len(manifest.files), 'file')}",
        "state": f"{terminal.count_text(len(manifest.tensors), 'tensor')}, {terminal.count_text(num_values, 'value')}",
        "run": f"{manifest.run}, attempt {manifest.attempt}",
        "parent": "" if parent is None else f"step {parent.get('step')}, attempt {parent.get('attempt')}",
        "metrics": terminal.metrics_text(manifest.metrics),
        "timings": "  ".join(f"{name.removesuffix('_s')} {value:.3g} s" for name, value in manifest.timings.items()),
        "versions": "  ".join(f"{name} {value}" for name, value in manifest.versions.items()),
    }
    print_facts({name: text for name, text in facts.items() if text})
    if manifest.config:
        print("\nconfiguration")
        print_facts(dict(terminal.flattened(manifest.config, "")))


def _print_entries(manifest: Manifest, *, depth: int | None) -> None:
    nodes = forest(manifest)
    whole = sum(node.num_bytes or 0 for node in nodes) or 1
    rows = []
    for guide, node in walk(nodes, depth=depth):
        size, share = "", ""
        if node.num_bytes is not None:
            size, share = terminal.size_text(node.num_bytes), f"{100 * node.num_bytes / whole:.1f} %"
        style = "dim" if node.inner and guide else ""
        rows.append(Row(cells=(guide + node.label, node.kind, node.text, size, share), style=style))
    num_hidden = max(0, len(rows) - _MOST_ROWS) if sys.stdout.isatty() else 0
    print()
    columns = ["entry", "type", "shape or value", "size", "share"]
    print_table(columns, rows[: len(rows) - num_hidden], right=["size", "share"], fixed=2)
    if num_hidden:
        terminal.say(f"and {num_hidden:,} more lines: --depth 2 for less, or a pipe for all of them: | less")

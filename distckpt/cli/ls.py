"""`distckpt ls URL`: what a run's directory holds.

JSON: {"url", "checkpoints": [...]}, oldest step first, each with
"step" (null: unknown), "path", "state" ("committed", "partial", "damaged" or "newer format"), "problem" (of a damaged
or newer one, else null), "bytes" (of the data files; of all files if it is not committed), "modified" (the newest
file's time, null: unknown), "pinned"; and, null unless it is committed, "created", "world_size", "layout",
"metrics", "run", "attempt".
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from distckpt import inventory, names
from distckpt.cli import terminal
from distckpt.cli.options import AsJson, StorageOptions, Url, open_url
from distckpt.inventory import Found

_STYLES = {"committed": "green", "partial": "yellow", "damaged": "bold red", "newer format": "red"}


def ls(url: Url, *, as_json: AsJson = False, storage_options: StorageOptions = None) -> None:
    """List the checkpoints of a run: one line each, also for partial and damaged ones."""
    storage = open_url(url, storage_options)
    found = inventory.take(storage)
    if as_json:
        terminal.print_json({"url": storage.url, "checkpoints": [_facts(storage.url, one) for one in found]})
        return
    _print_table(found)
    _print_summary(url, found)


def _facts(url: str, found: Found) -> dict[str, Any]:
    checkpoint = found.checkpoint
    return {
        "step": found.step,
        "path": names.join(url, found.name),
        "state": found.state,
        "problem": found.problem,
        "bytes": found.num_bytes,
        "modified": found.modified,
        "pinned": found.pinned,
        "created": checkpoint and checkpoint.created,
        "world_size": checkpoint and checkpoint.world_size,
        "layout": checkpoint and checkpoint.layout,
        "metrics": checkpoint and checkpoint.metrics,
        "run": checkpoint and checkpoint.run,
        "attempt": checkpoint and checkpoint.attempt,
    }


def _print_table(found: list[Found]) -> None:
    from rich.text import Text

    columns = ["step", "state", "created", "size", "ranks", "layout", "metrics"]
    table = terminal.make_table(columns, right=["step", "created", "size", "ranks"])
    for column in table.columns[:-1]:
        column.no_wrap = True
    for one in found:
        state = Text(one.state, _STYLES[one.state])
        if one.pinned:
            state.append(", pinned", "cyan")
        facts = one.checkpoint
        table.add_row(
            "?" if one.step is None else f"{one.step:,}",
            state,
            terminal.date_text(facts.created if facts else one.modified),
            terminal.size_text(one.num_bytes),
            f"{facts.world_size}" if facts else "",
            facts.layout if facts else "",
            terminal.metrics_text(facts.metrics) if facts else "",
            style="" if facts else "dim",
        )
    terminal.output().print(table)


def _print_summary(url: str, found: list[Found]) -> None:
    """Say what there is in all, and what to do about what is no checkpoint."""
    counts = Counter(one.state for one in found)
    parts = [f"{count} {state}" for state, count in counts.items()]
    terminal.say(f"{', '.join(parts)}; {terminal.size_text(sum(one.num_bytes for one in found))} in all")
    for one in found:
        if one.problem is not None:
            terminal.say(f"step {one.step}: {one.problem_file} {one.problem}")
    if counts["partial"]:
        remedy = f"; distckpt prune {url} --partial" if found[0].folder else ""
        terminal.say(f"partial: a save that never committed, or is being written{remedy}")

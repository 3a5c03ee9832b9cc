"""`distckpt ls URL`: what a run's directory holds.

With `--keep N` also what retention would do with each, and why (a running job also keeps the one that it resumed from,
which cannot be seen here); with `--tree` by lineage: each checkpoint below the one that its run went on from, those of
the run's branches among them.

JSON: {"url", "outcome", "branches": [...], "uploads": [...], "checkpoints": [...]}.
"outcome" is how the latest job that saved here stands, null if none said anything: "state" ("complete", "preempted",
"failed", "running", or "unknown": it ended without a word), "host" and "pid" of its rank 0, "since" and "renewed" (when
it began, and last gave a sign of life), and "step", "time" and "reason" of its end (null: it said nothing of it).
A preempted one's "step" is what the next start goes on from, and its "reason" says what asked it to stop, how much time
was left, and what was done in it.
"branches" are those that went off from checkpoints of the run itself, each with "name", "path" and "step" (where).
"uploads" are unfinished ones (in flight, or of a process that was killed), oldest first, each with "path", "id",
"started" (null: unknown) and "bytes" (what the server holds of it, null: unknown); null if they may not be listed.
"checkpoints" come oldest step first, with --tree also those of branches, each with "branch" (null: the run itself),
"step" (null: unknown), "path", "state" ("committed", "partial", "damaged" or "newer format"), "problem" (of a damaged
or newer one, else null), "bytes" (of the data files; of all files if it is not committed), "modified" (the newest
file's time, null: unknown), "pinned"; null unless it is committed, "created", "world_size", "layout",
"metrics", "run", "attempt" and "parent" ({"step", "attempt"}, null: none); and "retention" ({"action": "keep" or
"delete", "reasons"}; null without --keep).
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from distckpt import inventory, names
from distckpt.cli import terminal, uploads
from distckpt.cli.lineage import lines_of
from distckpt.cli.options import AsJson, StorageOptions, Url, open_url
from distckpt.cli.prune import Item, make_plan
from distckpt.cli.tables import Row, print_table
from distckpt.errors import CheckpointNotFoundError
from distckpt.inventory import Found
from distckpt.leasefiles import standing
from distckpt.retention import Retention
from distckpt.storage import Storage

_STYLES = {"committed": "green", "partial": "yellow", "damaged": "bold red", "newer format": "red"}

Keep = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Say what a retention that keeps the newest N would do with each.", show_default=False
    ),
]
Tree = Annotated[bool, typer.Option("--tree", help="By lineage: each below the one that its run went on from.")]


def ls(
    url: Url,
    *,
    keep: Keep = None,
    tree: Tree = False,
    as_json: AsJson = False,
    storage_options: StorageOptions = None,
) -> None:
    """List the checkpoints of a run: one line each, also for partial and damaged ones."""
    storage = open_url(url, storage_options)
    unfinished, outcome = uploads.look(storage), _outcome(storage)
    found = _found(storage, has_begun=outcome is not None or bool(unfinished), branches=tree)
    found.sort(key=lambda one: -1 if one.step is None else one.step)
    retention = None if keep is None else Retention(last=keep)
    plan = [None for _ in found] if retention is None else _plan(found, retention)
    if as_json:
        listed = [_facts(storage.url, one, item) for one, item in zip(found, plan, strict=True)]
        facts = {
            "url": storage.url,
            "outcome": outcome,
            "branches": _branches(storage.url, found),
            "uploads": None if unfinished is None else [uploads.facts(storage.url, each) for each in unfinished],
            "checkpoints": listed,
        }
        terminal.print_json(facts)
        return
    if found:
        _print_table(found, plan, tree=tree)
    _print_summary(url, found)
    _print_branches(url, _branches(storage.url, found), tree=tree)
    if unfinished:
        terminal.say(uploads.summary(url, unfinished, now=time.time()))
    _print_outcome(outcome)


def _found(storage: Storage, *, has_begun: bool, branches: bool) -> list[Found]:
    """Return what lies there; nothing is an error unless a job has been there, or uploads are on their way, or were."""
    try:
        return inventory.take(storage, brief=True, branches=branches)
    except CheckpointNotFoundError:
        if not has_begun:
            raise
        return []


def _plan(found: list[Found], retention: Retention) -> list[Item | None]:
    """Return what would happen to each; every branch has a retention of its own."""
    plan: dict[int, Item] = {}
    for branch in {one.branch for one in found}:
        own = [one for one in found if one.branch == branch]
        for item in make_plan(own, retention, partial=False, now=time.time()):
            plan[id(item.found)] = item
    return [plan[id(one)] for one in found]


def _branches(url: str, found: list[Found]) -> list[dict[str, Any]]:
    """Return the branches that went off from the run itself."""
    return [
        {"name": name, "path": names.join(url, names.branch_folder(name)), "step": one.step}
        for one in found
        if one.folder is not None and not one.branch
        for name in one.folder.branches
    ]


def _facts(url: str, found: Found, item: Item | None) -> dict[str, Any]:
    checkpoint = found.checkpoint
    return {
        "branch": found.branch or None,
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
        "parent": checkpoint and checkpoint.parent,
        "retention": item and {"action": "delete" if item.goes else "keep", "reasons": list(item.reasons)},
    }


def _outcome(storage: Storage) -> dict[str, Any] | None:
    """Return how the latest job that owned the directory stands."""
    found = standing(storage)
    if found is None:
        return None
    record, said = found.record, found.record.outcome
    return {
        "state": found.state,
        "host": record.owner.host,
        "pid": record.owner.pid,
        "since": record.acquired,
        "renewed": record.renewed,
        "step": said and said.step,
        "time": said and said.time,
        "reason": said and said.reason,
    }


def _print_branches(url: str, branches: list[dict[str, Any]], *, tree: bool) -> None:
    """Say which branches there are."""
    for branch in branches:
        more = "" if tree else f": distckpt ls {url} --tree"
        terminal.say(f"branch {branch['name']} went off from step {branch['step']:,}{more}")


def _print_outcome(outcome: dict[str, Any] | None) -> None:
    """Say how the latest job stands."""
    if outcome is None:
        return
    job = f"the latest job (process {outcome['pid']} on {outcome['host']})"
    match outcome["state"]:
        case "running":
            terminal.say(f"{job} is running, since {terminal.date_text(outcome['since'])}")
        case "unknown":
            terminal.say(f"{job} ended without a word; its last sign is of {terminal.date_text(outcome['renewed'])}")
        case ending:
            at = "" if outcome["step"] is None else f" at step {outcome['step']:,}"
            reason = "" if outcome["reason"] is None else f": {outcome['reason']}"
            terminal.say(f"{job} ended {terminal.date_text(outcome['time'])}{at}: {ending}{reason}")


def _print_table(found: list[Found], plan: Sequence[Item | None], *, tree: bool) -> None:
    from rich.text import Text

    columns = ["step", "state", "created", "size", "ranks", "layout", "metrics"]
    has_plan = any(item is not None for item in plan)
    if has_plan:
        columns.insert(2, "retention")
    right = ["created", "size", "ranks"] if tree else ["step", "created", "size", "ranks"]
    rows = []
    for index, guide, note in lines_of(found) if tree else [(index, "", "") for index in range(len(found))]:
        one, item = found[index], plan[index]
        state = Text(one.state, _STYLES[one.state])
        if one.pinned:
            state.append(", pinned", "cyan")
        facts = one.checkpoint
        cells: list[Any] = [
            guide + ("?" if one.step is None else f"{one.step:,}") + note,
            state,
            terminal.date_text(facts.created if facts else one.modified),
            terminal.size_text(one.num_bytes),
            f"{facts.world_size}" if facts else "",
            facts.layout if facts else "",
            terminal.metrics_text(facts.metrics) if facts else "",
        ]
        if has_plan:
            cells.insert(2, _retention_text(item))
        rows.append(Row(cells=cells, style="" if facts else "dim"))
    print_table(columns, rows, right=right, fixed=-1)
    sys.stdout.flush()


def _retention_text(item: Item | None) -> Any:
    from rich.text import Text

    if item is None:
        return ""
    verdict = Text("delete", "bold red") if item.goes else Text("keep", "green")
    return verdict.append(f": {'; '.join(item.reasons)}", "dim")


def _print_summary(url: str, found: list[Found]) -> None:
    """Say what there is in all, and what to do about what is no checkpoint."""
    counts = Counter(one.state for one in found)
    parts = [f"{count} {state}" for state, count in counts.items()]
    counted = ", ".join(parts) or "no checkpoint"
    terminal.say(f"{counted}; {terminal.size_text(sum(one.num_bytes for one in found))} in all")
    for one in found:
        if one.problem is not None:
            terminal.say(f"step {one.step}: {one.problem_file} {one.problem}")
    if counts["partial"]:
        remedy = f"; distckpt prune {url} --partial" if found[0].folder else ""
        terminal.say(f"partial: a save that never committed, or is being written{remedy}")

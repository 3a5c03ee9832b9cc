"""`distckpt prune URL`: show which checkpoints of a run would go and why the others stay, and with `--yes` delete.

JSON: {"url", "deleted" (whether anything was: false without --yes), "bytes" (of what goes), "plan": [...],
"uploads": [...]}. The plan comes oldest step first, each with "step", "path", "state" (as `ls` has it), "bytes",
"action" ("keep" or "delete"), "reasons". A partial or damaged one that changes between plan and deletion is left; its
action in the JSON is then "keep".
"uploads" are unfinished ones, as `ls` has them, each with "action" ("keep" or "abort") and "reasons" too.
"""

from __future__ import annotations

import difflib
import sys
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any

import typer

from distckpt import catalog, inventory, names
from distckpt.cli import terminal, uploads
from distckpt.cli.options import AsJson, StorageOptions, open_url
from distckpt.cli.tables import Row, print_table
from distckpt.cli.uploads import UploadItem
from distckpt.errors import CheckpointNotFoundError, ConfigError
from distckpt.inventory import Found
from distckpt.retention import Retention, decide
from distckpt.storage import Storage

IN_FLIGHT_S = 3600.0  # a partial that was written to more recently may be a save of a job that runs

_RULES = "What to keep: what any rule names"


class Mode(StrEnum):
    """Which metrics are good."""

    MIN = "min"
    MAX = "max"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What happens to one checkpoint folder: it is deleted, or not, because of `reasons`."""

    found: Found
    goes: bool
    reasons: tuple[str, ...]


Directory = Annotated[str, typer.Argument(metavar="URL", help="A run's directory.", show_default=False)]
Last = Annotated[
    int | None,
    typer.Option(
        "--keep", "--last", metavar="N", min=1, help="The newest N; 3 if only other rules are given.",
        rich_help_panel=_RULES, show_default=False,
    ),
]  # fmt: skip
Best = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="The N with the best --metric.", rich_help_panel=_RULES, show_default=False),
]
Metric = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What --best looks at.", rich_help_panel=_RULES, show_default=False),
]
MetricMode = Annotated[Mode, typer.Option(help="Whether a small or a large metric is good.", rich_help_panel=_RULES)]
Every = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Steps that N divides.", rich_help_panel=_RULES, show_default=False),
]
Within = Annotated[
    float | None,
    typer.Option(
        "--within-s", metavar="S", min=0, help="Those of the last S seconds.", rich_help_panel=_RULES,
        show_default=False,
    ),
]  # fmt: skip
Partial = Annotated[
    bool,
    typer.Option(
        "--partial",
        help="Delete partial and damaged ones too, where a newer checkpoint is committed. "
        "A newer partial may be a save in flight: it goes if nothing was written to it for an hour.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do it; without it, only the plan is shown.")]


def prune(
    url: Directory,
    *,
    last: Last = None,
    best: Best = None,
    metric: Metric = None,
    mode: MetricMode = Mode.MIN,
    every: Every = None,
    within_s: Within = None,
    partial: Partial = False,
    yes: Yes = False,
    as_json: AsJson = False,
    storage_options: StorageOptions = None,
) -> None:
    """Show which checkpoints of a run would go, and why the others stay; with --yes, delete.

    The newest committed checkpoint always stays, and so do pinned ones, and those that a branch went off from. Uploads
    to an object store that were begun more than a day ago and never finished are aborted, too.
    """
    retention = _retention(last=last, best=best, metric=metric, mode=mode, every=every, within_s=within_s)
    if retention is None and not partial:
        raise typer.BadParameter("say what to keep (--keep 3, ...), or what else to delete (--partial)")
    storage = open_url(url, storage_options)
    found, unfinished = _found(storage)
    if found and found[0].folder is None:
        raise ConfigError(
            source="URL",
            problem=f"{storage.url!r} is one checkpoint's folder; prune takes a run's directory",
            fix=f"distckpt prune {storage.url.rstrip('/').rpartition('/')[0]}",
        )
    if retention is not None:
        _check_metric(found, retention)
    plan = make_plan(found, retention, partial=partial, now=time.time())
    if not as_json:
        _print_plan(plan, unfinished)
    if yes:
        plan = _carry_out(storage, plan)
        uploads.carry_out(storage, unfinished)
    if as_json:
        terminal.print_json(_facts(storage.url, plan, unfinished, done=yes))
    else:
        _print_summary(plan, unfinished, done=yes)


def _found(storage: Storage) -> tuple[list[Found], list[UploadItem]]:
    """Return what lies there, and what happens to unfinished uploads."""
    unfinished = uploads.plan(uploads.look(storage), now=time.time())
    try:
        return inventory.take(storage), unfinished
    except CheckpointNotFoundError:
        if not unfinished:
            raise
        return [], unfinished


def _retention(
    *, last: int | None, best: int | None, metric: str | None, mode: Mode, every: int | None, within_s: float | None
) -> Retention | None:
    """Return the rules that the options give; None if they give none."""
    if (best is None) != (metric is None):
        raise typer.BadParameter("--best and --metric go together: --best 1 --metric val/loss")
    given = {"last": last, "best": best, "every": every, "within_s": within_s}
    rules: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return Retention(metric=metric, mode=mode.value, **rules) if rules else None


def _check_metric(found: list[Found], retention: Retention) -> None:
    """Refuse a metric that no checkpoint has: by it, all would be equally bad."""
    known = sorted({name for one in found if one.checkpoint for name in one.checkpoint.metrics})
    if retention.best and retention.metric not in known:
        near = difflib.get_close_matches(retention.metric or "", known, n=1)
        raise ConfigError(
            source="--metric",
            problem=f"no checkpoint has {retention.metric!r}; there is {', '.join(map(repr, known)) or 'none'}",
            fix=f"--metric {near[0]}" if near else None,
        )


def make_plan(found: list[Found], retention: Retention | None, *, partial: bool, now: float) -> list[Item]:
    """Return what happens to each checkpoint folder, in the order of `found`.

    Args:
        found: All of a run's.
        retention: The rules for committed ones; None keeps them all.
        partial: Whether partial and damaged ones are to go.
        now: The present, in seconds since 1970.
    """
    committed = [one.checkpoint for one in found if one.checkpoint is not None]
    pinned = [one.step for one in found if one.pinned and one.step is not None]
    branches = catalog.branched(one.folder for one in found if one.folder is not None)
    decided = [] if retention is None else decide(committed, retention, now=now, pinned=pinned, branches=branches)
    decisions = {decision.step: decision for decision in decided}
    newest = max((checkpoint.step for checkpoint in committed), default=-1)
    plan = []
    for one in found:
        if one.checkpoint is None:
            plan.append(_decide_rest(one, newest=newest, partial=partial, now=now))
        elif retention is None:
            plan.append(Item(found=one, goes=False, reasons=("committed",)))
        else:
            reasons = decisions[one.checkpoint.step].reasons
            plan.append(Item(found=one, goes=not reasons, reasons=reasons or ("no rule keeps it",)))
    return plan


def _decide_rest(found: Found, *, newest: int, partial: bool, now: float) -> Item:
    """Decide on what is no good checkpoint, where the newest good one is of step `newest`."""
    is_older = found.step is not None and found.step < newest
    since = f"step {newest:,} is committed"
    match found.state:
        case "newer format":
            return Item(found=found, goes=False, reasons=("only the distckpt that wrote it can judge it",))
        case _ if found.pinned:
            return Item(found=found, goes=False, reasons=("pinned",))
        case _ if not partial:
            return Item(found=found, goes=False, reasons=("--partial was not given",))
        case _ if is_older:
            return Item(found=found, goes=True, reasons=(f"{found.state}, and {since}",))
        case "damaged":
            return Item(found=found, goes=False, reasons=("damaged, but no newer one is committed",))
    if found.modified is None:
        return Item(found=found, goes=False, reasons=("may be in flight: the storage does not say how old it is",))
    if now - found.modified < IN_FLIGHT_S:
        reason = f"may be a save in flight: written to {terminal.age_text(found.modified)}"
        return Item(found=found, goes=False, reasons=(reason,))
    return Item(found=found, goes=True, reasons=(f"partial, last written to {terminal.age_text(found.modified)}",))


def _carry_out(storage: Storage, plan: list[Item]) -> list[Item]:
    """Delete what is to go, and return what was done."""
    done = []
    for item in plan:
        folder = item.found.folder
        if not item.goes or folder is None:
            done.append(item)
        elif item.found.checkpoint is None and not inventory.is_unchanged(storage, folder):
            done.append(replace(item, goes=False, reasons=("it changed since the plan was made",)))
            terminal.say(f"left step {folder.step:,}: it has changed since the plan was made")
        else:
            catalog.remove(storage, folder)
            done.append(item)
            terminal.say(f"deleted step {folder.step:,}")
    return done


def _num_bytes(plan: list[Item], unfinished: list[UploadItem]) -> int:
    """Return the size of what goes."""
    going = uploads.size_of([item.upload for item in unfinished if item.goes])
    return going + sum(item.found.num_bytes for item in plan if item.goes)


def _facts(url: str, plan: list[Item], unfinished: list[UploadItem], *, done: bool) -> dict[str, Any]:
    return {
        "url": url,
        "deleted": done and (any(item.goes for item in plan) or any(each.goes for each in unfinished)),
        "bytes": _num_bytes(plan, unfinished),
        "plan": [
            {
                "step": item.found.step,
                "path": names.join(url, item.found.name),
                "state": item.found.state,
                "bytes": item.found.num_bytes,
                "action": "delete" if item.goes else "keep",
                "reasons": list(item.reasons),
            }
            for item in plan
        ],
        "uploads": uploads.plan_facts(url, unfinished),
    }


def _print_plan(plan: list[Item], unfinished: list[UploadItem]) -> None:
    from rich.text import Text

    rows = []
    for item in plan:
        action = Text("delete", "bold red") if item.goes else Text("keep", "green")
        size = terminal.size_text(item.found.num_bytes)
        rows.append(Row(cells=(f"{item.found.step:,}", item.found.state, size, action, "; ".join(item.reasons))))
    for each in unfinished:
        step = names.parse_step(each.upload.name.partition("/")[0])
        action = Text("abort", "bold red") if each.goes else Text("keep", "green")
        size = "" if each.upload.num_bytes is None else terminal.size_text(each.upload.num_bytes)
        place = "?" if step is None else f"{step:,}"
        rows.append(Row(cells=(place, "upload", size, action, each.reason)))
    print_table(["step", "state", "size", "", "reason"], rows, right=["step", "size"], fixed=-1)
    sys.stdout.flush()


def _print_summary(plan: list[Item], unfinished: list[UploadItem], *, done: bool) -> None:
    num_going, num_aborted = sum(item.goes for item in plan), sum(each.goes for each in unfinished)
    size = terminal.size_text(_num_bytes(plan, unfinished))
    verbs = ("deleted", "aborted") if done else ("would delete", "abort")
    aborted = f" and {verbs[1]} {terminal.count_text(num_aborted, 'upload')}" if num_aborted else ""
    if not num_going and not num_aborted:
        terminal.say("nothing to delete")
    else:
        advice = "" if done else "; nothing is deleted without --yes"
        terminal.say(f"{verbs[0]} {num_going} of {len(plan)}{aborted}, {size}{advice}")

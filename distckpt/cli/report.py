"""`distckpt report URL`: a run as one page of HTML.

It shows what the checkpoints say, and, if the run's local logs are there, what they do: `events.jsonl`, `log.jsonl`,
`evaluation.json`.

JSON: {"url", "report" (the page's path, null if it went to stdout), "bytes" (of the page), "logs" (the folder whose
logs were read, null if it holds none), "state" ("complete", "preempted", "failed", "running", "killed" or "unknown"),
"step", "jobs", "saves", "checkpoints" (that can be restored; numbers)}.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from distckpt import inventory, leasefiles
from distckpt.cli import terminal
from distckpt.cli.options import AsJson, StorageOptions, Url, open_url
from distckpt.errors import CheckpointNotFoundError, StorageError
from distckpt.inventory import Found
from distckpt.logfolder import log_folder
from distckpt.report import Logs, gather, read_logs, render
from distckpt.storage import Storage
from distckpt.wholefile import write_whole

Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Where to write it; - for stdout. By default report-NAME.html here, NAME being the run's last name.",
        show_default=False,
    ),
]
LogDir = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="The run's local logs. By default its directory, if that is local, else runs/NAME.",
        show_default=False,
    ),
]


def report(
    url: Url,
    *,
    output: Output = None,
    log_dir: LogDir = None,
    as_json: AsJson = False,
    storage_options: StorageOptions = None,
) -> None:
    """Write a page about a run: curves, saves, checkpoints, jobs, classes. It opens in any browser, offline."""
    if output == "-" and as_json:
        raise typer.BadParameter("-o - and --json both want stdout")
    storage = open_url(url, storage_options)
    logs = read_logs(log_folder(log_dir, url))
    found = _found(storage, logs)
    facts = gather(found, leasefiles.standing(storage), logs, url=storage.url, now=time.time())
    page = render(facts).encode()
    if output == "-":
        sys.stdout.write(page.decode())
        return
    path = Path(f"report-{_plain(facts.name)}.html" if output is None else output)
    _write(path, page)
    if as_json:
        counts = {"jobs": len(facts.jobs), "saves": len(facts.saves), "checkpoints": len(facts.kept)}
        read = None if logs.is_empty else str(logs.folder)
        told = {"url": storage.url, "report": str(path), "bytes": len(page), "logs": read}
        terminal.print_json({**told, "state": facts.state, "step": facts.step, **counts})
        return
    print(path)
    if logs.is_empty:
        terminal.say(f"no logs in {logs.folder}: made from the checkpoints alone; --log-dir DIR says where they are")


def _found(storage: Storage, logs: Logs) -> list[Found]:
    """Return what lies in the directory; nothing, if there are logs to tell of it at least."""
    try:
        return inventory.take(storage, brief=True)
    except CheckpointNotFoundError:
        if logs.is_empty:
            raise
        return []


def _plain(name: str) -> str:
    """Return a run's name as part of a file's."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)[:100]


def _write(path: Path, page: bytes) -> None:
    """Write the page, whole or not at all."""
    try:
        write_whole(path, page)
    except OSError as error:
        cause = error.strerror or str(error)
        fix = "name a file in a folder that can be written: -o FILE"
        raise StorageError(path=str(path), action="write", cause=cause, errno=error.errno, fix=fix) from error

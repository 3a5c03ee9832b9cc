"""`distckpt doctor URL`: whether a place can hold checkpoints, tried on throw-away files that are removed again.

JSON: {"url", "well" (false if anything is bad), "findings": [...]}, each with "name", "verdict" ("good", "warning",
"bad" or "unknown"), "text" and "facts" (numbers, by name; times in seconds, sizes in bytes). Names: "software",
"endpoint" and "credentials" (of S3: where they were found, never what they are), "list", "publish", "race", "write",
"read", "clock", "delete", "durability", "room", "sharing", and with --bytes "save". What cannot be tried because
something before it is bad is left out.
Exit code 1 if anything is bad.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from distckpt.cli import terminal
from distckpt.cli.exits import Exit
from distckpt.cli.options import AsJson, StorageOptions, open_url, parse_size
from distckpt.cli.tables import Row, print_table

_STYLES = {"good": "green", "warning": "yellow", "bad": "bold red", "unknown": "dim"}

Directory = Annotated[str, typer.Argument(metavar="URL", help="A run's directory, there or not.", show_default=False)]
Bytes = Annotated[
    int | None,
    typer.Option(
        "--bytes",
        metavar="SIZE",
        parser=parse_size,
        help="A checkpoint's size, such as 5GB: says what a save would take.",
        show_default=False,
    ),
]
TestBytes = Annotated[
    int | None,
    typer.Option(
        metavar="SIZE",
        parser=parse_size,
        help="How much to write and read at most, to measure the rates; by default 64MiB.",
        show_default=False,
    ),
]


def doctor(
    url: Directory,
    *,
    save_bytes: Bytes = None,
    test_bytes: TestBytes = None,
    as_json: AsJson = False,
    storage_options: StorageOptions = None,
) -> None:
    """Try whether a place can hold checkpoints: rights, atomicity, durability, room, rates, clock, credentials."""
    from distckpt.diagnosis import TEST_BYTES, Finding, examine
    from distckpt.surroundings import access, software

    storage = open_url(url, storage_options)
    test_bytes = test_bytes or TEST_BYTES
    findings: list[Finding] = [software(), *access(url, storage_options)]
    with terminal.moving("measuring", total_bytes=2 * test_bytes) as advance:
        findings += examine(storage, test_bytes=test_bytes, save_bytes=save_bytes, advance=advance)
    is_well = all(found.verdict != "bad" for found in findings)
    if as_json:
        listed = [
            {"name": found.name, "verdict": found.verdict, "text": found.text, "facts": found.facts}
            for found in findings
        ]
        terminal.print_json({"url": storage.url, "well": is_well, "findings": listed})
    else:
        _print(findings)
        bad = [found.name for found in findings if found.verdict == "bad"]
        terminal.say(f"{storage.url}: " + ("well" if is_well else f"not fit for checkpoints: {', '.join(bad)}"))
    if not is_well:
        raise typer.Exit(Exit.DIFFERENT)


def _print(findings: list[Any]) -> None:
    from rich.text import Text

    rows = []
    for found in findings:
        rows.append(Row(cells=(found.name, Text(found.verdict, _STYLES[found.verdict]), found.text)))
        if "fix" in found.facts:
            rows.append(Row(cells=("", "", f"Fix: {found.facts['fix']}")))
    print_table(["check", "", "found"], rows, fixed=-1)
    sys.stdout.flush()

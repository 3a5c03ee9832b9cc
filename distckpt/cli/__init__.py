"""The command line: look at the checkpoints of a run, check, compare, move and prune them, on any path or URL.

    distckpt ls|show|verify|diff|prune|pin|unpin|doctor URL [--json]
    distckpt report URL [-o FILE]
    distckpt cp SRC DST
    distckpt export URL DST --format safetensors|torch|dcp|hf
    distckpt import SRC URL

Data goes to stdout, talk to stderr. With `--json` stdout is one JSON object; each command's module names its fields.
In it times are seconds since 1970, sizes bytes, and numbers that JSON lacks the strings "nan", "inf" and "-inf".

| exit code | means |
|---|---|
| 0 | fine; `verify`: all whole; `diff`: the same state |
| 1 | `verify`: damage found; `diff`: another state; `doctor`: something is bad |
| 2 | wrong usage, a malformed URL, or a package that the URL needs is not installed |
| 3 | there is no checkpoint |
| 4 | the storage failed |
| 5 | a checkpoint or file that is needed is damaged, of a newer format, or not safe to open |
| 6 | what was to be made exists already, and is something else |
| 7 | a job that runs owns the directory |
| 70 | a bug in distckpt |

Invariant: torch is imported by `import` and by `export` to torch and DCP alone; checkpoints are deleted by
`prune --yes` alone.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, and leave the process with its exit code."""
    try:
        from distckpt.cli.application import application

        application(prog_name="distckpt")
    except Exception:  # noqa: BLE001  Python's own exit code for it, 1, would read as "different"
        sys.excepthook(*sys.exc_info())
        sys.exit(70)

"""The command line: look at the checkpoints of a run, check, compare and prune them, on any path or URL.

    distckpt ls|show|verify|diff|prune URL [--json]

Data goes to stdout, talk to stderr. With `--json` stdout is one JSON object; each command's module names its fields.
In it times are seconds since 1970, sizes bytes, and numbers that JSON lacks the strings "nan", "inf" and "-inf".

| exit code | means |
|---|---|
| 0 | fine; `verify`: all whole; `diff`: the same state |
| 1 | `verify`: damage found; `diff`: another state |
| 2 | wrong usage, a malformed URL, or a package that the URL needs is not installed |
| 3 | there is no checkpoint |
| 4 | the storage failed |
| 5 | a checkpoint that is needed is damaged, or of a newer format |
| 70 | a bug in distckpt |

Invariant: torch is never imported, and nothing is changed but by `prune --yes`.
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

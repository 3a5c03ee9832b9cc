"""Every benchmark, one after another, each in processes of its own.

python -m benchmarks
python -m benchmarks --size full

At the end it says which targets were reached and who was ahead, and draws the pictures.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.options import parse

BENCHMARKS = (
    *("local_save", "async_stall", "load", "small_tensors", "digests"),
    *("ddp_bytes", "collectives", "planning"),
)
AFTERWARDS = ("summary", "plots")


def main(arguments: list[str] | None = None) -> int:
    """Run all; return 1 if one of them failed."""
    given = sys.argv[1:] if arguments is None else arguments
    results = str(parse(given, about="every benchmark, one after another", ranks=(1,)).results)
    failed = []
    for name in BENCHMARKS:
        begun = time.monotonic()
        run = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *given], check=False)
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        if run.returncode:
            failed.append(name)
    for name in AFTERWARDS:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--results", results], check=False)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

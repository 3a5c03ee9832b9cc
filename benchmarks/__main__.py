"""Every benchmark, one after another, each in processes of its own.

python -m benchmarks
python -m benchmarks --size full
"""

from __future__ import annotations

import subprocess
import sys
import time

BENCHMARKS = ("planning", "digests", "local_save", "async_stall", "load", "small_tensors", "ddp_bytes")


def main(arguments: list[str] | None = None) -> int:
    """Run all; return 1 if one of them failed."""
    given = sys.argv[1:] if arguments is None else arguments
    failed = []
    for name in BENCHMARKS:
        begun = time.monotonic()
        run = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *given], check=False)
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        if run.returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The trials of `test_full_disk.py`, in a mount namespace of their own, where a small file system is theirs alone.

Started by `unshare --mount`; takes a folder, and which trials to carry out; prints what came of each as a line of JSON.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import full_disk_jobs
from forked_ranks import ForkedRanks
from full_disk_jobs import STATE_BYTES, Trial, When

DISK_BYTES = 6 * STATE_BYTES
END_LIMIT_S = 240.0
POINTS: tuple[tuple[When, int], ...] = (
    *(("before", int(STATE_BYTES * part)) for part in (0, 0.004, 0.25, 0.5, 0.75, 0.99)),
    *(("put", int(STATE_BYTES * part)) for part in (0, 0.3)),
    *(("chunk", int(STATE_BYTES * part)) for part in (0, 0.1, 0.45)),
    *(("synced", 0), ("publish", 0)),
)


def trials(disk: str) -> Iterator[Trial]:
    """Yield every point with every kind of job, so that few of them, from the first on, are of many kinds."""
    kinds = list(itertools.product((1, 2), ("sharded", "full"), (False, True)))
    for turn in range(len(kinds)):
        for number, (when, leave_bytes) in enumerate(POINTS):
            num_ranks, layout, background = kinds[(number + turn) % len(kinds)]
            yield Trial(
                disk=disk,
                when=when,
                leave_bytes=leave_bytes,
                num_ranks=num_ranks,
                layout=layout,  # type: ignore[arg-type]
                background=background,
            )


def main(folder: Path, chosen: range) -> None:
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], check=True, timeout=30)
    print(json.dumps({"mounted": str(disk)}), flush=True)
    every = list(trials(str(disk)))
    for number in chosen:
        if number >= len(every):
            break
        trial = every[number]
        with ForkedRanks(trial.num_ranks, folder / str(number), full_disk_jobs.live, trial) as ranks:
            hung = ranks.join(range(trial.num_ranks), timeout_s=END_LIMIT_S)
            told = {rank: ranks.told(rank) for rank in range(trial.num_ranks)}
            codes = [process.exitcode for process in ranks.processes]
            logs = [ranks.log(rank)[-3000:] for rank in range(trial.num_ranks)]
        print(
            json.dumps({"trial": asdict(trial), "told": told, "hung": hung, "codes": codes, "logs": logs}), flush=True
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), range(*map(int, sys.argv[2:5])))

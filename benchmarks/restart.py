"""How long a restarted process takes until its first new step, and where that time goes.

    python -m benchmarks.restart
    python -m benchmarks.restart --model vit_b_16 --rounds 7

Each is a process of its own, from the moment at which it is started. "build": imports torch and torchvision and builds
the model and its optimizer; nobody can be quicker. "plain": does that, restores the newest checkpoint, and does a step.
"ahead": the same, but imports within `with distckpt.prefetch(directory):`. "memory": likewise, and has a memory tier,
and reads the checkpoint there, as after a crash: nothing of its data files is read from the storage.
With a cold cache, the checkpoint's files have been dropped from the page cache, as the kernel confirms; libraries are
warm for all. Medians of rounds, in which the order is drawn anew; the ratio is that within each round.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.disk import forget, warm
from benchmarks.machine import COMMIT, file_system, machine, versions
from benchmarks.options import BUILD, RESULTS
from benchmarks.report import aligned
from benchmarks.restarted import HOWS, STORED
from distckpt import catalog
from distckpt.memorytier import MemoryTier
from distckpt.storage import open_storage

STEP = "first step"  # its computing is the training's own, restored or not
TARGET = 1.3  # restart to first step, over importing torch and building the model
ROOT = Path(__file__).parents[1]


def save(directory: Path, model: str) -> int:
    """Save a checkpoint after one step, and return its size in bytes."""
    import torch
    import torchvision

    from distckpt import CheckpointManager

    module = torchvision.models.get_model(model)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    torch.autograd.backward(module(torch.randn(2, 3, 224, 224)).square().mean())
    optimizer.step()
    with CheckpointManager(directory, every=1) as manager:
        manager.save(1, {"model": module, "optimizer": optimizer, "epoch": 0})
        manager.wait()
        latest = manager.latest
    assert latest is not None
    return latest.num_bytes


def keep_in_memory(directory: Path) -> None:
    """Bring the newest checkpoint to the memory tier, as its save would have."""
    storage = open_storage(directory)
    folder, manifest = catalog.locate(storage)
    tier = MemoryTier(storage.url)
    for file in manifest.files:
        data = memoryview((directory / folder / file.name).read_bytes())
        with tier.copying(manifest.attempt, rank=file.rank, num_bytes=len(data)) as copy:
            copy(0, data)
    tier.leave(in_good_order=False)


def start(how: str, directory: Path, model: str) -> dict[str, float]:
    """Start a process, and return the seconds that its parts took."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}  # as torchrun sets it
    environment["RESTART_BEGUN"] = str(time.monotonic())
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.restarted", str(directory), "--model", model, "--how", how],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    if run.returncode:
        raise RuntimeError(f"{how}: {run.stderr[-2000:]}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def measure(directory: Path, model: str, *, rounds: int, seed: int) -> dict[str, list[dict[str, float]]]:
    """Return what each contender took in each round, by "how, cache"."""
    order = random.Random(seed)
    seen: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for cache in ("warm", "cold"):
            for how in order.sample(HOWS, len(HOWS)):
                if how == "memory":  # who starts without a tier has removed it
                    keep_in_memory(directory)
                (warm if cache == "warm" else forget)(directory)
                seen.setdefault(f"{how}, {cache}", []).append(start(how, directory, model))
    return seen


def table(seen: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """Return the rows of the table: medians in seconds, and the ratio to building alone."""
    names = dict.fromkeys(part for runs in seen.values() for run in runs for part in run)
    parts = [name for name in names if name not in ("total", STORED)]
    rows = [["", *parts, "total", "x build", "without the step", "MB from the storage"]]
    for name in sorted(seen):
        runs, limits = seen[name], seen[f"build, {name.rpartition(' ')[2]}"]
        middle = [statistics.median(run.get(part, 0.0) for run in runs) for part in [*parts, "total"]]
        pairs = [(run["total"], run.get(STEP, 0.0), limit["total"]) for run, limit in zip(runs, limits, strict=True)]
        ratio = statistics.median(total / limit for total, _, limit in pairs)
        ready = statistics.median((total - step) / limit for total, step, limit in pairs)
        stored = "" if STORED not in runs[0] else f"{max(run[STORED] for run in runs) / 1e6:.1f}"
        cells = [f"{value:.3f}" if value else "" for value in middle]
        rows.append([name, *cells, f"{ratio:.2f}", f"{ready:.2f}", stored])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="how long a restarted process takes until its first new step")
    parser.add_argument("--model", default="resnet50", help="one of torchvision's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="what the orders of the rounds are drawn from")
    parser.add_argument("--directory", type=Path, default=BUILD, help="on the disk that is to be measured")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON line goes")
    options = parser.parse_args(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    compileall.compile_dir(ROOT / "distckpt", quiet=1)  # as pip does for what it installs
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.directory) as made:
        directory = Path(made) / "run"
        facts: dict[str, Any] = {"model": options.model, "bytes": save(directory, options.model)}
        facts["file_system"] = file_system(directory)
        load = os.getloadavg()[0]
        try:
            seen = measure(directory, options.model, rounds=options.rounds, seed=options.seed)
        finally:
            MemoryTier(str(directory)).leave(in_good_order=True)
    print(f"restart: seconds of each part; {', '.join(f'{k} {v}' for k, v in facts.items())}; load {load:.1f}")
    print("\n".join(aligned(table(seen))))
    print(f"target: at most {TARGET} x build")
    options.results.mkdir(parents=True, exist_ok=True)
    line = {"benchmark": "restart", **facts, "load_average": load, "rounds": seen}
    with (options.results / "restart.jsonl").open("a") as file:
        file.write(json.dumps({**line, "commit": COMMIT, "machine": machine(), "versions": versions()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

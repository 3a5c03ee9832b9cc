"""What a save and a restore cost as the number of ranks grows, up to far more than there are machines here.

    python -m benchmarks.scale
    python -m benchmarks.scale --ranks 8 512 --tensors 1000

The ranks are simulated, one after another (see `simulation`): seconds are processor time of one process, sizes and
counts are exact. "full": all ranks hold the state, rank 0 writes it. "replicated": all hold it, and share the writing.
"sharded": each tensor is cut over all ranks. "hsdp": over one row of a mesh, whose other rows hold replicas.
"fsdp x tp": by rows over one dimension of a mesh, and by columns over the other.
DCP: its default planner on the way through rank 0, for the same state, and the pickled plan of one rank.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

from benchmarks.machine import COMMIT, machine, versions
from benchmarks.options import RESULTS
from benchmarks.report import aligned
from benchmarks.simulation import Kind, restored, simulate, simulated_state

WORLD_SIZES = (8, 64, 1024, 16_384)
TENSORS = (1_000, 20_000)
MOST_DCP_ITEMS = 200_000  # what its merge of all plans needs above that is minutes and gigabytes
TITLES = (
    *("", "tensors", "ranks", "plan 1st, ms", "plan later, ms", "sent 1st, kB", "sent later, B"),
    *("rank 0 gets 1st, MB", "later, MB", "rank 0 1st, s", "later, s"),
    *("manifest, MB", "files", "tensors", "asks", "rank 0"),
    *("parse, s", "match, s", "files a rank reads", "DCP plan, s", "DCP sent, MB"),
)


def measure(kind: Kind, num_tensors: int, world_size: int) -> dict[str, Any]:
    """Return what was seen of one state on one number of ranks."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        first, later = simulate(kind, num_tensors, world_size, path)
        found: dict[str, Any] = {
            **{"kind": kind, "tensors": num_tensors, "ranks": world_size},
            **{"first": asdict(first), "later": asdict(later)},
        }
        found["restore"] = asdict(restored(kind, num_tensors, world_size, path))
    if kind in ("replicated", "sharded") and num_tensors * world_size <= MOST_DCP_ITEMS:
        found["dcp"] = dcp(kind, num_tensors, world_size)
    return found


def dcp(kind: Kind, num_tensors: int, world_size: int) -> dict[str, float]:
    """Return how long DCP's default planner takes, and what all ranks send to rank 0 and get back."""
    with simulated_state(kind, num_tensors, 0, world_size) as state:
        planner = DefaultSavePlanner()
        begun = time.process_time()
        planner.set_up_planner(dict(state["model"]), is_coordinator=True)
        plan = planner.create_local_plan()
        seconds = time.process_time() - begun
        plans = [plan if kind == "replicated" else moved(plan, rank) for rank in range(world_size)]
        begun = time.process_time()
        planner.create_global_plan(plans)
        seconds += time.process_time() - begun
        return {"plan_s": seconds, "sent_bytes": 2 * world_size * len(pickle.dumps(plan))}


def moved(plan: SavePlan, rank: int) -> SavePlan:
    """Return rank 0's plan of a sharded state as another rank makes it: of its own row."""
    start = torch.Size([rank])
    items = [
        replace(
            item,
            index=replace(item.index, offset=start),
            tensor_data=replace(item.tensor_data, chunk=replace(item.tensor_data.chunk, offsets=start)),
        )
        for item in plan.items
        if item.tensor_data is not None
    ]
    return replace(plan, items=items)


def row(found: dict[str, Any]) -> list[str]:
    """Return a row of the table; what was not run has a dash."""
    first, later, restore, theirs = found["first"], found["later"], found["restore"], found.get("dcp")
    sizes = (later[f"{part}_bytes"] / 1e6 for part in ("manifest", "file_table", "tensor_table"))
    return [
        *(found["kind"], f"{found['tensors']:,}", f"{found['ranks']:,}"),
        *(f"{first['plan_s'] * 1e3:.1f}", f"{later['plan_s'] * 1e3:.1f}"),
        *(f"{first['sent'] / 1e3:.2f}", f"{later['sent']:,}"),
        *(f"{each:.3g}" for each in (first["received"] / 1e6, later["received"] / 1e6)),
        *(f"{each:.3g}" for each in (first["decide_s"], later["decide_s"])),
        *(f"{each:.3g}" for each in sizes),
        *(
            " ".join(f"{n} {verb}" for verb, n in later["requests"][who].items()) or "-"
            for who in ("one rank", "rank 0")
        ),
        *(f"{restore['parse_s']:.3f}", f"{restore['plan_s']:.3f}", f"{restore['files']:,}"),
        *((f"{theirs['plan_s']:.3g}", f"{theirs['sent_bytes'] / 1e6:.3g}") if theirs else "--"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="what a save and a restore cost as the number of ranks grows")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(WORLD_SIZES))
    parser.add_argument("--tensors", type=int, nargs="+", default=list(TENSORS))
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=list(get_args(Kind)))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON line goes")
    options = parser.parse_args(arguments)
    cases = [(k, t, w) for k in options.kinds for t in options.tensors for w in options.ranks]
    seen = []
    for kind, num_tensors, world_size in cases:
        seen.append(measure(kind, num_tensors, world_size))
        print(f"{kind}, {num_tensors} tensors, {world_size} ranks", file=sys.stderr, flush=True)
    print("\n".join(aligned([TITLES, *map(row, seen)])))
    options.results.mkdir(parents=True, exist_ok=True)
    line = {"benchmark": "scale", "cases": seen, "commit": COMMIT, "machine": machine(), "versions": versions()}
    with (options.results / "scale.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

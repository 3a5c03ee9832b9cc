"""How long it takes to plan a save, against the number of ranks, which are simulated in one process.

    python -m benchmarks.planning

distckpt: each rank computes its own share alone. DCP: each rank plans all of it, rank 0 merges the plans of all.
What DCP then sends over the wire (each rank's plan to rank 0, and back) is given by its pickled size, not timed.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from benchmarks import options
from benchmarks.ceilings import MemoryCopy, timed
from benchmarks.options import Options
from benchmarks.report import Report
from benchmarks.rounds import Cell, interleave
from benchmarks.targets import Column
from benchmarks.team import Team
from distckpt.shards import own_share

WORLD_SIZES = (1, 4, 16, 64, 256)
TENSORS = (1_000, 20_000)
MOST_DCP_ITEMS = 400_000  # what its merge needs above that is minutes and gigabytes
ABOUT = "seconds to plan a save, by number of ranks"


def measure(options: Options, team: Team) -> None:
    """Measure each number of tensors."""
    tiny = options.size == "tiny"
    for num_tensors in (100,) if tiny else TENSORS:
        measure_tensors(num_tensors, (1, 4) if tiny else WORLD_SIZES, options, team)


def measure_tensors(num_tensors: int, world_sizes: Sequence[int], options: Options, team: Team) -> None:
    """Measure one number of tensors, and report."""
    tensors = {f"layer{i // 10}.tensor{i}": torch.zeros(64) for i in range(num_tensors)}
    copy = MemoryCopy([torch.zeros(1 << 22)])

    def ours() -> Mapping[str, float]:
        return {
            f"w{size}_s": timed(partial(own_share, tensors, rank=size // 2, num_writers=size)) for size in world_sizes
        }

    def dcp(*, cached: bool) -> Mapping[str, float]:
        measured: dict[str, float] = {}
        for size in world_sizes:
            if size * num_tensors <= MOST_DCP_ITEMS:
                measured.update(dcp_plan(tensors, size, cached=cached))
        return measured

    cells: dict[str, Cell] = {
        "memory copy": lambda: {"copy_s": timed(lambda: copy.copy(num_times=10))},
        "distckpt": ours,
        "DCP": lambda: dcp(cached=False),
        "DCP, plan cache, later saves": lambda: dcp(cached=True),
    }
    run = interleave(cells, team=team, rules=options.rules, references=(("memory copy", "copy_s"),))
    plan_columns = [Column(title=f"{size} ranks", measure=f"w{size}_s") for size in world_sizes]
    skipped = [size for size in world_sizes if size * num_tensors > MOST_DCP_ITEMS]
    report = Report(
        benchmark="planning",
        about=ABOUT,
        facts={"size": options.size, "tensors": num_tensors},
        columns=[*plan_columns, Column(title="pickled plan of a rank, kB", measure="wire", scale=1e-3)],
        run=run,
        limits=("memory copy",),
        absent={"DCP": f"at {skipped} ranks: above {MOST_DCP_ITEMS:,} items its merge takes too long"}
        if skipped
        else {},
    )
    report.give(options.results)


def dcp_plan(tensors: Mapping[str, torch.Tensor], world_size: int, *, cached: bool) -> dict[str, float]:
    """Return how long DCP's default planner takes on the way through rank 0, and how large a rank's plan is."""
    state = dict(tensors)
    planner = DefaultSavePlanner(enable_plan_caching=cached)
    if cached:  # the first save fills the cache, untimed
        planner.set_up_planner(state, is_coordinator=True)
        plan = planner.create_local_plan()
        plans, _ = planner.create_global_plan([plan] * world_size)
        planner.finish_plan(plans[0])
    sizes: list[int] = []

    def work() -> None:
        planner.set_up_planner(state, is_coordinator=True)
        plan = planner.create_local_plan()
        sizes.append(len(pickle.dumps(plan)))
        # Replicated state: every rank's plan is the same.
        plans, _ = planner.create_global_plan([plan] * world_size)
        planner.finish_plan(plans[0])

    seconds = timed(work)
    if cached:
        for cache in vars(type(planner).__mro__[1]).values():
            if isinstance(cache, dict):
                cache.clear()  # the next world size begins anew
    return {f"w{world_size}_s": seconds, "wire": max(sizes)}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    return options.run(measure, module="benchmarks.planning", about=ABOUT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

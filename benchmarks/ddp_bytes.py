"""What each rank of a DDP job copies, writes, reads and sends, by the kernel's own counters. Nothing here is timed.

    python -m benchmarks.ddp_bytes
    python -m benchmarks.ddp_bytes --ranks 2 --states vgg16 --size full

The state is replicated, as DDP has it. More ranks than cores are fine: bytes do not depend on how fast they go.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import options, states
from benchmarks.contenders.background import BackgroundSaver, openable
from benchmarks.contenders.synchronous import Saver, open_savers
from benchmarks.disk import forget, remove
from benchmarks.kernel import counters, most_memory_bytes, reset_most_memory
from benchmarks.options import Options, facts_of
from benchmarks.report import Column, Report
from benchmarks.rounds import Cell, Rules, interleave
from benchmarks.states import State
from benchmarks.team import Team

ABOUT = "bytes of each rank, against the state's"


def measure(options: Options, team: Team) -> None:
    """Measure every state."""
    for name in options.states:
        measure_state(states.make(name, options.size), options, team)


def measure_state(state: State, options: Options, team: Team) -> None:
    """Measure one state, and report."""
    savers, absent = open_savers(state, team, options.only)
    makers, not_made = openable(state, team, options.only)
    cells: dict[str, Cell] = {}
    for name, saver in savers.items():
        cells[name] = bytes_cell(state, saver, options.directory / f"a-{len(cells)}", team)
    for name, make in makers.items():
        if not name.startswith("raw"):
            cells[f"{name}, background"] = background_cell(state, make, options.directory / f"b-{len(cells)}", team)
    run = interleave(cells, team=team, rules=Rules(num_rounds=1))
    for saver in savers.values():
        saver.close()
    report = Report(
        benchmark="ddp_bytes",
        about=ABOUT,
        facts={**facts_of(state, options, team), "share": f"{1 / team.world_size:.3f}"},
        columns=[
            Column(title="host memory of a rank / state", measure="memory_ratio"),
            Column(title="written / state", measure="written_ratio"),
            Column(title="written, largest / mean", measure="balance"),
            Column(title="read by all / state", measure="read_ratio"),
            Column(title="wire of a rank, bytes", measure="wire_of_a_rank"),
        ],
        run=run,
        absent={**absent, **{f"{name}, background": why for name, why in not_made.items()}},
    )
    if team.rank == 0:
        report.give(options.results)


def bytes_cell(state: State, saver: Saver, directory: Path, team: Team) -> Cell:
    """Return a cell: a second save, which knows the schema, and a restore from a cold cache."""

    def cell() -> Mapping[str, float]:
        if team.rank == 0:
            directory.mkdir()
        team.barrier()
        saver.save(directory / "step-000000000001")
        team.barrier()
        path = directory / "step-000000000002"
        before = counters()
        saver.save(path)
        used = counters() - before
        team.barrier()
        written = team.gather(used.written_bytes)
        wire = team.gather(used.wire_bytes)
        if team.rank == 0:
            forget(path)
        team.barrier()
        before = counters()
        saver.load(path)
        read = team.gather((counters() - before).read_bytes)
        if team.rank == 0:
            remove(directory)
        return {
            "written_ratio": sum(written) / state.num_bytes,
            "balance": max(written) * len(written) / max(sum(written), 1),
            "wire_of_a_rank": max(wire),
            "read_ratio": sum(read) / state.num_bytes,
        }

    return cell


def background_cell(state: State, make: Callable[[State, Team], BackgroundSaver], directory: Path, team: Team) -> Cell:
    """Return a cell: how much more memory a rank needs while it saves in the background."""

    def cell() -> Mapping[str, float]:
        if team.rank == 0:
            directory.mkdir()
        team.barrier()
        reset_most_memory()
        before = most_memory_bytes()
        saver = make(state, team)
        try:
            saver.start(directory / "step-000000000001")
            saver.finish()
        finally:
            saver.close()
        more = max(team.gather(most_memory_bytes() - before))
        if team.rank == 0:
            remove(directory)
        return {"memory_ratio": more / state.num_bytes}

    return cell


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    return options.run(measure, module="benchmarks.ddp_bytes", about=ABOUT, ranks=(1, 2, 4), arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

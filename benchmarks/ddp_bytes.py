"""What each rank of a DDP job copies, writes, reads and sends, by the kernel's own counters. Nothing here is timed.

    python -m benchmarks.ddp_bytes
    python -m benchmarks.ddp_bytes --ranks 2 --states vgg16 --size full

The state is replicated, as DDP has it. More ranks than cores are fine: bytes do not depend on how fast they go.
What is staged is counted where torch copies tensors on the thread that calls the save; memory is what the kernel saw.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks import options
from benchmarks.async_stall import cleared, made
from benchmarks.contenders.background import RAW, Maker, openable
from benchmarks.contenders.synchronous import Saver, open_savers
from benchmarks.disk import forget, remove
from benchmarks.kernel import counters, most_memory_bytes, reset_most_memory
from benchmarks.options import Options, facts_of
from benchmarks.report import Report
from benchmarks.rounds import Cell, Rules, interleave
from benchmarks.staged import CopiedBytes
from benchmarks.states import State
from benchmarks.targets import Column
from benchmarks.team import Team

ROOM_BYTES = 64 << 20  # what a rank may need beyond its share
BACKGROUND = "distckpt, background"
# These share each tensor with another process by a descriptor.
BY_DESCRIPTOR = {
    "DCP async, the same in a process",
    "torch_checkpointing",
    "torch_checkpointing, staging in the background",
}
ABOUT = "bytes of each rank, against the state's"


def measure(options: Options, team: Team) -> None:
    """Measure every state."""
    for name in options.states:
        measure_state(options.make(name), options, team)


def measure_state(state: State, options: Options, team: Team) -> None:
    """Measure one state, and report."""
    savers, absent = open_savers(state, team, options.only)
    makers, not_made = openable(state, team, options.only)
    for name in BY_DESCRIPTOR & makers.keys():
        if why := lacking_descriptors(len(state.tensors())):
            not_made[name] = why
            del makers[name]
    cells: dict[str, Cell] = {}
    directory = options.directory / state.name  # of its own: a manager's last word may come after its cell is done
    if team.rank == 0:
        directory.mkdir()
    for name, saver in savers.items():
        cells[name] = bytes_cell(state, saver, directory / f"{len(cells)}", team)
    for name, make in makers.items():
        if name != RAW:
            cells[f"{name}, background"] = background_cell(state, make, directory / f"{len(cells)}", team)
    run = interleave(cells, team=team, rules=Rules(num_rounds=1))
    for saver in savers.values():
        saver.close()
    report = Report(
        benchmark="ddp_bytes",
        about=ABOUT,
        facts={**facts_of(state, options, team), "share": f"{1 / team.world_size:.3f}"},
        columns=columns(team.world_size, has_targets=state.name != "small"),
        run=run,
        absent={**absent, **{f"{name}, background": why for name, why in not_made.items()}},
        own=("distckpt", BACKGROUND),
    )
    if team.rank == 0:
        report.give(options.results)


def lacking_descriptors(num_tensors: int) -> str:
    """Say why who shares each tensor with another process by a file descriptor cannot share so many; "" if it can.

    Without any left it would neither end nor fail, and nor would anybody after it.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_tensors < most // 2:
        return ""
    return f"it needs a file descriptor for each of {num_tensors:,} tensors, and may have {most:,}"


def columns(num_ranks: int, *, has_targets: bool) -> list[Column]:
    """Return the table's columns and their targets; small tensors are smaller than what is said of them."""
    found = [
        Column(
            title="staged by a rank / state",
            measure="staged_ratio",
            target=1 / num_ranks + 0.01,
            aim=1 / num_ranks,
            figure=f"bytes staged per rank of {num_ranks} / state",
            of=[BACKGROUND],
        ),
        Column(title="host memory of a rank / state", measure="memory_ratio"),
        Column(
            title="/ (share + 64 MiB)",
            measure="memory_of_limit",
            target=1.0,
            figure="host memory beyond the model, per rank / (share + 64 MiB)",
            of=[BACKGROUND],
        ),
        Column(title="written / state", measure="written_ratio"),
        Column(
            title="written, largest / mean",
            measure="balance",
            target=1.02,
            aim=1.00,
            figure="bytes written per rank, largest / mean",
            of=["distckpt"],
        ),
        Column(
            title="read by all / state",
            measure="read_ratio",
            target=1.01,
            aim=1.00,
            figure="bytes read from the device by a restore / state",
            of=["distckpt"],
        ),
        Column(title="wire of a rank, bytes", measure="wire_of_a_rank"),
    ]
    return found if has_targets else [replace(column, target=None) for column in found]


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


def background_cell(state: State, make: Maker, directory: Path, team: Team) -> Cell:
    """Return a cell: how much more memory a rank needs for its first save, and what it copies for its second."""

    def cell() -> Mapping[str, float]:
        reset_most_memory()
        before = most_memory_bytes()
        saver = made(make, state, team, directory)
        try:
            saver.start(directory / "step-000000000001")
            saver.finish()
            more = max(team.gather(most_memory_bytes() - before))
            with CopiedBytes() as copied:
                saver.start(directory / "step-000000000002")
            saver.finish()
        finally:
            saver.close()
        staged = max(team.gather(copied.num_bytes))
        cleared(directory, team)
        share = state.num_bytes / team.world_size
        ratios = {"memory_ratio": more / state.num_bytes, "memory_of_limit": more / (share + ROOM_BYTES)}
        # Who copies by other means, or in another process, is not seen to copy at all.
        return {**ratios, "staged_ratio": staged / state.num_bytes} if staged else ratios

    return cell


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    return options.run(measure, module="benchmarks.ddp_bytes", about=ABOUT, ranks=(1, 2, 4), arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

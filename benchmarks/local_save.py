"""How long a save takes until it is durable, beside raw writes of the same bytes.

    python -m benchmarks.local_save
    python -m benchmarks.local_save --ranks 2 --states vgg16

On several ranks the state is replicated, as DDP has it, and each rank of the raw write writes its part.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks import options
from benchmarks.ceilings import MemoryCopy, RawBytes, timed
from benchmarks.contenders.synchronous import Saver, open_savers
from benchmarks.disk import remove
from benchmarks.kernel import counters
from benchmarks.options import Options, facts_of
from benchmarks.report import Report
from benchmarks.rounds import Cell, interleave
from benchmarks.states import State
from benchmarks.targets import Column
from benchmarks.team import Team

ABOUT = "seconds until a save is durable"
MEMORY_COPY = "memory copy"
RAW = ("raw write, buffered", "raw write, buffered and reserved", "raw write, direct")
REFERENCES = ((MEMORY_COPY, "save_s"), ("raw write, direct", "save_s"))
TARGET, AIM = 1.20, 1.05  # of the states with large tensors; for small ones see `small_tensors`


def measure(options: Options, team: Team) -> None:
    """Measure every state."""
    for name in options.states:
        measure_state(options.make(name), options, team)


def measure_state(state: State, options: Options, team: Team) -> None:
    """Measure one state, and report."""
    savers, absent = open_savers(state, team, options.only)
    cells = {**raw_cells(state, options.directory, team), **save_cells(savers, options.directory, team)}
    # The first save makes what later ones use again; it is measured in `async_stall`.
    for cell in cells.values():
        try_once(cell)
    run = interleave(cells, team=team, rules=options.rules, references=REFERENCES)
    for saver in savers.values():
        saver.close()
    ceiling = [(raw, "save_s") for raw in RAW]
    has_target = state.name != "small"
    report = Report(
        benchmark="local_save",
        about=ABOUT,
        facts=facts_of(state, options, team),
        columns=[
            Column(
                title="save s",
                measure="save_s",
                ceiling=ceiling,
                target=TARGET if has_target else None,
                aim=AIM,
                figure="synchronous save / best raw write",
            ),
            Column(title="cpu s", measure="cpu_s"),
            Column(title="MB written", measure="written_bytes", scale=1e-6),
        ],
        run=run,
        absent=absent,
        limits=(MEMORY_COPY, *RAW),
    )
    if team.rank == 0:
        report.give(options.results)


def try_once(cell: Cell) -> None:
    """Run a cell for its side effects; what fails now fails again where it is reported."""
    try:
        cell()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001  reported by the first round
        pass


def raw_cells(state: State, directory: Path, team: Team) -> dict[str, Cell]:
    """Return the ceilings; on several ranks each writes its part, at the same time."""
    share = RawBytes(state.num_bytes // team.world_size)
    copy = MemoryCopy(list(state.tensors().values()))
    copy.copy()
    place = directory / f"raw-{team.rank}"

    def written(method: str) -> Cell:
        def cell() -> Mapping[str, float]:
            before = counters()
            seconds = timed(lambda: getattr(share, method)(place))
            used = counters() - before
            remove(place)
            return {"save_s": seconds, "cpu_s": used.cpu_s, "written_bytes": used.written_bytes}

        return cell

    methods = dict(zip(RAW, ("write_buffered", "write_reserved", "write_direct"), strict=True))
    return {
        MEMORY_COPY: lambda: {"save_s": timed(copy.copy)},
        **{name: written(method) for name, method in methods.items()},
    }


def save_cells(savers: Mapping[str, Saver], directory: Path, team: Team) -> dict[str, Cell]:
    """Return a cell for each saver: one save to a new path, which is deleted untimed."""

    def cell_of(name: str, saver: Saver) -> Cell:
        steps = itertools.count(1)
        root = directory / name.replace(" ", "-")
        root.mkdir(exist_ok=True)

        def cell() -> Mapping[str, float]:
            path = root / f"step-{next(steps):012}"
            before = counters()
            seconds = timed(lambda: saver.save(path))
            used = counters() - before
            team.barrier()
            if team.rank == 0:
                remove(path)
            return {"save_s": seconds, "cpu_s": used.cpu_s, "written_bytes": used.written_bytes}

        return cell

    return {name: cell_of(name, saver) for name, saver in savers.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    return options.run(
        measure,
        module="benchmarks.local_save",
        about=ABOUT,
        ranks=(1, 2),
        moderate=("resnet50", "vgg16"),
        leave_out=("small",),  # has a benchmark of its own
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())

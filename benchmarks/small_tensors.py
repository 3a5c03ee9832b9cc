"""What 20,000 small tensors cost the processor, to save and to load.

    python -m benchmarks.small_tensors
    python -m benchmarks.small_tensors --only distckpt --profile

With `--profile` distckpt's save and load are run once more under cProfile, and the costliest functions printed.
The first save, which makes what later ones use again, is not timed: its stall is in `async_stall`.
What small tensors cost the wire between ranks is in `collectives`.
"""

from __future__ import annotations

import cProfile
import itertools
import pstats
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks import options
from benchmarks.ceilings import MemoryCopy, timed
from benchmarks.contenders.synchronous import Saver, open_savers
from benchmarks.disk import remove
from benchmarks.kernel import counters
from benchmarks.local_save import try_once
from benchmarks.options import Options, facts_of
from benchmarks.report import Report
from benchmarks.rounds import Cell, interleave
from benchmarks.states import State
from benchmarks.targets import Column
from benchmarks.team import Team

ABOUT = "processor seconds of many small tensors"
REPEATED_COPIES = 20  # one copy of 5 MB is too short to tell how still the machine is
COPIES = f"{REPEATED_COPIES} memory copies"


def measure(options: Options, team: Team) -> None:
    """Measure, and report."""
    for name in options.states:
        measure_state(options.make(name), options, team)


def measure_state(state: State, options: Options, team: Team) -> None:
    """Measure one state, and report."""
    savers, absent = open_savers(state, team, options.only)
    copy = MemoryCopy(list(state.tensors().values()))

    def copies() -> Mapping[str, float]:
        return {"copies_s": timed(lambda: copy.copy(num_times=REPEATED_COPIES))}

    cells: dict[str, Cell] = {COPIES: copies}
    expected = state.digest()
    for name, saver in savers.items():
        cells[name] = small_cell(state, saver, options.directory / name.replace(" ", "-"), team, expected)
    for cell in cells.values():
        try_once(cell)
    references = ((COPIES, "copies_s"),)
    run = interleave(cells, team=team, rules=options.rules, references=references)
    report = Report(
        benchmark="small_tensors",
        about=ABOUT,
        facts={**facts_of(state, options, team), "tensors": len(state.tensors())},
        columns=[
            Column(
                title="save cpu s",
                measure="save_cpu_s",
                ceiling=[("DCP", "save_cpu_s")],
                against="x DCP",
                target=1 / 50,
                aim=1 / 200,
                figure="processor time of saving many small tensors / DCP's",
            ),
            Column(title="save s", measure="save_s"),
            Column(
                title="load cpu s",
                measure="load_cpu_s",
                ceiling=[("DCP", "load_cpu_s")],
                against="x DCP",
                target=1 / 30,
                aim=1 / 100,
                figure="processor time of loading many small tensors / DCP's",
            ),
            Column(title="load s", measure="load_s"),
        ],
        run=run,
        absent=absent,
        limits=(COPIES,),
    )
    if team.rank == 0:
        report.give(options.results)
    if options.profile and "distckpt" in savers:
        profile(savers["distckpt"], options.directory / "profile" / "step-000000000001")
    for saver in savers.values():
        saver.close()


def small_cell(state: State, saver: Saver, directory: Path, team: Team, expected: str) -> Cell:
    """Return a cell that saves, and loads what it has saved."""
    steps = itertools.count(1)
    directory.mkdir(exist_ok=True)

    def cell() -> Mapping[str, float]:
        path = directory / f"step-{next(steps):012}"
        begun = counters()
        save_s = timed(lambda: saver.save(path))
        saved = counters()
        state.scramble()
        loading = counters()
        load_s = timed(lambda: saver.load(path))
        loaded = counters()
        if state.digest() != expected:
            raise ValueError("the values are not those that were saved")
        team.barrier()
        if team.rank == 0:
            remove(path)
        return {
            "save_s": save_s,
            "save_cpu_s": (saved - begun).cpu_s,
            "load_s": load_s,
            "load_cpu_s": (loaded - loading).cpu_s,
        }

    return cell


def profile(saver: Saver, path: Path) -> None:
    """Print where a second save and a load spend their time."""
    path.parent.mkdir()
    saver.save(path)
    second = path.with_name("step-000000000002")
    for title, work in (("save", lambda: saver.save(second)), ("load", lambda: saver.load(second))):
        profiler = cProfile.Profile()
        profiler.runcall(work)
        print(f"--- profile of a {title}")
        pstats.Stats(profiler).sort_stats("tottime").print_stats(18)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    return options.run(
        measure, module="benchmarks.small_tensors", about=ABOUT, defaults=("small",), arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())

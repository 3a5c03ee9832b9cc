"""What digests cost a save and a load.

    python -m benchmarks.digests

Twice: against the same save and load with a digest that looks at nothing put in its place, and by the time that xxh3
takes for the same bytes on one thread, which is what digests cost where nothing overlaps them.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks import options, states
from benchmarks.ceilings import MemoryCopy, timed
from benchmarks.contenders.synchronous import Distckpt
from benchmarks.disk import remove
from benchmarks.options import Options, facts_of
from benchmarks.report import Column, Report
from benchmarks.rounds import Cell, interleave
from benchmarks.states import State, view
from benchmarks.team import Team
from distckpt import datafiles
from distckpt.checksum import digest

ABOUT = "seconds with digests and without"
ON, OFF, ALONE = "digests on", "digests off", "xxh3 alone, one thread"
TARGET = 1.10


def measure(options: Options, team: Team) -> None:
    """Measure every state."""
    for name in options.states:
        measure_state(states.make(name, options.size), options, team)


def measure_state(state: State, options: Options, team: Team) -> None:
    """Measure one state, and report."""
    savers = {ON: Distckpt(state, team), OFF: Distckpt(state, team)}
    copy = MemoryCopy(list(state.tensors().values()))
    copy.copy()

    def alone() -> Mapping[str, float]:
        views = [view(tensor) for tensor in state.tensors().values()]
        seconds = timed(lambda: [digest(each) for each in views])
        return {"save_s": seconds, "load_s": seconds}

    cells: dict[str, Cell] = {"memory copy": lambda: {"copy_s": timed(copy.copy)}, ALONE: alone}
    for name, saver in savers.items():
        cells[name] = digest_cell(saver, options.directory / name.replace(" ", "-"), off=name == OFF)
        cells[name]()
    run = interleave(cells, team=team, rules=options.rules, references=(("memory copy", "copy_s"),))
    for saver in savers.values():
        saver.close()
    report = Report(
        benchmark="digests",
        about=ABOUT,
        facts=facts_of(state, options, team),
        columns=[
            Column(title="save s", measure="save_s", ceiling=[(OFF, "save_s")], against="x off"),
            Column(title="load s, warm", measure="load_s", ceiling=[(OFF, "load_s")], against="x off"),
        ],
        run=run,
    )
    report.give(options.results)


def digest_cell(saver: Distckpt, directory: Path, *, off: bool) -> Cell:
    """Return a cell that saves, and loads what it has saved."""
    steps = itertools.count(1)
    directory.mkdir(exist_ok=True)

    def cell() -> Mapping[str, float]:
        path = directory / f"step-{next(steps):012}"
        with without_digests() if off else contextlib.nullcontext():
            save_s = timed(lambda: saver.save(path))
            load_s = timed(lambda: saver.load(path))
        remove(path)
        return {"save_s": save_s, "load_s": load_s}

    return cell


@contextlib.contextmanager
def without_digests() -> Iterator[None]:
    """Let data files be written and read with a digest that looks at nothing, and so always agrees."""
    real = getattr(datafiles, "digest")  # noqa: B009  it is not this module's to give away
    setattr(datafiles, "digest", lambda data: "0" * 32)  # noqa: B010
    try:
        yield
    finally:
        setattr(datafiles, "digest", real)  # noqa: B010


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    return options.run(measure, module="benchmarks.digests", about=ABOUT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

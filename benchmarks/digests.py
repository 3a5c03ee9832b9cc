"""What digests cost a save and a load.

    python -m benchmarks.digests

Twice: against the same save and load with a digest that looks at nothing put in its place, and by the time that xxh3
takes for the same bytes on one thread, which is what digests cost where nothing overlaps them.
Before anything is timed it is counted that xxh3 sees all of the state with digests on, and nothing of it with them off.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks import options
from benchmarks.ceilings import MemoryCopy, timed
from benchmarks.contenders.ours import Distckpt
from benchmarks.disk import forget, remove, warm
from benchmarks.hashed import counted, without_digests
from benchmarks.options import Options, facts_of
from benchmarks.report import Report
from benchmarks.rounds import Cell, interleave
from benchmarks.states import State, view
from benchmarks.targets import Column
from benchmarks.team import Team
from distckpt.checksum import digest

ABOUT = "seconds with digests and without"
ON, OFF, ALONE = "distckpt, digests on", "distckpt, digests off", "xxh3 alone, one thread"
TARGET, AIM = 1.10, 1.03


class SwitchError(Exception):
    """Digests were not what they should have been, on or off: their cost cannot be told."""


def measure(options: Options, team: Team) -> None:
    """Measure every state."""
    for name in options.states:
        measure_state(options.make(name), options, team)


def measure_state(state: State, options: Options, team: Team) -> None:
    """Measure one state, and report."""
    savers = {ON: Distckpt(state, team), OFF: Distckpt(state, team)}
    copy = MemoryCopy(list(state.tensors().values()))
    copy.copy()

    def alone() -> Mapping[str, float]:
        views = [view(tensor.cpu()) for tensor in state.tensors().values()]
        seconds = timed(lambda: [digest(each) for each in views])
        return {"save_s": seconds, "cold_load_s": seconds, "warm_load_s": seconds}

    cells: dict[str, Cell] = {"memory copy": lambda: {"copy_s": timed(copy.copy)}, ALONE: alone}
    for name, saver in savers.items():
        cells[name] = digest_cell(saver, options.directory / name.replace(" ", "-"), off=name == OFF)
        check(cells[name], off=name == OFF, num_bytes=state.num_bytes)
    run = interleave(cells, team=team, rules=options.rules, references=(("memory copy", "copy_s"),))
    for saver in savers.values():
        saver.close()
    report = Report(
        benchmark="digests",
        about=ABOUT,
        facts=facts_of(state, options, team),
        columns=[
            Column(
                title="save s",
                measure="save_s",
                ceiling=[(OFF, "save_s")],
                against="x off",
                target=TARGET,
                aim=AIM,
                figure="save, digests on / off",
            ),
            *(
                Column(
                    title=f"load s, {cache}",
                    measure=f"{cache}_load_s",
                    ceiling=[(OFF, f"{cache}_load_s")],
                    against="x off",
                    target=TARGET,
                    aim=AIM,
                    figure=f"{cache} load, digests on / off",
                )
                for cache in ("cold", "warm")
            ),
        ],
        run=run,
        own=(ON,),
        limits=("memory copy", ALONE, OFF),
    )
    report.give(options.results)


def digest_cell(saver: Distckpt, directory: Path, *, off: bool) -> Cell:
    """Return a cell that saves, and loads what it has saved, from the disk and then from the page cache."""
    steps = itertools.count(1)
    directory.mkdir(exist_ok=True)

    def cell() -> Mapping[str, float]:
        path = directory / f"step-{next(steps):012}"
        with without_digests() if off else contextlib.nullcontext():
            save_s = timed(lambda: saver.save(path))
            forget(path)
            cold_s = timed(lambda: saver.load(path))
            warm(path)
            warm_s = timed(lambda: saver.load(path))
        remove(path)
        return {"save_s": save_s, "cold_load_s": cold_s, "warm_load_s": warm_s}

    return cell


def check(cell: Cell, *, off: bool, num_bytes: int) -> None:
    """Run a cell once, and count what xxh3 sees of the state, which is saved once and loaded twice.

    Raises:
        SwitchError: It saw less than all of it with digests on, or more than a hundredth of it with them off.
    """
    with counted() as sizes:
        cell()
    seen = sum(sizes)
    if seen < 3 * num_bytes and not off:
        raise SwitchError(f"digests are on, but of {3 * num_bytes:,} bytes xxh3 saw {seen:,}")
    if seen > num_bytes / 100 and off:
        raise SwitchError(f"digests are off, but xxh3 saw {seen:,} bytes")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    return options.run(measure, module="benchmarks.digests", about=ABOUT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

"""How long a load takes, warm and cold, beside raw reads of the same bytes into the same tensors.

    python -m benchmarks.load
    python -m benchmarks.load --ranks 2 --states vgg16

Beside the raw read stands one that also computes digests, and has nothing else to do: what checking alone costs who
reads. Mapped files can be checked a little quicker, if tensors are large.
`distckpt` is the restore of a job that starts again: a new manager finds the newest checkpoint and loads it.
`distckpt load` is told which checkpoint to load. Every rank loads all of the state.
Every load is verified by the benchmark: before it all values are overwritten, after it their digest is that of the
state that was saved. A cold load counts only if the kernel says that the device delivered the bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from benchmarks import options
from benchmarks.ceilings import MemoryCopy, RawRead, timed, write_state
from benchmarks.contenders.synchronous import Saver, open_savers
from benchmarks.disk import forget, used_bytes, warm
from benchmarks.kernel import counters, is_cold
from benchmarks.options import Options, facts_of
from benchmarks.report import Report
from benchmarks.rounds import Cell, interleave
from benchmarks.states import State
from benchmarks.targets import Column
from benchmarks.team import Team

Cache = Literal["warm", "cold"]

RAW = "raw read into the tensors"
RAW_HASHED = "the same, and a digest of each piece"
MEMORY_COPY = "memory copy"
ABOUT = "seconds until all values are loaded"
TARGET, AIM = 1.35, 1.1
OWN = ("distckpt", "distckpt load")


class LoadError(Exception):
    """A load that does not count: other values than were saved, or bytes that did not come from where they should."""


def measure(options: Options, team: Team) -> None:
    """Measure every state, with a warm cache and then with a cold one."""
    for name in options.states:
        state = options.make(name)
        savers, absent = open_savers(state, team, options.only)
        loads = written(state, savers, absent, options.directory / name, team)
        caches: tuple[Cache, ...] = ("warm", "cold")
        for cache in caches:
            measure_state(state, loads, absent, options, team, cache=cache)
        for saver in savers.values():
            saver.close()


def written(
    state: State, savers: Mapping[str, Saver], absent: dict[str, str], directory: Path, team: Team
) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """Let everyone save once; return where, and how to load it. Who cannot save is added to `absent`."""
    if team.rank == 0:
        directory.mkdir()
        write_state(state, directory / "raw")
    team.barrier()
    loads: dict[str, tuple[Path, Callable[[Path], object]]] = {}
    for name, hashed in ((RAW, False), (RAW_HASHED, True)):
        raw = RawRead(state, part=team.rank, num_parts=team.world_size, hashed=hashed)
        loads[name] = (directory / "raw", raw.read)
    for number, (name, saver) in enumerate(savers.items()):
        path = directory / f"{number}" / "step-000000000001"
        path.parent.mkdir(exist_ok=True)
        error = ""
        try:
            saver.save(path)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as raised:  # noqa: BLE001  some peers' errors are no Exception; all are reported
            error = f"{type(raised).__name__}: {raised}".splitlines()[0]
        errors = [each for each in team.gather(error) if each]
        if errors:
            absent[name] = f"could not save: {errors[0]}"
        else:
            loads[name] = (path, saver.load)
            loads.update({other: (path, load) for other, load in saver.other_loads().items()})
    return loads


def measure_state(
    state: State,
    loads: Mapping[str, tuple[Path, Callable[[Path], object]]],
    absent: Mapping[str, str],
    options: Options,
    team: Team,
    *,
    cache: Cache,
) -> None:
    """Measure one state, and report."""
    expected = state.digest()
    copy = MemoryCopy(list(state.tensors().values()))
    copy.copy()
    cells: dict[str, Cell] = {MEMORY_COPY: lambda: {"load_s": timed(copy.copy)}}
    for name, (path, load) in loads.items():
        cells[name] = load_cell(state, path, load, team, cache=cache, expected=expected)
    references = ((MEMORY_COPY, "load_s"), (RAW, "load_s"))
    has_target = state.name != "small"
    run = interleave(cells, team=team, rules=options.rules, references=references)
    report = Report(
        benchmark="load",
        about=f"{ABOUT}, {cache} cache",
        facts={**facts_of(state, options, team), "cache": cache},
        columns=[
            Column(
                title="load s",
                measure="load_s",
                ceiling=[(RAW, "load_s")],
                target=TARGET if has_target else None,
                aim=AIM,
                figure=f"{cache} load / raw {cache} read",
            ),
            Column(title="cpu s", measure="cpu_s"),
            Column(
                title="read from the device / state",
                measure="device_ratio",
                target=1.01 if has_target and cache == "cold" else None,
                aim=1.00,
                figure="bytes read from the device by all ranks / state",
            ),
        ],
        run=run,
        absent=absent,
        own=OWN,
        limits=(MEMORY_COPY, RAW, RAW_HASHED),
    )
    if team.rank == 0:
        report.give(options.results)


def load_cell(
    state: State, path: Path, load: Callable[[Path], object], team: Team, *, cache: Cache, expected: str
) -> Cell:
    """Return a cell that loads once and checks what it has loaded, and where from."""

    def cell() -> Mapping[str, float]:
        state.scramble()
        if team.rank == 0:
            (forget if cache == "cold" else warm)(path)
        team.barrier()
        before = counters()
        seconds = timed(lambda: load(path))
        used = counters() - before
        num_read = sum(team.gather(used.read_bytes))
        num_bytes = path.stat().st_size if path.is_file() else used_bytes(path)
        check(cache, num_read=num_read, num_bytes=min(num_bytes, state.num_bytes))
        if state.digest() != expected:
            raise LoadError("the values are not those that were saved")
        return {"load_s": seconds, "cpu_s": used.cpu_s, "device_ratio": num_read / state.num_bytes}

    return cell


def check(cache: Cache, *, num_read: int, num_bytes: int) -> None:
    """Refuse a load that was not as cold as it should be.

    Raises:
        LoadError: A cold load read too little from the device: the cache was not dropped, or the load is lazy.
    """
    if cache == "cold" and not is_cold(num_read, num_bytes):
        raise LoadError(
            f"not cold: of {num_bytes / 1e6:.1f} MB the device delivered {num_read / 1e6:.1f}; the rest was still in "
            "the page cache, or is read later"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    return options.run(
        measure,
        module="benchmarks.load",
        about=ABOUT,
        ranks=(1, 2),
        leave_out=("small",),  # has a benchmark of its own
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())

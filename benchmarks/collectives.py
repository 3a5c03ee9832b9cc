"""How often ranks meet for a save, and what goes over the wire, against the number of tensors. Nothing here is timed.

    python -m benchmarks.collectives

A meeting is a call of distckpt's channel between ranks, counted from outside; bytes are the kernel's, of all TCP
sockets of a rank, sent and received. Tensors have 256 bytes each, and are replicated.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import options, states
from benchmarks.async_stall import cleared
from benchmarks.contenders.ours import Distckpt
from benchmarks.kernel import Counters, counters
from benchmarks.machine import file_system
from benchmarks.options import Options
from benchmarks.report import Report
from benchmarks.rounds import Cell, Rules, interleave
from benchmarks.states import State
from benchmarks.targets import Column
from benchmarks.team import Team
from distckpt.ranks import Ranks

ABOUT = "meetings of the ranks for a save, and bytes on the wire"
TENSORS = (1_000, 20_000)
NUM_LATER_SAVES = 3
QUESTIONS = {"announced"}  # a look at the store, for which nobody waits
MOST_WIRE_BYTES = 1000
SETTLING_S = 0.2  # an acknowledgement is put off for 0.04 s at most


def measure(options: Options, team: Team) -> None:
    """Measure every number of tensors, and report."""
    numbers = (100, 200) if options.size == "tiny" else TENSORS
    cells: dict[str, Cell] = {}
    for number in numbers:
        state = states.small_tensors(number, device=options.device)
        cells[named(number)] = meetings_cell(state, options.directory / str(number), team)
    few, many = named(numbers[0]), named(numbers[-1])
    report = Report(
        benchmark="collectives",
        about=ABOUT,
        facts={
            "state": "small",
            "size": options.size,
            "ranks": team.world_size,
            "device": options.device,
            "file_system": file_system(options.directory),
        },
        columns=[
            Column(
                title="meetings of a later save",
                measure="later_meetings",
                ceiling=[(few, "later_meetings")],
                against="x few tensors",
                target=1,
                figure=f"collectives of a later save, {numbers[-1]:,} tensors / {numbers[0]:,}",
            ),
            Column(title="of the first", measure="first_meetings"),
            Column(
                title="wire of a rank, later save",
                measure="later_wire",
                target=MOST_WIRE_BYTES,
                figure=f"bytes on the wire per rank and later save, {numbers[-1]:,} tensors",
            ),
            Column(title="of the first", measure="first_wire"),
        ],
        run=interleave(cells, team=team, rules=Rules(num_rounds=1)),
        own=(many,),
    )
    if team.rank == 0:
        report.give(options.results)


def named(number: int) -> str:
    """Return what stands in the table."""
    return f"distckpt, {number:,} tensors"


def meetings_cell(state: State, directory: Path, team: Team) -> Cell:
    """Return a cell: a first save, and some later ones."""

    def cell() -> Mapping[str, float]:
        saver = Distckpt(state, team)
        if team.rank == 0:
            directory.mkdir()
        team.barrier()
        meetings, wire = [], []
        for step in range(1, NUM_LATER_SAVES + 2):
            before = settled()
            with counted() as calls:
                saver.save(directory / f"step-{step:012}")
            used = settled() - before
            time.sleep(SETTLING_S)  # until the last rank has looked, too: the gathering is none of a save's
            meetings.append(sum(number for name, number in calls.items() if name not in QUESTIONS))
            wire.append(max(team.gather(used.wire_bytes)))
        saver.close()
        cleared(directory, team)
        return {
            "first_meetings": meetings[0],
            "later_meetings": max(meetings[1:]),
            "first_wire": wire[0],
            "later_wire": statistics.median(wire[1:]),
        }

    return cell


def settled() -> Counters:
    """Return the counters once what was sent is acknowledged: bytes of the gathering before would count here."""
    time.sleep(SETTLING_S)
    return counters()


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the calls of every public method of `Ranks`; of one that calls another only the outer one counts."""
    calls: Counter[str] = Counter()
    inside = threading.local()
    real = {name: value for name, value in vars(Ranks).items() if callable(value) and not name.startswith("_")}

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            if getattr(inside, "called", False):
                return method(*arguments, **named)
            calls[name] += 1
            inside.called = True
            try:
                return method(*arguments, **named)
            finally:
                inside.called = False

        return call

    try:
        for name, method in real.items():
            setattr(Ranks, name, counting(name, method))
        yield calls
    finally:
        for name, method in real.items():
            setattr(Ranks, name, method)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    return options.run(measure, module="benchmarks.collectives", about=ABOUT, ranks=(2, 4), arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

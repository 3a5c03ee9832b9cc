"""What a background save costs training: its stall, when it is durable, and the training time that is lost.

    python -m benchmarks.async_stall
    python -m benchmarks.async_stall --states gpt2-medium --ranks 1

Lost training time is what steps took from the start of a save until it was durable, the stall included, less what as
many steps take when nothing is saved. Each contender is made anew in every round, so that its first save is seen, too.
Several ranks do their steps together, as DDP's do.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks import options
from benchmarks.ceilings import timed
from benchmarks.contenders.background import PREWARMED, BackgroundSaver, Maker, openable
from benchmarks.contenders.background import RAW as RAW_BACKGROUND
from benchmarks.disk import remove
from benchmarks.local_save import MEMORY_COPY, RAW, raw_cells
from benchmarks.options import Options, facts_of
from benchmarks.report import Report
from benchmarks.rounds import Cell, interleave
from benchmarks.states import State
from benchmarks.targets import Column
from benchmarks.team import Team
from benchmarks.training import quiet_step_s, save_while_training, train_on

ABOUT = "seconds of a background save"
QUIET = "quiet step"
PLAIN = "distckpt"
REFERENCES = ((MEMORY_COPY, "stall_s"), ("raw write, direct", "durable_s"), (QUIET, "quiet_step_s"))


def measure(options: Options, team: Team) -> None:
    """Measure every state."""
    for name in options.states:
        measure_state(options.make(name), options, team)


def measure_state(state: State, options: Options, team: Team) -> None:
    """Measure one state, and report."""
    makers, absent = openable(state, team, options.only)
    prewarmed, not_prewarmed = openable(state, team, options.only, makers=PREWARMED)
    cells: dict[str, Cell] = {QUIET: lambda: {"quiet_step_s": quiet_step_s(state, team)}}
    for name, raw_cell in raw_cells(state, options.directory, team).items():
        cells[name] = renamed(raw_cell, "save_s", "stall_s" if name == MEMORY_COPY else "durable_s")
    for name, make in makers.items():
        cells[name] = background_cell(make, state, team, options.directory / name.replace(" ", "-"))
    for name, make in prewarmed.items():
        cells[name] = prewarmed_cell(make, state, team, options.directory / name.replace(" ", "-"))
    between = partial(train_on, state, team)
    run = interleave(cells, team=team, rules=options.rules, references=REFERENCES, between=between)
    report = Report(
        benchmark="async_stall",
        about=ABOUT,
        facts=facts_of(state, options, team),
        columns=columns([name for name in makers if not name.startswith(PLAIN) and name != RAW_BACKGROUND]),
        run=run,
        absent={**absent, **not_prewarmed},
        own=[name for name in (*makers, *prewarmed) if name.startswith(PLAIN)],
        limits=(MEMORY_COPY, *RAW, RAW_BACKGROUND, QUIET),
    )
    if team.rank == 0:
        report.give(options.results)


def columns(peers: Sequence[str]) -> list[Column]:
    """Return the table's columns and their targets."""
    raw = [(each, "durable_s") for each in RAW]
    copy = [(MEMORY_COPY, "stall_s")]
    return [
        Column(
            title="lost s",
            measure="lost_s",
            ceiling=[(name, "lost_s") for name in peers],
            against="x best peer",
            target=1 / 3,
            aim=1 / 8,
            figure="training time lost per save / the best peer's",
        ),
        Column(
            title="stall s",
            measure="stall_s",
            ceiling=copy,
            against="x copy",
            target=1.2,
            aim=1.05,
            figure="stall of a background save / memory copy",
        ),
        Column(
            title="first stall s",
            measure="first_stall_s",
            ceiling=copy,
            against="x copy",
            target=5,
            aim=3,
            figure="stall of the first save / memory copy",
        ),
        Column(
            title="first, prewarmed s",
            measure="prewarmed_stall_s",
            ceiling=copy,
            against="x copy",
            target=1.5,
            aim=1.1,
            figure="stall of the first save after `prewarm` / memory copy",
            of=["distckpt, prewarmed"],
        ),
        Column(
            title="durable s",
            measure="durable_s",
            ceiling=raw,
            against="x write",
            target=1.4,
            aim=1.15,
            figure="background save durable, training idle / best raw write",
        ),
        # Who copies in the background stalls nothing in `save`, but the step after it.
        Column(title="stall s, with the next step", measure="next_step_s", ceiling=copy, against="x copy"),
        Column(title="durable s, training", measure="durable_training_s"),
        Column(title="quiet step s", measure="quiet_step_s"),
        Column(title="steps", measure="num_steps"),
    ]


def prewarmed_cell(make: Maker, state: State, team: Team, directory: Path) -> Cell:
    """Return a cell: a new saver that has prewarmed itself, and its first save."""

    def cell() -> Mapping[str, float]:
        saver = made(make, state, team, directory)
        try:
            stall_s = timed(lambda: saver.start(directory / "step-000000000001"))
            saver.finish()
        finally:
            saver.close()
        cleared(directory, team)
        return {"prewarmed_stall_s": stall_s}

    return cell


def made(make: Maker, state: State, team: Team, directory: Path) -> BackgroundSaver:
    """Return a new saver whose directory is there."""
    saver = make(state, team)
    if team.rank == 0:
        directory.mkdir()
    team.barrier()
    saver.prepare(directory)
    team.barrier()
    return saver


def cleared(directory: Path, team: Team) -> None:
    """Delete what was saved, once all ranks are done with it."""
    team.barrier()
    if team.rank == 0:
        remove(directory)


def background_cell(make: Maker, state: State, team: Team, directory: Path) -> Cell:
    """Return a cell: a new saver, its first save, one while training is idle, and one while it goes on.

    A few steps lie between them, as in a training.
    """

    def cell() -> Mapping[str, float]:
        saver = made(make, state, team, directory)
        try:
            first_stall_s = timed(lambda: saver.start(directory / "step-000000000001"))
            saver.finish()
            train_on(state, team)
            team.barrier()
            begun = time.perf_counter()
            saver.start(directory / "step-000000000002")
            stall_s = time.perf_counter() - begun
            saver.finish()
            durable_s = time.perf_counter() - begun
            team.barrier()
            training = save_while_training(saver, state, team, directory / "step-000000000003")
        finally:
            saver.close()
        cleared(directory, team)
        return {"first_stall_s": first_stall_s, "stall_s": stall_s, "durable_s": durable_s, **training}

    return cell


def renamed(cell: Cell, old: str, new: str) -> Cell:
    """Return a cell one of whose measures has another name."""
    return lambda: {new if name == old else name: value for name, value in cell().items()}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    return options.run(
        measure,
        module="benchmarks.async_stall",
        about=ABOUT,
        ranks=(1, 2),
        leave_out=("small",),  # they have no training of their own to be slowed down
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())

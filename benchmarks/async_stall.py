"""What a background save costs training: its stall, when it is durable, and the training time that is lost.

    python -m benchmarks.async_stall
    python -m benchmarks.async_stall --states gpt2-medium --size full

Lost training time is what steps took from the start of a save until it was durable, the stall included, less what as
many steps take when nothing is saved. Each contender is made anew in every round, so that its first save is seen, too.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import options, states
from benchmarks.ceilings import timed
from benchmarks.contenders.background import RAW as RAW_BACKGROUND
from benchmarks.contenders.background import BackgroundSaver, openable
from benchmarks.disk import remove
from benchmarks.local_save import RAW, raw_cells
from benchmarks.options import Options, facts_of
from benchmarks.report import Column, Report
from benchmarks.rounds import Cell, interleave
from benchmarks.states import State
from benchmarks.team import Team

NUM_QUIET_STEPS = 5
ABOUT = "seconds of a background save"
MEMORY_COPY = "memory copy"
REFERENCES = ((MEMORY_COPY, "stall_s"), ("raw write, direct", "durable_s"), ("quiet step", "quiet_step_s"))


def measure(options: Options, team: Team) -> None:
    """Measure every state."""
    for name in options.states:
        measure_state(states.make(name, options.size), options, team)


def measure_state(state: State, options: Options, team: Team) -> None:
    """Measure one state, and report."""
    makers, absent = openable(state, team, options.only)
    cells: dict[str, Cell] = {"quiet step": lambda: {"quiet_step_s": quiet_step_s(state)}}
    for name, raw_cell in raw_cells(state, options.directory, team).items():
        cells[name] = renamed(raw_cell, "save_s", "stall_s" if name == MEMORY_COPY else "durable_s")
    for name, make in makers.items():
        cells[name] = background_cell(make, state, team, options.directory / name.replace(" ", "-"))
    run = interleave(cells, team=team, rules=options.rules, references=REFERENCES)
    peers = [name for name in makers if name not in ("distckpt", RAW_BACKGROUND)]
    raw = [(each, "durable_s") for each in RAW]
    copy = [(MEMORY_COPY, "stall_s")]
    report = Report(
        benchmark="async_stall",
        about=ABOUT,
        facts=facts_of(state, options, team),
        columns=[
            Column(
                title="lost s",
                measure="lost_s",
                ceiling=[(name, "lost_s") for name in peers],
                against="x best peer",
                target=1 / 3,
            ),
            Column(title="stall s", measure="stall_s", ceiling=copy, against="x copy", target=1.2),
            Column(title="first stall s", measure="first_stall_s", ceiling=copy, against="x copy", target=5),
            Column(title="durable s", measure="durable_s", ceiling=raw, against="x write", target=1.4),
            Column(title="durable s, training", measure="durable_training_s"),
            Column(title="quiet step s", measure="quiet_step_s"),
            Column(title="steps", measure="num_steps"),
        ],
        run=run,
        absent=absent,
    )
    if team.rank == 0:
        report.give(options.results)


def background_cell(make: Callable[[State, Team], BackgroundSaver], state: State, team: Team, directory: Path) -> Cell:
    """Return a cell: a new saver, its first save, one while training is idle, and one while it goes on."""

    def cell() -> Mapping[str, float]:
        saver = make(state, team)
        if team.rank == 0:
            directory.mkdir()
        team.barrier()
        try:
            first_stall_s = timed(lambda: saver.start(directory / "step-000000000001"))
            saver.finish()
            team.barrier()
            begun = time.perf_counter()
            saver.start(directory / "step-000000000002")
            stall_s = time.perf_counter() - begun
            saver.finish()
            durable_s = time.perf_counter() - begun
            team.barrier()
            training = save_while_training(saver, state, directory / "step-000000000003")
        finally:
            saver.close()
        team.barrier()
        if team.rank == 0:
            remove(directory)
        return {"first_stall_s": first_stall_s, "stall_s": stall_s, "durable_s": durable_s, **training}

    return cell


def renamed(cell: Cell, old: str, new: str) -> Cell:
    """Return a cell one of whose measures has another name."""
    return lambda: {new if name == old else name: value for name, value in cell().items()}


def quiet_step_s(state: State) -> float:
    """Return how long a step takes when nothing is saved."""
    return statistics.median(timed(state.train) for _ in range(NUM_QUIET_STEPS))


def save_while_training(saver: BackgroundSaver, state: State, path: Path) -> dict[str, float]:
    """Save while real steps are done, and return what they lost by it."""
    before_s = quiet_step_s(state)
    durable_at: list[float] = []
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            saver.finish()
        except BaseException as error:  # noqa: BLE001  raised below
            failures.append(error)
        durable_at.append(time.perf_counter())

    begun = time.perf_counter()
    saver.start(path)
    stall_s = time.perf_counter() - begun
    waiter = threading.Thread(target=wait)
    waiter.start()
    num_steps = 0
    while num_steps == 0 or not durable_at:
        state.train()
        num_steps += 1
    ended = time.perf_counter()
    waiter.join()
    if failures:
        raise failures[0]
    quiet_s = (before_s + quiet_step_s(state)) / 2
    return {
        "lost_s": ended - begun - num_steps * quiet_s,
        "stall_training_s": stall_s,
        "durable_training_s": durable_at[0] - begun,
        "quiet_step_s": quiet_s,
        "num_steps": num_steps,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    # Small tensors have no training of their own to be slowed down.
    run = options.run
    return run(measure, module="benchmarks.async_stall", about=ABOUT, leave_out=("small",), arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

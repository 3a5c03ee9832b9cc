"""Real steps of training, with and without a save that goes on beside them."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

from benchmarks.ceilings import timed
from benchmarks.contenders.background import BackgroundSaver
from benchmarks.states import State
from benchmarks.team import Team

NUM_QUIET_STEPS = 5


def quiet_step_s(state: State, team: Team) -> float:
    """Return how long a step of all ranks takes when nothing is saved."""

    def step() -> None:
        state.train()
        team.all(True)

    return statistics.median(timed(step) for _ in range(NUM_QUIET_STEPS))


def train_on(state: State, team: Team) -> None:
    """Do a few steps, as lie between two saves of a training.

    What the turn before has left to the host and its disk is then over, and the processors are awake: after 0.3 s of
    idleness instead, a copy of 307 MB took 17 ms, and 10 after steps.
    """
    for _ in range(NUM_QUIET_STEPS):
        state.train()
        team.all(True)


def save_while_training(saver: BackgroundSaver, state: State, team: Team, path: Path) -> dict[str, float]:
    """Save while real steps are done, and return what they lost by it."""
    before_s = quiet_step_s(state, team)
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
    is_durable = False
    while not is_durable:
        state.train()
        num_steps += 1
        is_durable = team.all(bool(durable_at))
        if num_steps == 1:
            first_step_at = time.perf_counter()
    ended = time.perf_counter()
    waiter.join()
    if failures:
        raise failures[0]
    quiet_s = (before_s + quiet_step_s(state, team)) / 2
    return {
        "lost_s": ended - begun - num_steps * quiet_s,
        "stall_training_s": stall_s,
        "next_step_s": first_step_at - begun - quiet_s,
        "durable_training_s": durable_at[0] - begun,
        "quiet_step_s": quiet_s,
        "num_steps": num_steps,
    }

"""What ranks run in the tests of how a run is left."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch.distributed as dist
from in_flight_jobs import Recorder, gated

from distckpt import CheckpointManager
from distckpt.pace import RECENT_SAVES


def let_saves_take(ckpt: CheckpointManager, seconds: float) -> None:
    """Make a manager believe that its saves take so long, whatever the next one takes."""
    for _ in range(RECENT_SAVES):
        ckpt._pace.save_committed(stall_s=0.0, durable_s=seconds)


def leave_with_little_time_on_one_rank(directory: str, *, graces: list[float], takes_s: float) -> dict[str, Any]:
    """Save one step, be told that a save takes so long, and get a signal on every rank; return what was done."""
    rank, recorder = dist.get_rank(), Recorder()
    with CheckpointManager(directory, every=4, rng=False, timeout_s=30, grace_s=graces[rank]) as ckpt:
        done = 0
        for step in ckpt.steps({"recorder": recorder}, until=100):
            dist.barrier()
            recorder.step = done = step
            if step == 5:
                ckpt.wait()
                let_saves_take(ckpt, takes_s)
                os.kill(os.getpid(), signal.SIGTERM)
        newest = ckpt.latest
        return {"done": done, "newest": newest and newest.step, "preempted": ckpt.preempted, "saved": recorder.saved}


def be_asked_before_the_first_step(directory: str, *, signalled: int) -> dict[str, Any]:
    """Get a signal on one rank before the loop begins; return how many steps were done."""
    recorder, done = Recorder(), 0
    with CheckpointManager(directory, every=2, rng=False, timeout_s=30) as ckpt:
        if dist.get_rank() == signalled:
            os.kill(os.getpid(), signal.SIGUSR1)
        for step in ckpt.steps({"recorder": recorder}, until=6):
            recorder.step = step
            done += 1
        return {"done": done, "preempted": ckpt.preempted, "restored": recorder.step}


def run_to(directory: str, *, until: int) -> None:
    """Train to a step, without anything happening."""
    recorder = Recorder()
    with CheckpointManager(directory, every=2, rng=False, timeout_s=30) as ckpt:
        for step in ckpt.steps({"recorder": recorder}, until=until):
            recorder.step = step


def see_a_stop_between_two_steps(directory: str, *, signalled: int) -> list[bool]:
    """Ask whether to stop before a signal, after it, and once more; the signal comes on one rank."""
    seen = []
    with CheckpointManager(directory, rng=False, timeout_s=30) as ckpt:
        ckpt.restore({})
        seen.append(ckpt.stopping)
        dist.barrier()
        if dist.get_rank() == signalled:
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append(ckpt.stopping)
        dist.barrier()
        if dist.get_rank() != signalled:
            seen.append(ckpt.stopping)
        seen.append(ckpt.stopping)
        dist.barrier()
    return seen


def stop_where_all_have_agreed(directory: str, *, every: int, at: int) -> dict[str, Any]:
    """Stop at a step because the ranks say so themselves, once beside a save that is due; return what was done."""
    recorder = Recorder()
    with CheckpointManager(directory, every=every, rng=False, timeout_s=30) as ckpt:
        for step in range(ckpt.restore({"recorder": recorder}) + 1, 20):
            recorder.step = step
            if ckpt.step(step, {"recorder": recorder}, stop=step == at):
                break
        newest = ckpt.latest
        return {"step": recorder.step, "newest": newest and newest.step, "preempted": ckpt.preempted}


def be_asked_while_a_save_fails(directory: str, *, failing: int) -> dict[str, Any]:
    """Let the save in flight fail on one rank, and get a signal meanwhile; return what is there at the end."""
    recorder = Recorder()
    with CheckpointManager(directory, every=3, rng=False, timeout_s=30) as ckpt:
        gates = gated(ckpt)
        if dist.get_rank() == failing:
            gates.put = _fail_once(gates)  # type: ignore[method-assign]
        for step in ckpt.steps({"recorder": recorder}, until=50):
            dist.barrier()
            recorder.step = step
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
        newest = ckpt.latest
        return {"step": recorder.step, "newest": newest and newest.step, "preempted": ckpt.preempted}


def _fail_once(gates: Any) -> Any:
    """Return a put that fails, and gives way to the real one."""

    def put(*_: Any, **__: Any) -> int:
        del gates.put
        raise OSError(28, "made by a test")

    return put

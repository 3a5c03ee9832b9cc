"""Machines that are lost while they train: what is left goes on, what comes back joins, and no sample is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from elastic_job import STEPS_PER_EPOCH, ElasticJob, distckpt
from machines import Machine, Room, why_not

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}"),
    pytest.mark.timeout(600),
]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Room]:
    with Room(tmp_path, num_machines=2) as room:
        yield room


def lose(machine: Machine, how: str) -> None:
    """Lose a machine: its power is cut, or its kernel still says goodbye for its processes."""
    machine.kill() if how == "power" else machine.end()


def test_a_lost_machine_comes_back_and_the_run_ends_with_every_sample_seen_once(two: Room) -> None:
    with ElasticJob(two, epochs=4, num_machines="2") as job:
        job.start()
        job.wait_until_step(25)
        lose(two.machines[1], "processes")
        two.machines[1].come_back()
        job.start(two.machines[1])
        job.wait()
        job.assert_every_sample_was_seen_once()
        assert distckpt("verify", str(job.run)).returncode == 0


@pytest.mark.slow
def test_where_one_machine_is_asked_to_stop_the_other_goes_on_from_that_step(two: Room) -> None:
    with ElasticJob(two, epochs=8, num_machines="1:2") as job:
        job.start()
        job.wait_until_step(25)
        job.ask_to_stop(two.machines[1])
        job.wait_until(lambda: job.world_size == 1)
        job.wait(two.machines[0])
        job.assert_every_sample_was_seen_once()
        assert "preempted: saved step" in job.said(two.machines[0])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_goes_from_two_machines_to_four_to_one_to_three(tmp_path: Path) -> None:
    with Room(tmp_path, num_machines=4) as room, ElasticJob(room, epochs=80, num_machines="1:4") as job:
        first, *others = room.machines
        job.start(first, others[0])
        job.wait_until(lambda: job.last_step >= 25 and job.world_size == 2)
        job.start(*others[1:])
        job.wait_until(lambda: job.world_size == 4)
        job.wait_until_step(job.last_step + 40)
        for machine in others:
            lose(machine, "power")
        job.wait_until(lambda: job.world_size == 1)
        job.wait_until_step(job.last_step + 40)
        for machine in others[:2]:
            machine.come_back()
            job.start(machine)
        job.wait_until(lambda: job.world_size == 3)
        job.wait()
        assert job.world_size == 3
        job.assert_every_sample_was_seen_once()
        assert job.lines[-1]["val/top1"] > 0.9


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
def test_machines_that_are_lost_again_and_again_leave_the_same_weights(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    epochs = 40
    with Room(tmp_path / "calm", num_machines=2) as room, ElasticJob(room, epochs=epochs, num_machines="2") as job:
        job.start()
        job.wait()
        undisturbed = job
    with Room(tmp_path / "lossy", num_machines=2) as room, ElasticJob(room, epochs=epochs, num_machines="2") as job:
        job.start()
        for loss in range(10):
            job.wait_until_step(loss * 2 * STEPS_PER_EPOCH + chance.randrange(40))
            how = chance.choice(["power", "processes"])
            print(f"seed {seed}, loss {loss + 1}: node-1 at step {job.last_step}: {how}", flush=True)
            lose(room.machines[1], how)
            room.machines[1].come_back()
            job.start(room.machines[1])
        job.wait()
        job.assert_every_sample_was_seen_once()
        diff = distckpt("diff", str(job.run), str(undisturbed.run))
        assert diff.returncode == 0, diff.stdout + diff.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_machines_that_are_lost_again_and_again_lose_no_sample_where_their_number_changes(tmp_path: Path) -> None:
    chance = random.Random(3)
    with Room(tmp_path, num_machines=3) as room, ElasticJob(room, epochs=120, num_machines="1:3") as job:
        job.start()
        for loss in range(10):
            job.wait_until_step(loss * 200 + 20 + chance.randrange(150))
            lost, how = chance.choice(room.machines[1:]), chance.choice(["power", "processes"])
            print(f"loss {loss + 1}: {lost.name} of {job.world_size} at step {job.last_step}: {how}", flush=True)
            lose(lost, how)
            job.wait_until_step(job.last_step + 15)
            lost.come_back()
            job.start(lost)
        job.wait()
        job.assert_every_sample_was_seen_once()
        assert job.lines[-1]["val/top1"] > 0.9

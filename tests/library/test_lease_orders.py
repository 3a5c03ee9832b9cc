"""In no order in which the operations of several jobs can happen do two own a directory, whoever dies."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from interleaving import Contender, Explored, Scenario, World, explore, runs_alone

from distckpt.lease import Lease
from distckpt.leasefiles import FOLDER, Record, file_name
from distckpt.owner import Owner


def save(me: Contender) -> None:
    """Take the directory, and commit a step as a save does."""
    me.lease.acquire()
    me.has_acquired = True
    me.lease.check()
    me.checked_at = me.world.time
    me.publish_manifest(7)


def save_and_leave(me: Contender) -> None:
    save(me)
    me.lease.release()


def take(me: Contender) -> None:
    me.lease.acquire()
    me.has_acquired = True
    me.lease.check()


def take_and_renew(me: Contender) -> None:
    me.lease.acquire()
    me.has_acquired = True
    me.lease.renew()


def renew_and_save(me: Contender) -> None:
    me.lease.acquire()
    me.has_acquired = True
    me.lease.renew()
    me.lease.check()
    me.checked_at = me.world.time
    me.publish_manifest(8)


def leave_by_a_dead_owner(world: World) -> None:
    owner = Owner(host="gone", pid=99)
    record = Record(job="0" * 16, owner=owner, acquired=1.0, renewed=1.0, duration_s=2.0)
    world.files[file_name(5)] = record.to_bytes()


def check_end(world: World) -> None:
    """Somebody got it, and the next job gets it, alone, and leaves one file."""
    if world.num_faults == world.num_deaths == 0:
        assert any(contender.has_acquired for contender in world.contenders)
    after = runs_alone(take_and_leave, world.files, same_host=world.scenario.same_host)
    assert after.contenders[0].said is None, "a dead owner's lease was not taken over"
    assert len([name for name in after.files if name.startswith(FOLDER)]) == 1, "files are left"


def take_and_leave(me: Contender) -> None:
    take(me)
    me.lease.release()


def explored(scenario: Scenario) -> Explored:
    logging.disable()
    try:
        return explore(scenario, at_end=check_end)
    finally:
        logging.disable(logging.NOTSET)


DEAD = leave_by_a_dead_owner
QUICK = {
    "two start at once": Scenario(programs=(save, save), most_ticks=1),
    "two start at once and one dies": Scenario(programs=(save_and_leave,) * 2, same_host=True, most_deaths=1),
    "one stands still, another waits": Scenario(programs=(save, save), most_ticks=2),
    "an owner renews, another waits": Scenario(programs=(take_and_renew, take), most_ticks=2),
    "requests fail": Scenario(programs=(save, save), same_host=True, most_faults=2),
    "requests fail beside a dead owner": Scenario(programs=(save, save), same_host=True, most_faults=1, prepare=DEAD),
    "three take a dead owner's": Scenario(programs=(take,) * 3, same_host=True, prepare=DEAD),
}
THOROUGH = {
    "one stands still for long": Scenario(programs=(save, save), most_ticks=3),
    "two, and one dies": Scenario(programs=(save_and_leave,) * 2, most_ticks=2, most_deaths=1),
    "an owner renews late": Scenario(programs=(renew_and_save, save), most_ticks=3),
    "one of three dies": Scenario(programs=(take,) * 3, same_host=True, most_deaths=1, prepare=DEAD),
    "three come and go": Scenario(programs=(save_and_leave,) * 3, same_host=True),
}


@pytest.mark.parametrize("scenario", QUICK.values(), ids=QUICK.keys())
def test_in_no_order_of_operations_do_two_hold_the_lease(scenario: Scenario) -> None:
    assert explored(scenario).num_states > 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scenario", THOROUGH.values(), ids=THOROUGH.keys())
def test_in_no_longer_order_of_operations_do_two_hold_the_lease(scenario: Scenario) -> None:
    assert explored(scenario).num_states > 10_000


def test_a_job_that_stood_still_for_too_long_is_told_before_it_publishes() -> None:
    ends = explored(QUICK["one stands still, another waits"]).ends
    assert ("taken over", "done") in ends
    assert ("done", "busy") in ends


class _Greedy(Lease):
    """Takes what it sees, whoever owns it."""

    def _reason_to_take(self, *_: object) -> str:
        return "because"


class _Forgetful(Lease):
    """Gives the directory back by deleting its file."""

    def release(self) -> None:
        self._storage.delete([file_name(self._number)])


class _Careless(Lease):
    """Does not look before a publish."""

    def check(self) -> None:
        return


class _Credulous(Lease):
    """Believes that a file that it could publish is the newest."""

    def _is_mine(self, _: object) -> bool:
        return True


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        (_Greedy, "two hold the lease at one time"),
        (_Forgetful, "the highest number was deleted"),
        (_Careless, "published right after a check, but not the owner"),
        (_Credulous, "two hold the lease at one time"),
    ],
)
def test_the_explorer_catches_a_planted_fault(planted: type[Lease], told: str) -> None:
    scenarios = [QUICK["one stands still, another waits"], QUICK["two start at once and one dies"], *QUICK.values()]
    with pytest.raises(AssertionError, match=told):
        _ = [explored(replace(scenario, lease=planted)) for scenario in scenarios]

"""Two jobs on one directory, whose operations are interleaved: one has it, and the other one is told who.

Both are the real thing, each with its ranks; of all of them one runs at a time, and at any of its calls the other job
may go on. So whoever stands still does so right before some call, as a process that is stopped, or a machine that
sleeps, and comes back in the midst of what the other one does.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from bucket import Objects
from crashes import NOTHING, Scenario, check_restored, check_tidy, scenarios
from disk import Tree
from recording import Ack, Log, Op
from runs import Contents, Job, own_machine, repeatable, succeed
from s3_model import S3Objects

from distckpt.errors import CheckpointExistsError, DirectoryBusyError
from distckpt.owner import Fate
from distckpt.storage import clients, local, s3

Meanwhile = Literal["stands", "runs", "is seen"]
"""What a job does while the other one waits for it: nothing, or its work; or the other one sees that it runs."""

PLACES: dict[str, type[Contents]] = {"disk": Tree, "bucket": Objects, "s3": S3Objects}
END = 10**9
MOST_TURNS = 4
LIMIT_S = 120.0
DEAD_SAVES = 2
EACH = 2  # orders for each call of a job, and each of what the other one does meanwhile
MORE_EACH = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """In which order two jobs do what they do.

    Attributes:
        meanwhile: What a job does while the other one waits for it.
        turns: How many calls the jobs make by turns, before the other one goes on, or below zero, until how many saves
            are acknowledged; after that, each goes on to its end. Calls before the end of a wait do not count.
        moment: After how many calls of both together the disk, or the bucket, is looked at as well.
    """

    meanwhile: Meanwhile
    turns: tuple[int, ...]
    moment: int

    def __str__(self) -> str:
        return f"{self.meanwhile}, {' '.join(map(str, self.turns))}, {self.moment}"

    @classmethod
    def of(cls, text: str) -> Order:
        """Return the order that is shown so."""
        meanwhile, turns, moment = text.split(", ")
        assert meanwhile in get_args(Meanwhile)
        return cls(
            meanwhile=meanwhile,  # type: ignore[arg-type]
            turns=tuple(map(int, turns.split())),
            moment=int(moment),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rivals:
    """Two jobs that are to share nothing, and find the same directory.

    Attributes:
        scenario: The first job, and what lies there before.
        second: The second job.
    """

    scenario: Scenario
    second: Job

    @property
    def jobs(self) -> tuple[Job, Job]:
        """Both."""
        return self.scenario.job, self.second

    @property
    def possible(self) -> set[Ack]:
        """What may be restored, besides a fresh start."""
        return self.scenario.possible | {Ack(step, self.second.generation) for step in self.second.steps}


def rivals() -> dict[str, Rivals]:
    """Return all pairs of jobs, by name."""
    found = {scenario.name: scenario for scenario in scenarios()}
    pairs = {
        "both-start": replace(found["first-save"], job=Job(steps=(10, 20), generation=1)),
        "both-save": found["retention"],
        "both-save-in-the-background": found["background"],
        "both-clean-up": found["clean-up"],
    }
    pairs = {
        name: replace(scenario, name=name, job=replace(scenario.job, owns=True)) for name, scenario in pairs.items()
    }
    pairs["both-read-first"] = replace(found["retention"], name="both-read-first")
    return {
        name: Rivals(scenario=scenario, second=replace(scenario.job, generation=scenario.job.generation + 2))
        for name, scenario in pairs.items()
    }


@contextmanager
def one_call_at_a_time() -> Iterator[None]:
    """Let no rank read, or delete, on several threads: then an order has one outcome, and whose a call is is known."""
    places = [(local, "_NUM_READERS"), (clients, "NUM_DELETERS")]
    places += [(kind, "num_readers") for kind in (clients.FilesystemClient, s3.S3Client)]
    before = [getattr(place, name) for place, name in places]
    for place, name in places:
        setattr(place, name, 1)
    try:
        yield
    finally:
        for (place, name), value in zip(places, before, strict=True):
            setattr(place, name, value)


class Duel:
    """Both jobs on one disk, or in one bucket.

    Args:
        jobs: Both.
        contents: What lies there; they change it.
        order: The order.

    Attributes:
        logs: What each has done.
        pids: By what number each is known to the other.
        results: What each of its ranks has restored, or the error that ended it.
        looks: What lay there at the order's moment, when one job had ended, and when both had; each with the newest
            save that was acknowledged by then.
        num_calls: How many calls each has made.
        changing: Which calls of the first job came right before, or after, a change.
    """

    def __init__(self, jobs: Sequence[Job], contents: Contents, order: Order) -> None:
        self.logs = Log(), Log()
        self.pids: list[int] = []
        self.results: list[list[Ack | BaseException]] = [[], []]
        self.looks: list[tuple[Contents, Ack]] = []
        self.num_calls = [0, 0]
        self.changing: list[int] = []
        self._jobs = jobs
        self._contents = contents
        self._order = order
        self._now_s = 0.0
        self._num_ops = 0
        self._turns = iter(order.turns)
        self._left = self._turn = next(self._turns, END)
        self._num_acked = 0
        self._active = 0
        self._ended = [False, False]
        self._switch = threading.Condition()
        self._openers: list[Any] = []
        self._machines: list[Any] = []

    @property
    def acked(self) -> list[Ack]:
        """The saves that were acknowledged so far, of both."""
        return [ack for index in range(2) for ack in self._acked_by(index)]

    @property
    def ops(self) -> list[Op]:
        """What both have done, those of the first job before those of the second one."""
        return [op for log in self.logs for op in log.ops]

    def _acked_by(self, index: int) -> set[Ack]:
        return {op.ack for op in self.logs[index].ops if op.ack is not None}

    def run(self) -> None:
        """Let both run to their ends."""
        with one_call_at_a_time(), ExitStack() as stack:
            first = self._contents.machine(self.logs[0])
            # The model of a disk stands in for a module, of which there is one; each client of a server has its own.
            is_one = isinstance(self._contents, Tree)
            self._machines = [first, first if is_one else self._contents.machine(self.logs[1])]
            openers = {id(machine): stack.enter_context(machine.opened()) for machine in dict.fromkeys(self._machines)}
            self._openers = [openers[id(machine)] for machine in self._machines]
            for machine in self._machines:
                machine.on_call = self._on_call
            threads = [threading.Thread(target=self._live, args=(index,), daemon=True) for index in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LIMIT_S)
                assert not thread.is_alive(), "a job does not end"

    def _live(self, index: int) -> None:
        with self._switch:
            self._switch.wait_for(lambda: self._active == index)
        machine = own_machine(self, self._fate, pause=partial(self._pause, index))
        self.pids.append(machine.me.pid)
        self.results[index] = self._jobs[index].run(self._openers[index], self.logs[index], machine)
        with self._switch:
            self._look()
            self._ended[index] = True
            self._hand_over(index, END)

    def _look(self) -> None:
        self.looks.append((self._contents.copy(), max(self.acked, default=NOTHING)))

    @property
    def _fate(self) -> Fate:
        return "runs" if self._order.meanwhile == "is seen" else "unknown"

    def now(self) -> float:
        """Return the time, which goes by only for who waits."""
        return self._now_s

    def _pause(self, index: int, seconds: float) -> None:
        self._now_s += seconds
        if self._order.meanwhile == "stands":
            self._left = self._turn
        else:
            self._yield(index)

    def _on_call(self, _call: str, _name: str) -> None:
        index = self._active
        if self._left == 0 or (self._turn < 0 and len(self._acked_by(index)) >= self._num_acked - self._turn):
            self._yield(index)
        self._left -= 1
        if sum(self.num_calls) == self._order.moment:
            self._look()
        if index == 0 and len(self.logs[0].ops) > self._num_ops:
            self._num_ops = len(self.logs[0].ops)
            self.changing += [self.num_calls[0] - 1, self.num_calls[0]]
        self.num_calls[index] += 1

    def _yield(self, index: int) -> None:
        with self._switch:
            if not self._ended[1 - index]:
                self._hand_over(index, next(self._turns, END))
                self._switch.wait_for(lambda: self._active == index)
            else:
                self._left = self._turn = END

    def _hand_over(self, index: int, num_calls: int) -> None:
        self._active, self._left, self._turn = 1 - index, num_calls, num_calls
        self._num_acked = len(self._acked_by(1 - index))
        if self._machines[0] is self._machines[1]:
            self._machines[0].log = self.logs[1 - index]
        self._switch.notify_all()


def check(pair: Rivals, base: Contents, order: Order, seen: set[object] | None = None) -> Duel:
    """Let both run in an order, and complain unless what they were told is true, and can be restored.

    Args:
        pair: Both.
        base: What lies there before; it stays as it is.
        order: The order.
        seen: What needs no look any more; what is looked at is added.
    """
    duel = Duel(pair.jobs, base.copy(), order)
    duel.run()
    for index, results in enumerate(duel.results):
        check_told(index, results, duel.pids)
    acked = duel.acked
    assert len({ack.step for ack in acked}) == len(acked), f"two were told that they had saved one step: {acked}"
    for state, newest in duel.looks:
        key = state.key(), newest
        if seen is None or key not in seen:
            check_state(pair, state, max(newest, pair.scenario.acked))
        if seen is not None:
            seen.add(key)
    return duel


def check_told(index: int, results: list[Ack | BaseException], pids: list[int]) -> None:
    """Complain unless all ranks of a job went well, or all were told that the other one has won."""
    errors = [result for result in results if isinstance(result, BaseException)]
    assert len(errors) in (0, len(results)), f"some ranks of job {index} failed, others did not: {results}"
    for error in errors:
        who = f"job {index}: {type(error).__name__}: {error}"
        assert isinstance(error, DirectoryBusyError | CheckpointExistsError), f"not told that another one won: {who}"
        if isinstance(error, DirectoryBusyError):
            assert error.pid == pids[1 - index], f"told of the wrong one: {who}"


def check_state(pair: Rivals, contents: Contents, acked: Ack) -> None:
    """Recover on 1, 2 and 3 ranks, go on, prune, and recover again."""
    job = replace(pair.scenario.job, steps=(), background=False)
    for world_size in (1, 2, 3):
        restored = succeed(replace(job, world_size=world_size), contents.copy())
        check_restored(restored, acked, pair.possible)
    again = contents.copy()
    following = Ack(restored.step + 10, 9)
    succeed(replace(job, steps=(following.step,), generation=9, keep=1), again)
    assert succeed(replace(job, world_size=3), again.copy()) == following
    check_tidy(again, DEAD_SAVES + 3 * pair.scenario.damaged)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What is known of a job's calls: how many there are, and before which of them something was changed."""

    number: int
    changing: tuple[int, ...]

    def order(self, rng: random.Random, *, first: int, meanwhile: Meanwhile) -> Order:
        """Return an order in which the first job stands still at its call `first`."""
        turns = [self.pick(rng) for _ in range(rng.randrange(MOST_TURNS))]
        return Order(meanwhile=meanwhile, turns=(first, *turns), moment=rng.randrange(2 * self.number))

    def pick(self, rng: random.Random) -> int:
        """Return a number of calls after which to stand still: best right before, or after, something changes."""
        return rng.choice((rng.randrange(self.number), rng.randrange(5), rng.choice(self.changing), -1))


def calls_of(pair: Rivals, base: Contents) -> Calls:
    """Return what is known of the calls that the first of two jobs makes when it is not disturbed."""
    duel = Duel(pair.jobs, base.copy(), Order(meanwhile="runs", turns=(), moment=END))
    duel.run()
    return Calls(number=duel.num_calls[0], changing=tuple(duel.changing))


def sampled(calls: Calls, *, seed: int, sample: int) -> Iterator[Order]:
    """Yield so many orders of two jobs that make such calls."""
    rng = random.Random(seed)
    for _ in range(sample):
        yield calls.order(rng, first=calls.pick(rng), meanwhile=rng.choice(get_args(Meanwhile)))


def all_places(calls: Calls, *, seed: int, each: int) -> Iterator[Order]:
    """Yield orders in which the first job stands still at each of its calls: so many for each, and each `Meanwhile`."""
    rng = random.Random(seed)
    for first in range(calls.number):
        yield Order(meanwhile="stands", turns=(first, -1), moment=END)
        for meanwhile, _ in itertools.product(get_args(Meanwhile), range(each)):
            yield calls.order(rng, first=first, meanwhile=meanwhile)


def run(name: str, place: str, *, seed: int, sample: int | None = None, only: Sequence[Order] | None = None) -> int:
    """Check orders of a pair of jobs, and return how many.

    Args:
        name: The pair.
        place: Where they save.
        seed: Decides what is sampled.
        sample: How many orders; None for some at each call of the first job.
        only: Check these, and no others.

    Raises:
        AssertionError: Something did not hold; says what, where, and how to replay it.
    """
    pair, num_checked = rivals()[name], 0
    with repeatable():
        base = pair.scenario.prepare(PLACES[place]())
        calls = calls_of(pair, base)
        chosen: Iterable[Order] = all_places(calls, seed=seed, each=EACH if place == "disk" else MORE_EACH)
        if sample is not None:
            chosen = sampled(calls, seed=seed, sample=sample)
        seen: set[object] = set()
        for order in chosen if only is None else only:
            try:
                check(pair, base, order, seen)
            except Exception as error:
                replay = f"python tests/crash/replay_writers.py {name} {place} '{order}'"
                raise AssertionError(f"{name}, {place}, {order}: {error}\nReplay: {replay}") from error
            num_checked += 1
    return num_checked

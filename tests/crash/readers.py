"""Readers of a directory whose owner saves and prunes meanwhile: at any of their calls, it may be further on."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator

from crashes import NOTHING, Scenario, check_restored, record, scenarios
from crew import Crew, CrewRanks
from disk import Tree
from recording import Ack, Op
from runs import Contents, content, repeatable, told

from distckpt.restore import RestoreRequest, restore


def scenario() -> Scenario:
    """Return what the owner does: save, and delete what is older."""
    return next(scenario for scenario in scenarios() if scenario.name == "retention")


def moments(base: Contents, ops: list[Op]) -> Iterator[tuple[Contents, Ack, list[Op]]]:
    """Yield what a reader finds at first, with what is committed then, and what the owner does afterwards."""
    contents, acked = base.copy(), scenario().acked
    seen = set()
    for index, op in enumerate(ops):
        acked = max(acked, op.ack or NOTHING)
        contents.apply(op)
        if (key := contents.key()) not in seen:
            seen.add(key)
            yield contents.copy(), acked, ops[index + 1 :]


def read(contents: Contents, later: list[Op], at_call: int, *, heal: bool) -> tuple[list[Ack | BaseException], bool]:
    """Restore on 2 ranks; at their `at_call`-th call the owner does `later`. Say, too, whether it came to that.

    There is nothing to `heal`; but who might goes his own way.
    """
    machine = contents.machine()
    calls = itertools.count()
    moved_on = threading.Event()

    def go_on(call: str, _name: str) -> None:
        if next(calls) == at_call:
            moved_on.set()
            for op in later:
                machine.contents.apply(op)

    machine.on_call = go_on
    crew = Crew(2, machine.log)
    with machine.opened() as opener:

        def work(rank: int) -> Ack:
            state = content(NOTHING)
            request = RestoreRequest(rng=False, heal=heal)
            restore(state, request, storage=opener(), ranks=CrewRanks(crew, rank, "reading"))
            return told(state)

        return crew.run(work), moved_on.is_set()


def run(kind: type[Contents], *, seed: int, sample: int | None = None, heal: bool = False) -> int:
    """Check readers at all moments, or at so many that the seed picks; return how many.

    Args:
        kind: What they read.
        seed: Decides what is sampled.
        sample: How many to check; None for all.
        heal: Whether they put aside what is damaged, as a job that restores does, or only read.

    Raises:
        AssertionError: Something did not hold; says what and where.
    """
    rng = random.Random(seed)
    num_checked = 0
    with repeatable():
        base = scenario().prepare(kind())
        found = list(moments(base, record(scenario(), base)))
        num_calls = 100 if kind is Tree else 25
        chosen = list(itertools.product(range(len(found)), range(num_calls)))
        for index, at_call in chosen if sample is None else rng.sample(chosen, min(sample, len(chosen))):
            contents, acked, later = found[index]
            results, happened = read(contents.copy(), later, at_call, heal=heal)
            where = f"{kind.__name__}: reader from moment {index} on, the owner goes on at its call {at_call}"
            for result in results:
                if isinstance(result, BaseException):
                    raise AssertionError(f"{where}: {type(result).__name__}: {result}") from result
                check_restored(result, acked, scenario().possible)
            assert len(set(results)) == 1, f"{where}: ranks read different checkpoints: {results}"
            num_checked += happened
    return num_checked

"""Scenarios, the states that a crash in them may leave, and what has to hold in each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from bucket import Objects
from disk import Tree, after_kill, after_power_loss
from recording import Ack, Cut, Log, Op, cuts
from runs import Contents, Job, repeatable, strays, succeed
from s3_model import S3Objects

from distckpt import catalog, names, verification
from distckpt.manifest import Layout

NOTHING = Ack(0, 0)
SAMPLE_LIMIT = 4_000  # states of a power loss, over all cuts of a run
FULL_LIMIT = 40_000
NESTED_LIMIT = 1_000
FEWEST = 4  # for each cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A job that crashes.

    Attributes:
        name: Its name.
        job: The job.
        before: Jobs that ran before it, whose work is durable.
        damaged: Whether what they left is damaged: of the newest checkpoint bytes are wrong, of the one before a file
            is missing, and a save died after them.
        acked: The newest good checkpoint that they left.
    """

    name: str
    job: Job
    before: tuple[Job, ...] = ()
    damaged: bool = False
    acked: Ack = NOTHING

    def prepare(self, empty: Contents) -> Contents:
        """Return what lies there when the job begins."""
        for job in self.before:
            succeed(replace(job, restores=False), empty)
        if self.damaged:
            _damage(empty)
        return empty

    @property
    def possible(self) -> set[Ack]:
        """What may be restored after it, besides a fresh start."""
        jobs = (*self.before, self.job)
        return {Ack(step, job.generation) for job in jobs for step in job.steps}


def _damage(contents: Contents) -> None:
    files = {path: data for path, data in contents.listing() if data is not None}
    [flipped, *_] = [path for path in files if "0030/" in path and path.endswith(".safetensors")]
    [missing, *_] = [path for path in files if "0020/" in path and path.endswith(".safetensors")]
    contents.replace(flipped, files[flipped][:-5] + b"\x55" + files[flipped][-4:])
    contents.replace(missing, None)
    [manifest] = [path for path in files if "0040/" in path and path.endswith("manifest.json")]
    contents.replace(manifest, None)


def scenarios(layout: Layout = "sharded", *, first: int = 0) -> list[Scenario]:
    """Return all scenarios in a layout; `first` is the rank that is ahead."""
    job = Job(layout=layout, first=first)
    saved = replace(job, steps=(10, 20), keep=9)
    return [
        Scenario(name="first-save", job=replace(job, steps=(10,))),
        Scenario(
            name="later-save",
            job=replace(job, steps=(20, 30), keep=9),
            before=(replace(job, steps=(10,)),),
            acked=Ack(10, 0),
        ),
        Scenario(name="retention", job=replace(job, steps=(30, 40)), before=(saved,), acked=Ack(20, 0)),
        Scenario(
            name="background",
            job=replace(job, steps=(30, 40), background=True),
            before=(saved,),
            acked=Ack(20, 0),
        ),
        Scenario(
            name="clean-up",
            job=replace(job, steps=(20, 40), generation=1),
            before=(replace(job, steps=(10, 20, 30, 40), keep=9),),
            damaged=True,
            acked=Ack(10, 0),
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survivor:
    """A state that a crash left.

    Attributes:
        number: Its number among those of its scenario and model.
        contents: What lies there.
        acked: The last save that was acknowledged.
        ops: What had happened.
        fate: What became of what was not durable.
        late: A request that was under way and happens later, after the recovery.
    """

    number: int
    contents: Contents = field(repr=False)
    acked: Ack
    ops: tuple[Op, ...] = field(repr=False)
    fate: str = ""
    late: Op | None = None


@dataclass(slots=True)
class Counts:
    """How many states were replayed, how many of them differ, and how many were checked."""

    replayed: int = 0
    distinct: int = 0
    checked: int = 0


def record(scenario: Scenario, base: Contents) -> list[Op]:
    """Return what a scenario's job does on a copy of `base`."""
    log = Log()
    succeed(scenario.job, base.copy(), log)
    return log.ops


def named_ops(ops: list[Op], kind: str, last: str) -> list[Op]:
    """Return the operations of a kind on what has this last part of a name."""
    return [op for op in ops if op.kind == kind and op.name.rpartition("/")[2] == last]


Model = Callable[[Contents, Cut, random.Random, int], Iterator[tuple[Contents, str, Op | None]]]


def kill(base: Contents, cut: Cut, rng: random.Random, limit: int) -> Iterator[tuple[Contents, str, Op | None]]:
    """Yield what all processes leave when they die: everything that was done, and perhaps half of a write."""
    yield after_kill(base, cut.done), "killed", None
    for op in cut.pending:
        if op.kind == "write":
            half = replace(op, data=op.data[: len(op.data) // 2])
            yield after_kill(base, (*cut.done, half)), f"killed in: {op}", None


def power(base: Contents, cut: Cut, rng: random.Random, limit: int) -> Iterator[tuple[Contents, str, Op | None]]:
    """Yield what a power loss leaves on a disk: `limit` states at most."""
    assert isinstance(base, Tree)
    for contents, fate in after_power_loss(base, cut, limit=limit, rng=rng):
        yield contents, fate, None


def late(base: Contents, cut: Cut, rng: random.Random, limit: int) -> Iterator[tuple[Contents, str, Op | None]]:
    """Yield what all processes leave in a bucket when they die with requests under way that still happen.

    Where no deletion knows a condition, but for that of a manifest, for which nothing helps: see `test_limits.py`.
    """
    for op in cut.pending:
        is_fatal = op.kind == "delete" and op.name.endswith(names.MANIFEST) and not isinstance(base, S3Objects)
        if op.kind != "ack" and not is_fatal:
            yield after_kill(base, cut.done), f"late: {op}", op


MODELS: dict[str, tuple[Model, type[Contents]]] = {
    "disk-kill": (kill, Tree),
    "disk-power": (power, Tree),
    "bucket-kill": (kill, Objects),
    "bucket-late": (late, Objects),
    "s3-kill": (kill, S3Objects),
    "s3-late": (late, S3Objects),
}


def survivors(scenario: Scenario, model: str, *, seed: int, limit: int, counts: Counts) -> Iterator[Survivor]:
    """Yield every state, each that looks like another one only once: with the most that was acknowledged."""
    replays, empty = MODELS[model]
    base = scenario.prepare(empty())
    yield from crashed(
        base, record(scenario, base), replays, acked=scenario.acked, seed=seed, limit=limit, counts=counts
    )


def crashed(
    base: Contents, ops: list[Op], replays: Model, *, acked: Ack, seed: int, limit: int, counts: Counts
) -> Iterator[Survivor]:
    """Yield the distinct states of one recorded run."""
    rng = random.Random(seed)
    found: dict[tuple[int, object], Survivor] = {}
    all_cuts = list(cuts(ops))
    limit = max(FEWEST, limit // len(all_cuts))
    for cut in all_cuts:
        for contents, fate, op in replays(base, cut, rng, limit):
            counts.replayed += 1
            key = contents.key(), op and (op.rank, op.index)
            newest = max(acked, cut.acked or NOTHING)
            if key not in found or found[key].acked < newest:
                number = found[key].number if key in found else len(found)
                found[key] = Survivor(number=number, contents=contents, acked=newest, ops=cut.done, fate=fate, late=op)
    counts.distinct += len(found)
    yield from found.values()


def check(survivor: Survivor, scenario: Scenario, *, num_crashes: int = 1) -> None:
    """Recover from a state on 1, 2 and 3 ranks, go on, prune, and recover again."""
    job = replace(scenario.job, steps=())
    if not scenario.damaged:
        check_whole(survivor.contents)
    for world_size in (1, 2, 3):
        restored = succeed(replace(job, world_size=world_size), survivor.contents.copy())
        check_restored(restored, survivor.acked, scenario.possible)
    world_size = 1 + survivor.number % 3
    contents = survivor.contents.copy()
    following = Ack(restored.step + 10, 2)
    again = succeed(replace(job, world_size=world_size, steps=(following.step,), generation=2, keep=1), contents)
    assert again == restored, f"restored {again}, but {restored} before"
    limit = num_crashes + 3 * scenario.damaged  # two damaged ones whose steps are saved again, a save that died before
    check_tidy(contents, limit)
    if survivor.late is not None:
        contents.apply(survivor.late)
    last = succeed(
        replace(job, world_size=4 - world_size, steps=(following.step + 10,), generation=3, keep=1), contents
    )
    came_late = survivor.late is not None and last.step > following.step and last in scenario.possible
    assert last == following or came_late, f"after the recovery {following} was saved, but {last} restored"
    check_tidy(contents, limit)


def check_restored(restored: Ack, acked: Ack, possible: set[Ack]) -> None:
    """Complain unless a restored checkpoint is one that was saved, and none older than the last acknowledged one."""
    assert restored == NOTHING or restored in possible, f"{restored} was restored, which nobody saved"
    assert restored >= acked, f"{restored} was restored, {acked} had been acknowledged"


def check_whole(contents: Contents) -> None:
    """Complain unless every checkpoint that has a manifest is whole."""
    machine = contents.copy().machine()
    with machine.opened() as opener:
        storage = opener()
        for folder in catalog.scan(storage):
            if folder.committed:
                manifest = catalog.read_manifest(storage, folder.name)
                problems = list(verification.verify(storage, manifest, folder=folder.name))
                assert not problems, f"{folder.name} has a manifest, but is not whole: {problems}"


def check_tidy(contents: Contents, limit: int) -> None:
    """Complain if the newest checkpoint is not whole, or if more than `limit` dead saves have left something."""
    machine = contents.machine()
    with machine.opened() as opener:
        storage = opener()
        left = strays(storage)
        folders = [folder for folder in catalog.scan(storage) if folder.committed]
        newest = catalog.read_manifest(storage, folders[-1].name)
        problems = list(verification.verify(storage, newest, folder=folders[-1].name))
    assert not problems, f"{folders[-1].name}: {problems}"
    others = [name for found in left.values() for name in found]
    num_temporary = sum(name.endswith(".tmp") for name in others)
    assert max(num_temporary, len(others) - num_temporary) <= limit, f"left over after a save: {left}"


def check_nested(survivor: Survivor, scenario: Scenario, model: str, rng: random.Random, *, num_states: int) -> int:
    """Crash the recovery from a state, too, and check some of the states that this leaves; return how many."""
    world_size = rng.randint(1, 3)
    restored = succeed(replace(scenario.job, world_size=world_size, steps=()), survivor.contents.copy())
    recovery = replace(scenario.job, world_size=world_size, steps=(restored.step + 10,), generation=2, keep=1)
    again = Scenario(
        name=scenario.name,
        job=recovery,
        before=(*scenario.before, scenario.job),
        damaged=scenario.damaged,
        acked=max(survivor.acked, restored),
    )
    states = list(
        crashed(
            survivor.contents,
            record(again, survivor.contents),
            MODELS[model][0],
            acked=again.acked,
            seed=rng.randrange(1 << 30),
            limit=NESTED_LIMIT,
            counts=Counts(),
        )
    )
    chosen = rng.sample(states, min(num_states, len(states)))
    for state in chosen:
        check(state, again, num_crashes=2)
    return len(chosen)


def explained(survivor: Survivor, scenario: Scenario, model: str, seed: int, limit: int, error: Exception) -> str:
    """Return what to print about a state in which something did not hold."""
    shown = "\n  ".join(map(str, survivor.ops[-40:]))
    lies = "\n  ".join(f"{path} {'' if data is None else len(data)}" for path, data in survivor.contents.listing())
    return (
        f"{scenario.name}, {scenario.job.layout}, {model}: {error}\n"
        f"acknowledged: {survivor.acked}; {survivor.fate}\noperations:\n  {shown}\nwhat lies there:\n  {lies}\n"
        f"Replay: python tests/crash/replay.py {scenario.name} {model} --layout {scenario.job.layout} "
        f"--first {scenario.job.first} --seed {seed} --limit {limit} --state {survivor.number}"
    )


def run(
    scenario: Scenario, model: str, *, seed: int, sample: int | None = None, nested: int = 0, limit: int = SAMPLE_LIMIT
) -> Counts:
    """Check the states of a scenario in a model, in an order that the seed gives.

    Args:
        scenario: The scenario.
        model: The model's name.
        seed: Decides what is sampled, and what garbled bytes are.
        sample: How many states to check; None for all.
        nested: Of how many of them to crash the recovery, too.
        limit: How many states of a power loss to look at, about; of a cut that has more than its part, a sample.

    Raises:
        AssertionError: Something did not hold; says what, where, and how to replay it.
    """
    counts, rng = Counts(), random.Random(seed)
    with repeatable():
        states = list(survivors(scenario, model, seed=seed, limit=limit, counts=counts))
        chosen = rng.sample(states, len(states) if sample is None else min(sample, len(states)))
        for number, survivor in enumerate(chosen):
            try:
                check(survivor, scenario)
                counts.checked += 1
                if number < nested:
                    counts.checked += check_nested(survivor, scenario, model, rng, num_states=4)
            except Exception as error:
                raise AssertionError(explained(survivor, scenario, model, seed, limit, error)) from error
    return counts

"""Every order in which a few contenders' storage operations can happen, with crashes, lost answers and time between.

Each contender is real code on a thread of its own, over files in memory; it stands still before each operation until
the explorer lets it go on, die, or have an answer lost. What two orders have led to the same files, the same time and
the same things seen by every contender is looked at once.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from distckpt.errors import DirectoryBusyError, StorageError
from distckpt.lease import Lease
from distckpt.owner import Fate, Machine, Owner
from distckpt.storage import Buffer, Capabilities, FileInfo

DURATION_S = 2.0  # of a lease; time goes by in steps of one second

How = Literal["go", "die", "answer lost", "fail"]
Choice = tuple[int, How] | Literal["tick"]


class _Death(BaseException):
    """Ends a contender's thread as SIGKILL does: nothing is cleaned up."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What contends, and what may go wrong.

    Attributes:
        programs: What each contender does; it gets itself.
        most_deaths: How many may die.
        most_faults: How many operations may fail, or have their answer lost.
        most_ticks: How many seconds may go by while somebody could go on.
        same_host: Whether each sees at once whether another lives.
        prepare: Puts files there before.
        lease: What they contend with.
    """

    programs: tuple[Callable[[Contender], None], ...]
    most_deaths: int = 0
    most_faults: int = 0
    most_ticks: int = 0
    same_host: bool = False
    prepare: Callable[[World], None] = field(default=lambda _world: None)
    lease: type[Lease] = Lease


class World:
    """The files, the time, and the contenders."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.files: dict[str, bytes] = {}
        self.time = 0
        self.num_ticks = self.num_deaths = self.num_faults = 0
        self.highest = 0
        scenario.prepare(self)
        self.contenders = [Contender(self, index, program) for index, program in enumerate(scenario.programs)]
        for contender in self.contenders:
            contender.start()

    def choices(self) -> list[Choice]:
        """Return what may happen next; nothing if all is over."""
        made: list[Choice] = []
        able = [c for c in self.contenders if c.pending is not None and self.time >= c.wakes]
        for contender in able:
            assert contender.pending is not None
            made.append((contender.index, "go"))
            verb = contender.pending[0]
            if self.num_deaths < self.scenario.most_deaths:
                made.append((contender.index, "die"))
            if self.num_faults < self.scenario.most_faults and verb in ("publish", "list", "delete"):
                made.append((contender.index, "fail"))
                if verb != "list":
                    made.append((contender.index, "answer lost"))
        waiting = [c for c in self.contenders if c.pending is not None and self.time < c.wakes]
        if (not able and waiting) or (able and self.num_ticks < self.scenario.most_ticks):
            made.append("tick")
        return made

    def do(self, choice: Choice) -> None:
        """Let one thing happen, and check what must hold always."""
        if choice == "tick":
            self.time += 1
            self.num_ticks += 1
        else:
            index, how = choice
            self.num_deaths += how == "die"
            self.num_faults += how in ("fail", "answer lost")
            self.contenders[index].let(how)
        holders = [c.index for c in self.contenders if not c.is_dead and c.lease.still_held()]
        assert len(holders) <= 1, f"two hold the lease at one time: {holders}"
        numbers = [int(name.split("/")[1][:12]) for name in self.files if name.startswith("lease/")]
        assert max(numbers, default=0) >= self.highest, "the highest number was deleted"
        self.highest = max(numbers, default=0)

    def owner(self) -> int | None:
        """Return whose the file with the highest number is."""
        names = [name for name in self.files if name.startswith("lease/")]
        return int(json.loads(self.files[max(names)])["pid"]) - 1 if names else None

    def key(self) -> Any:
        """Return what makes this state: two that have it in common go on in the same ways."""
        files = tuple(sorted((name, _meaning(data)) for name, data in self.files.items()))
        limits = (self.num_ticks, self.num_deaths, self.num_faults)
        return (
            files,
            self.time,
            limits,
            tuple((c.pending, c.wakes, c.checked_at, tuple(c.seen)) for c in self.contenders),
        )

    def close(self) -> None:
        """End all threads."""
        for contender in self.contenders:
            while contender.pending is not None:
                contender.let("die")
            contender.thread.join()


class Contender:
    """One job; also the storage, and the machine, that its lease sees."""

    def __init__(self, world: World, index: int, program: Callable[[Contender], None]) -> None:
        self.world, self.index = world, index
        self.me = Owner(host=f"host-{index}", pid=index + 1, started=id(world))
        machine = Machine(me=self.me, now=self._now, pause=self._pause, fate=self._fate)
        self.lease = world.scenario.lease(self, duration_s=DURATION_S, background=False, machine=machine)
        self.has_acquired = self.is_dead = False
        self.said: BaseException | None = None
        self.pending: tuple[str, str] | None = None
        self.wakes = 0.0
        self.seen: list[Any] = []
        self.checked_at = -1
        self._how: How = "go"
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._live, args=(program,), daemon=True)

    def start(self) -> None:
        self.thread.start()
        self._back.acquire()

    def let(self, how: How) -> None:
        """Let the pending operation happen in this way, and return when the next one is pending, or none."""
        self._how = how
        self._turn.release()
        self._back.acquire()

    def _live(self, program: Callable[[Contender], None]) -> None:
        try:
            program(self)
        except _Death:
            pass
        except BaseException as error:  # noqa: BLE001  the explorer looks at it
            self.said = error
        self.pending = None
        self._back.release()

    def _step(self, verb: str, name: str, effect: Callable[[], Any], *, wakes: float = 0.0) -> Any:
        if self.is_dead:
            raise _Death
        self.pending, self.wakes = (verb, name), wakes
        self._back.release()
        self._turn.acquire()
        if self._how == "die":
            self.is_dead = True
            raise _Death
        if self._how == "fail":
            self.seen.append((verb, "failed"))
            raise StorageError(path=name, action=verb, cause="made by a test", errno=errno.EIO)
        try:
            result = effect()
        except OSError as error:
            self.seen.append((verb, type(error).__name__))
            raise
        if self._how == "answer lost":
            self.seen.append((verb, "failed"))
            raise StorageError(path=name, action=verb, cause="the answer was lost", errno=errno.EIO)
        self.seen.append((verb, _meaning(result)))
        return result

    def _forget_polls(self) -> None:
        """Whoever watches, and sees what it saw before, is where it was before: at the first sight."""
        verbs = [verb for verb, _ in self.seen[-7:]]
        looks = self.seen[-7:-5], self.seen[-3:-1]
        if verbs == ["list", "read", "now", "pause", "list", "read", "now"] and looks[0] == looks[1]:
            del self.seen[-4:]

    def _now(self) -> float:
        if threading.current_thread() is self.thread:
            self.seen.append(("now", self.world.time))
            self._forget_polls()
        return float(self.world.time)

    def _pause(self, seconds: float) -> None:
        self._step("pause", "", lambda: None, wakes=self.world.time + seconds)

    def _fate(self, owner: Owner) -> Fate:
        if not self.world.scenario.same_host:
            return "unknown"
        others = {c.me: c for c in self.world.contenders}
        return "gone" if owner not in others or others[owner].is_dead else "runs"

    # The verbs of a storage.

    @property
    def url(self) -> str:
        return "memory"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(exclusive_publish=True, survives_power_loss=True, shared=True)

    def publish(self, name: str, data: bytes) -> None:
        def effect() -> None:
            if self.world.files.get(name, data) != data:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
            self.world.files[name] = data

        self._step("publish", name, effect)

    def publish_manifest(self, step: int) -> None:
        """Publish as a save does after its check; in time, it must be the owner who does."""

        def effect() -> None:
            in_time = self.world.time - self.checked_at < DURATION_S / 2
            assert not in_time or self.world.owner() == self.index, "published right after a check, but not the owner"
            name = f"step-{step:012d}/manifest.json"
            if name in self.world.files:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
            self.world.files[name] = str(self.index).encode()

        self._step("publish", f"manifest {step}", effect)

    def list(self, folder: str = "") -> list[FileInfo]:
        def effect() -> list[FileInfo]:
            names = sorted(name for name in self.world.files if name.startswith(f"{folder}/"))
            return [FileInfo(name=name, num_bytes=len(self.world.files[name]), modified=0.0) for name in names]

        found: list[FileInfo] = self._step("list", folder, effect)
        return found

    def read_all(self, name: str, *, limit_bytes: int) -> bytes:
        def effect() -> bytes:
            if name not in self.world.files:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            return self.world.files[name]

        data: bytes = self._step("read", name, effect)
        assert len(data) <= limit_bytes
        return data

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._step("delete", name, lambda name=name: self.world.files.pop(name, None) and None)

    def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
        raise NotImplementedError

    def sync(self, names: Iterable[str]) -> None:
        raise NotImplementedError

    def read(self, name: str, offset: int, into: memoryview) -> None:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Explored:
    """What an exploration saw: how many states, the ways in which it can end, and each contender's end in them."""

    num_states: int
    ends: set[tuple[str, ...]]


def explore(scenario: Scenario, *, at_end: Callable[[World], None], most_states: int = 200_000) -> Explored:
    """Go through all states that a scenario can come to; fail where something does not hold, with the way there."""
    seen: set[Any] = set()
    ends: set[tuple[str, ...]] = set()
    open_paths: list[list[Choice]] = [[]]
    while open_paths:
        path = open_paths.pop()
        world = World(scenario)
        try:
            for choice in path:
                world.do(choice)
            while (key := world.key()) not in seen:
                seen.add(key)
                assert len(seen) <= most_states, "more states than expected"
                choices = world.choices()
                if not choices:
                    at_end(world)
                    ends.add(tuple(_end(contender) for contender in world.contenders))
                    break
                open_paths.extend([*path, choice] for choice in choices[1:])
                path = [*path, choices[0]]
                world.do(choices[0])
        except AssertionError as error:
            raise AssertionError(f"{error}, after {path}") from error
        finally:
            world.close()
    return Explored(num_states=len(seen), ends=ends)


def runs_alone(program: Callable[[Contender], None], files: dict[str, bytes], *, same_host: bool) -> World:
    """Let one contender run undisturbed over some files, all of whose writers are dead, and return the end."""
    scenario = Scenario(programs=(program,), same_host=same_host, prepare=lambda world: world.files.update(files))
    world = World(scenario)
    while choices := world.choices():
        world.do(choices[0])
    world.close()
    return world


def _end(contender: Contender) -> str:
    if contender.is_dead:
        return "dead"
    match contender.said:
        case None:
            return "done"
        case DirectoryBusyError(taken_over=True):
            return "taken over"
        case DirectoryBusyError():
            return "busy"
        case FileExistsError():
            return "step taken"
        case StorageError():
            return "storage"
    raise AssertionError(f"contender {contender.index}: {contender.said!r}") from contender.said


def _meaning(value: Any) -> Any:
    """Return what of a file, or of an answer, makes a difference; clocks and random names do not."""
    if isinstance(value, bytes):
        body = json.loads(value)
        return value if not isinstance(body, dict) else (body["pid"], body["released"])
    if isinstance(value, list):
        return tuple(info.name for info in value)
    return value

"""Ranks: what all ranks of a job do together, with a deadline, and with every failure known to all.

Ranks meet in the job's store (`torch.distributed`'s TCPStore), each `Ranks` on a connection of its own, never in the
training's process groups: so a background thread may wait here while training goes on, and a rank that does not come
is known by its number.
What they exchange is JSON.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch.distributed as dist

from distckpt import freshstore
from distckpt.errors import DistckptError, RankFailedError, RankTimeoutError, StorageError, UsageError
from distckpt.failure import from_wire, to_wire
from distckpt.waiter import NoAnswerError, Waiter

Fact = TypeVar("Fact")
Verdict = TypeVar("Verdict")

_GRACE_S = 1.0  # how much longer than rank 0 the others wait: it is rank 0 that knows who is missing

_ROUNDING_S = 0.05  # by how much a wait in the store may end too early: it counts in milliseconds
_PARTING_S = 10.0  # how long rank 0 waits at the end for ranks that still read what it has told

# Ranks construct their channels in the same order, so that a count names the same channel everywhere.
_channels = itertools.count()
# Where in the job's store the ranks of a process group meet.
_places: weakref.WeakKeyDictionary[dist.ProcessGroup, str] = weakref.WeakKeyDictionary()


class _Store(Protocol):
    """The part of torch's Store that is used here."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def has_extended_api(self) -> bool: ...
    def check(self, keys: list[str]) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...
    def set_timeout(self, timeout: timedelta) -> None: ...
    def delete_key(self, key: str) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


class _Post(NamedTuple):
    """What a rank says in a round: what it is doing, and what came of it, or what was raised."""

    action: str
    fact: Any = None
    error: dict[str, Any] | None = None

    def packed(self) -> str:
        """Return it as JSON, without a key: there is one of each rank on the wire."""
        return _packed(self[:2] if self.error is None else self)


class Ranks:
    """One channel between all ranks of the job.

    Made by all ranks, in the same order. Used by one thread at a time; a second thread takes a channel of its own.

    Attributes:
        rank: This rank.
        world_size: The number of ranks; 1 without torch.distributed.
        host: This rank's host name.
        timeout_s: How long any wait lasts at most.

    Raises:
        RankTimeoutError: The first channel of a job's start where torchrun keeps the store: ranks did not come.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.host = socket.gethostname()
        self.rank = 0
        self.world_size = 1
        self._round = 0
        self._store: _Store | None = None
        self._root: dist.distributed_c10d.Store | None = None
        self._meeting: _Store | None = None  # where ranks meet under short keys, once rank 0 has named that place
        self._verdict_before: tuple[_Store, str] | None = None
        self._waiter = Waiter()
        if dist.is_available() and dist.is_initialized():
            self.rank = dist.get_rank()
            self.world_size = dist.get_world_size()
            channel = next(_channels)
            if self.world_size > 1:
                # A clone has its own connection: a wait on one does not hold up the other.
                store = dist.distributed_c10d._get_default_store().clone()
                self._store = _under(f"{_place(store, timeout_s)}/{channel}", store)
                self._root = freshstore.root(store)

    def agree(
        self,
        action: str,
        work: Callable[[], Fact],
        decide: Callable[[list[Fact]], Verdict],
        *,
        explain: Callable[[], None] = lambda: None,
    ) -> Verdict:
        """Do `work` on every rank, and return on every rank what rank 0 decides from all its results.

        Args:
            action: What the ranks are doing, for errors: "save of step 2000".
            work: Runs on this rank; returns JSON values.
            decide: Runs on rank 0, once every rank's work has succeeded, with the results by rank; returns JSON values.
            explain: Runs on rank 0 if the work of a rank, or `decide`, has raised; raises what that comes of, if it
                knows.

        Returns:
            The verdict, as it is after a way through JSON.

        Raises:
            RankFailedError: A rank's work raised; names the lowest such rank and its error. If the work of all ranks
                raised one kind of DistckptError, each rank raises its own. Without other ranks, the error itself.
            RankTimeoutError: Ranks did not arrive within `timeout_s`; names them.
            UsageError: Ranks are at different actions.
            DistckptError: What `decide` raised, or `explain`, on all ranks. A StorageError, whoever met it, names its
                rank and host.

        Ranks: all (collective); blocks until every rank's work is done.
        """
        if self._store is None:
            try:
                return decide([work()])
            except Exception:
                explain()
                raise
        self._round += 1
        error: BaseException | None = None
        try:
            post = _Post(action, work())
        except BaseException as raised:  # noqa: BLE001  an interrupt, too, must not leave the others waiting
            error = raised
            post = _Post(action, error={**_describe(raised), "host": self.host})
        try:
            verdict = self._exchange(self._meeting or self._store, action, post, decide, explain)
        except DistckptError as shared:
            raise shared from error
        if isinstance(error, StorageError) and verdict.get("own"):
            raise error.of_rank(self.rank, self.host) from error
        if error is not None and (verdict.get("own") or not isinstance(error, Exception)):
            raise error
        if "error" in verdict:
            raise from_wire(verdict["error"]) from error
        result: Verdict = verdict["verdict"]
        return result

    def barrier(self, action: str) -> None:
        """Return once every rank has come here.

        Raises:
            RankTimeoutError: Ranks did not arrive within `timeout_s`; names them.

        Ranks: all (collective); blocks until every rank has come.
        """
        self.agree(action, lambda: None, lambda _: None)

    def part(self) -> None:
        """Say that this rank reads and says nothing more; nothing is raised.

        The store may live in rank 0's process, which so goes last.

        Ranks: all, once; rank 0 blocks until the others have come, for ten seconds at most.
        """
        if self._store is None or not dist.is_initialized() or freshstore.is_needed():
            return
        with contextlib.suppress(dist.DistError, OSError, NoAnswerError):
            if self.rank != 0:
                self._store.set(f"parted/{self.rank}", "")
                return
            keys = [f"parted/{rank}" for rank in range(1, self.world_size)]
            left_s = min(_PARTING_S, self.timeout_s)
            self._waiter.do(partial(self._store.wait, keys, timedelta(seconds=left_s)), limit_s=left_s + _GRACE_S)

    def announce(self, key: str, value: int) -> None:
        """Tell all ranks a number under `key`, unless one has been told already; returns at once.

        Raises:
            RankFailedError: The store is gone, or gives no answer; so does RankTimeoutError say.

        Ranks: any.
        """
        store = self._store
        if store is not None:
            self._ask("announcing", lambda: store.compare_set(key, "", str(value)))

    def announced(self, key: str) -> int | None:
        """Return the number that a rank announced under `key`, or None; one short question to the store.

        Raises:
            RankFailedError: The store is gone, or gives no answer; so does RankTimeoutError say.

        Ranks: any.
        """
        store = self._store
        if store is None:
            return None
        return self._ask("looking for news", lambda: int(store.get(key)) if store.check([key]) else None)

    def _exchange(
        self,
        store: _Store,
        action: str,
        post: _Post,
        decide: Callable[[list[Any]], Any],
        explain: Callable[[], None],
    ) -> dict[str, Any]:
        """Post this rank's result, and return rank 0's verdict on all of them."""
        number = self._round
        if self.rank != 0:
            verdict = self._told(store, action, number, post)
            self._move(verdict)
            return verdict
        verdict = self._judge(store, action, post, decide, explain)

        def tell() -> None:
            if self._root is not None and self._meeting is None and "error" not in verdict:
                verdict["place"] = freshstore.short_place(self._root)
            store.set(f"{number}/v", _packed(verdict))
            if self._verdict_before is not None:
                before, key = self._verdict_before
                before.delete_key(key)  # every rank has read it: it has posted since
            self._verdict_before = store, f"{number}/v"
            self._move(verdict)

        self._ask(action, tell)
        return verdict

    def _move(self, verdict: dict[str, Any]) -> None:
        """Go where rank 0 has said to meet from now on; every message has its key's whole length to carry."""
        if "place" in verdict and self._root is not None:
            self._meeting = _under(verdict["place"], self._root)

    def _told(self, store: _Store, action: str, number: int, post: _Post) -> dict[str, Any]:
        """Other ranks than 0: post this rank's result, and return the verdict."""

        def work() -> bytes:
            own = f"{number}/{self.rank}"
            store.set(own, post.packed())
            verdict = self._awaited(store, action, f"{number}/v", deadline)
            store.delete_key(own)  # only now: until there is a verdict, it tells the others who has come
            return verdict

        deadline = time.monotonic() + self.timeout_s + _GRACE_S
        return dict(json.loads(self._ask(action, work)))

    def _ask(self, action: str, work: Callable[[], Fact]) -> Fact:
        """Do `work` in the store, and return what it returns; it takes no longer than the timeout, and a little."""
        found: list[Fact] = []
        try:
            self._waiter.do(lambda: found.append(work()), limit_s=self.timeout_s + 2 * _GRACE_S)
        except NoAnswerError:
            if self.rank != 0:
                raise RankTimeoutError(action=action, missing=[0], timeout_s=self.timeout_s) from None
            raise _store_failed(action, f"it gave no answer within {self.timeout_s:g} s") from None
        except DistckptError:  # a timeout, which is an OSError as well
            raise
        except (dist.DistError, OSError) as error:
            raise _store_failed(action, f"{type(error).__name__}: {error}") from error
        return found[0]

    def _judge(
        self,
        store: _Store,
        action: str,
        own: _Post,
        decide: Callable[[list[Any]], Any],
        explain: Callable[[], None],
    ) -> dict[str, Any]:
        """Rank 0: collect what every rank posted, and turn it into a verdict."""
        keys = self._posts()
        deadline = time.monotonic() + self.timeout_s

        def collect() -> list[Any]:
            return [_Post(*json.loads(post)) for post in self._come(store, action, keys, deadline)]

        try:
            posts = [own, *self._ask(action, collect)]
        except RankTimeoutError as error:
            return {"error": to_wire(error)}
        return _explained(self._decided(action, posts, decide), explain)

    def _decided(self, action: str, posts: list[_Post], decide: Callable[[list[Any]], Any]) -> dict[str, Any]:
        """Rank 0: turn what every rank posted into a verdict."""
        for rank, post in enumerate(posts):
            if post.action != action:
                parted = UsageError(
                    problem=f"the ranks have parted: rank 0 is at {action!r}, rank {rank} at {post.action!r}",
                    fix="call the same methods, for the same steps, on every rank",
                )
                return {"error": to_wire(parted)}
        failed = [(rank, post.error) for rank, post in enumerate(posts) if post.error is not None]
        if failed:
            rank, error = failed[0]
            kinds = {each["type"] for _, each in failed}
            if len(failed) == len(posts) and len(kinds) == 1 and error["wire"]:
                return {"own": True, "error": error["wire"]}
            failure = RankFailedError(
                action=action,
                rank=rank,
                host=error["host"],
                cause=error["cause"],
                others=len(failed) - 1,
                fix=error["fix"],
            )
            return {"error": to_wire(failure)}
        try:
            return {"verdict": decide([post.fact for post in posts])}
        except StorageError as error:
            return {"error": to_wire(error.of_rank(self.rank, self.host))}
        except DistckptError as error:
            return {"error": to_wire(error)}
        except Exception as error:  # noqa: BLE001  whatever it is, the others must not wait for it
            shown = _describe(error)
            return {"error": to_wire(RankFailedError(action=action, rank=0, host=self.host, cause=shown["cause"]))}

    def _posts(self) -> dict[int, str]:
        """Return under which key each rank but 0 posts in this round."""
        return {rank: f"{self._round}/{rank}" for rank in range(1, self.world_size)}

    def _come(self, store: _Store, action: str, keys: dict[int, str], deadline: float) -> list[bytes]:
        """Return what is set under all keys, once it is there; keys are by the rank that sets them."""
        try:
            return _read(store, list(keys.values()), deadline)
        except dist.DistStoreError:
            if time.monotonic() < deadline - _ROUNDING_S:
                raise
            missing = [rank for rank, key in keys.items() if not store.check([key])]
            if missing:
                raise RankTimeoutError(action=action, missing=missing, timeout_s=self.timeout_s) from None
            return _read(store, list(keys.values()), deadline + _GRACE_S)

    def _awaited(self, store: _Store, action: str, key: str, deadline: float) -> bytes:
        """Return what rank 0 sets under a key, once it is there."""
        store.set_timeout(_left(deadline))
        try:
            return store.get(key)
        except dist.DistStoreError:
            if time.monotonic() < deadline - _ROUNDING_S:
                raise
            raise RankTimeoutError(action=action, missing=self._absent(store), timeout_s=self.timeout_s) from None

    def _absent(self, store: _Store) -> list[int]:
        """Return who keeps rank 0 from its verdict: the ranks that have not come; rank 0, if all others have."""
        if store.check([f"{self._round}/v"]):
            return [0]  # there was a verdict after all, too late; who has read it may have taken its post back
        return [rank for rank, key in self._posts().items() if not store.check([key])] or [0]


def _place(store: dist.distributed_c10d.Store, timeout_s: float) -> str:
    """Return where in the store the ranks of this process group meet, which no earlier start of the job has used."""
    if not freshstore.is_needed():
        return "dc"
    group = dist.distributed_c10d._get_default_group()
    if group not in _places:
        bare = dist.distributed_c10d.PrefixStore("dc", store)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        _places[group] = f"dc/{freshstore.fresh_place(bare, rank=rank, world_size=world_size, timeout_s=timeout_s)}"
    return _places[group]


def _under(prefix: str, store: dist.distributed_c10d.Store) -> _Store:
    return cast(_Store, dist.distributed_c10d.PrefixStore(prefix, store))


def _read(store: _Store, keys: list[str], deadline: float) -> list[bytes]:
    """Return what is set under all keys, once it is there."""
    store.set_timeout(_left(deadline))
    if store.has_extended_api():
        return store.multi_get(keys)  # waits, too
    store.wait(keys, _left(deadline))
    return [store.get(key) for key in keys]


def _explained(verdict: dict[str, Any], explain: Callable[[], None]) -> dict[str, Any]:
    """Rank 0: return the verdict, or if that is an error, the one that it comes of."""
    if "error" in verdict:
        try:
            explain()
        except DistckptError as error:
            return {"error": to_wire(error)}
    return verdict


def _packed(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _left(deadline: float) -> timedelta:
    """Return the time until a deadline; the store counts whole milliseconds, and must not give up before."""
    return timedelta(seconds=max(deadline - time.monotonic(), 0.0) + 0.001)


def _store_failed(action: str, cause: str) -> RankFailedError:
    return RankFailedError(action=action, rank=0, host="of the store", cause=cause)


def _describe(error: BaseException) -> dict[str, Any]:
    text = str(error).split("\nFix:")[0]
    return {
        "type": type(error).__name__,
        "cause": f"{type(error).__name__}: {text}",
        "wire": to_wire(error) if isinstance(error, DistckptError) else None,
        "fix": error.fix if isinstance(error, DistckptError) else None,
    }

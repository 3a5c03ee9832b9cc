"""Ranks: what all ranks of a job do together, with a deadline, and with every failure known to all.

Ranks meet in the job's store (`torch.distributed`'s TCPStore), each `Ranks` on a connection of its own, never in the
training's process groups: so a background thread may wait here while training goes on, and a rank that does not come
is known by its number.
What they exchange is JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from distckpt.errors import DistckptError, RankFailedError, RankTimeoutError, StorageError, UsageError
from distckpt.failure import from_wire, to_wire

Fact = TypeVar("Fact")
Verdict = TypeVar("Verdict")

_GRACE_S = 1.0  # how much longer than rank 0 the others wait: it is rank 0 that knows who is missing

# Ranks construct their channels in the same order, so that a count names the same channel everywhere.
_channels = itertools.count()


class _Store(Protocol):
    """The part of torch's Store that is used here."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...
    def set_timeout(self, timeout: timedelta) -> None: ...
    def delete_key(self, key: str) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


class Ranks:
    """One channel between all ranks of the job.

    Used by one thread at a time; a second thread takes a channel of its own.

    Attributes:
        rank: This rank.
        world_size: The number of ranks; 1 without torch.distributed.
        host: This rank's host name.
        timeout_s: How long any wait lasts at most.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.host = socket.gethostname()
        self.rank = 0
        self.world_size = 1
        self._round = 0
        self._store: _Store | None = None
        self._patience = _Patience()
        if dist.is_available() and dist.is_initialized():
            self.rank = dist.get_rank()
            self.world_size = dist.get_world_size()
            channel = next(_channels)
            if self.world_size > 1:
                # A clone has its own connection: a wait on one does not hold up the other.
                store = dist.distributed_c10d._get_default_store().clone()
                # A launcher may keep the store when it starts the ranks again: what they said then must not count now.
                start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                self._store = dist.distributed_c10d.PrefixStore(f"dc{start}/{channel}", store)

    def agree(self, action: str, work: Callable[[], Fact], decide: Callable[[list[Fact]], Verdict]) -> Verdict:
        """Do `work` on every rank, and return on every rank what rank 0 decides from all its results.

        Args:
            action: What the ranks are doing, for errors: "save of step 2000".
            work: Runs on this rank; returns JSON values.
            decide: Runs on rank 0, once every rank's work has succeeded, with the results by rank; returns JSON values.

        Returns:
            The verdict, as it is after a way through JSON.

        Raises:
            RankFailedError: A rank's work raised; names the lowest such rank and its error. If the work of all ranks
                raised one kind of DistckptError, each rank raises its own. Without other ranks, the error itself.
            RankTimeoutError: Ranks did not arrive within `timeout_s`; names them.
            UsageError: Ranks are at different actions.
            DistckptError: What `decide` raised, on all ranks. A StorageError, whoever met it, names its rank and host.

        Ranks: all (collective); blocks until every rank's work is done.
        """
        if self._store is None:
            return decide([work()])
        self._round += 1
        error: BaseException | None = None
        post: dict[str, Any] = {"action": action}
        try:
            post["fact"] = work()
        except BaseException as raised:  # noqa: BLE001  an interrupt, too, must not leave the others waiting
            error = raised
            post["error"] = {**_describe(raised), "host": self.host}
        try:
            verdict = self._exchange(self._store, action, post, decide)
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

    def announce(self, key: str, value: int) -> None:
        """Tell all ranks a number under `key`, unless one has been told already; returns at once.

        Ranks: any.
        """
        if self._store is not None:
            self._store.compare_set(key, "", str(value))

    def announced(self, key: str) -> int | None:
        """Return the number that a rank announced under `key`, or None; one short question to the store.

        Source: 13 microseconds a call were measured on one node.

        Ranks: any.
        """
        if self._store is None or not self._store.check([key]):
            return None
        return int(self._store.get(key))

    def _exchange(
        self, store: _Store, action: str, post: dict[str, Any], decide: Callable[[list[Any]], Any]
    ) -> dict[str, Any]:
        """Post this rank's result, and return rank 0's verdict on all of them."""
        deadline = time.monotonic() + self.timeout_s
        number = self._round
        try:
            if self.rank != 0:
                store.set(f"{number}/{self.rank}", _packed(post))
                verdict = json.loads(self._awaited(store, action, f"{number}/v", deadline + _GRACE_S))
            else:
                verdict = self._judge(store, action, post, decide, deadline)
                store.set(f"{number}/v", _packed(verdict))
                # Only now: until there is a verdict, posts tell the others who has come.
                for key in self._posts().values():
                    store.delete_key(key)
                store.delete_key(f"{number - 1}/v")  # every rank has read it: it has posted since
        except DistckptError:  # a timeout, which is an OSError as well
            raise
        except (dist.DistError, OSError) as error:
            raise RankFailedError(
                action=action, rank=0, host="of the store", cause=f"{type(error).__name__}: {error}"
            ) from error
        return dict(verdict)

    def _judge(
        self, store: _Store, action: str, own: dict[str, Any], decide: Callable[[list[Any]], Any], deadline: float
    ) -> dict[str, Any]:
        """Rank 0: collect what every rank posted, and turn it into a verdict."""
        keys = self._posts()
        try:
            self._wait(store, action, keys, deadline)
        except RankTimeoutError as error:
            return {"error": to_wire(error)}
        posts = [own]
        posts += [json.loads(store.get(key)) for key in keys.values()]
        for rank, post in enumerate(posts):
            if post["action"] != action:
                parted = UsageError(
                    problem=f"the ranks have parted: rank 0 is at {action!r}, rank {rank} at {post['action']!r}",
                    fix="call the same methods, for the same steps, on every rank",
                )
                return {"error": to_wire(parted)}
        failed = [(rank, post) for rank, post in enumerate(posts) if "error" in post]
        if failed:
            kinds = {post["error"]["type"] for _, post in failed}
            if len(failed) == len(posts) and len(kinds) == 1 and failed[0][1]["error"]["wire"]:
                return {"own": True, "error": failed[0][1]["error"]["wire"]}
            rank, post = failed[0]
            cause = post["error"]["cause"]
            failure = RankFailedError(
                action=action,
                rank=rank,
                host=post["error"]["host"],
                cause=cause,
                others=len(failed) - 1,
                fix=post["error"]["fix"],
            )
            return {"error": to_wire(failure)}
        try:
            return {"verdict": decide([post["fact"] for post in posts])}
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

    def _wait(self, store: _Store, action: str, keys: dict[int, str], deadline: float) -> None:
        """Return once all keys are set; keys are by the rank that sets them."""
        left = _left(deadline)
        try:
            self._patience.do(lambda: store.wait(list(keys.values()), left))
        except dist.DistStoreError:
            if time.monotonic() < deadline:
                raise
            missing = [rank for rank, key in keys.items() if not store.check([key])]
            if missing:
                raise RankTimeoutError(action=action, missing=missing, timeout_s=self.timeout_s) from None

    def _awaited(self, store: _Store, action: str, key: str, deadline: float) -> bytes:
        """Return what rank 0 sets under a key, once it is there."""
        found: list[bytes] = []
        store.set_timeout(_left(deadline))
        try:
            self._patience.do(lambda: found.append(store.get(key)))
        except dist.DistStoreError:
            if time.monotonic() < deadline:
                raise
            raise RankTimeoutError(action=action, missing=self._absent(store), timeout_s=self.timeout_s) from None
        return found[0]

    def _absent(self, store: _Store) -> list[int]:
        """Return who keeps rank 0 from its verdict: the ranks that have not come; rank 0, if all others have."""
        posts = self._posts()
        if not store.check([posts[self.rank]]):
            return [0]  # there was a verdict after all, too late
        return [rank for rank, key in posts.items() if not store.check([key])] or [0]


def _packed(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _left(deadline: float) -> timedelta:
    """Return the time until a deadline; the store counts whole milliseconds, and must not give up before."""
    return timedelta(seconds=max(deadline - time.monotonic(), 0.0) + 0.001)


class _Patience:
    """Waits in the store; instead of the main thread another one does, for in there no signal would be heard."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_left = False

    def do(self, work: Callable[[], None]) -> None:
        """Do `work`, and return when it is done.

        A signal's handler may raise in between; `work` then goes on, and no other can be done.
        """
        if threading.current_thread() is not threading.main_thread():
            work()
            return
        if self._thread is None:
            # A daemon: a job that ends while it waits is not held up by it.
            self._thread = threading.Thread(
                target=_do_all, args=(self._work, self._done), name="distckpt-wait", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._work.put, None).atexit = False
        if self._is_left:
            raise InterruptedError("it was interrupted while it waited for the other ranks")
        self._is_left = True
        self._work.put(work)
        error = self._done.get()
        self._is_left = False
        if error is not None:
            raise error


def _do_all(tasks: queue.SimpleQueue[Callable[[], None] | None], done: queue.SimpleQueue[BaseException | None]) -> None:
    """Do one thing after another, until there is a None."""
    while (work := tasks.get()) is not None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised by `do`
            done.put(error)
        else:
            done.put(None)
        del work


def _describe(error: BaseException) -> dict[str, Any]:
    text = str(error).split("\nFix:")[0]
    return {
        "type": type(error).__name__,
        "cause": f"{type(error).__name__}: {text}",
        "wire": to_wire(error) if isinstance(error, DistckptError) else None,
        "fix": error.fix if isinstance(error, DistckptError) else None,
    }

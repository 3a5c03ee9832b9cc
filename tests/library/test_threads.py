"""Threads that are kept from one use to the next."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future

import pytest

from distckpt.threads import KeptThreads, call_off


def test_the_thread_is_the_same_until_it_is_ended():
    threads = KeptThreads(1, "kept")
    first = threads.pool.submit(threading.get_ident).result()
    assert threads.pool.submit(threading.get_ident).result() == first
    ended = threads.pool
    threads.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        ended.submit(int)
    assert threads.pool.submit(int).result() == 0
    threads.close()


def test_a_process_that_is_forked_off_has_threads_of_its_own():
    threads = KeptThreads(1, "kept")
    threads.pool.submit(int).result()
    child = os.fork()
    if not child:
        os._exit(threads.pool.submit(lambda: 7).result(timeout=10))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    threads.close()


def test_what_is_called_off_is_over_or_never_begins():
    threads, begun, done = KeptThreads(1, "kept"), threading.Event(), []

    def work() -> None:
        begun.set()
        time.sleep(0.05)
        done.append("first")

    under_way: list[Future[None]] = [threads.pool.submit(work)]
    under_way.append(threads.pool.submit(lambda: done.append("second")))
    begun.wait()
    call_off(under_way)
    assert done == ["first"]
    threads.close()
    assert done == ["first"]

"""What uploads and downloads are made of: parts, bodies, the memory budget, the window of requests, retries, jobs."""

from __future__ import annotations

import asyncio
import errno
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.storage.bodies import PartBody, receive
from distckpt.storage.budget import FEWEST, Budget
from distckpt.storage.jobs import Job
from distckpt.storage.parts import LEAST_PART, Part, between, cut
from distckpt.storage.retries import BrokenAnswerError, Patience, gave_up, judged
from distckpt.storage.window import Window

# --- parts ---


def test_parts_are_views_on_the_callers_memory() -> None:
    memory = bytearray(2 * LEAST_PART + 100)
    parts = list(cut([memoryview(memory)[:1000], memoryview(memory)[1000:]], len(memory)))
    assert [part.num_bytes for part in parts] == [LEAST_PART, LEAST_PART, 100]
    memory[5] = memory[LEAST_PART + 5] = 7
    assert [part.views[0][5] for part in parts] == [7, 7, 0]


@given(st.lists(st.binary(max_size=200_000), max_size=8))
def test_small_chunks_are_put_together_and_nothing_is_lost(chunks: list[bytes]) -> None:
    parts = list(cut(chunks, None))
    whole = b"".join(chunks)
    assert b"".join(part.joined() for part in parts) == whole
    assert [part.num_bytes for part in parts] == [len(whole)]
    assert all(len(a) + len(b) >= 64 << 10 for a, b in itertools.pairwise(parts[0].views))


def test_chunks_are_taken_only_as_parts_are_asked_for() -> None:
    num_taken = itertools.count()
    parts = cut((bytes(LEAST_PART) for _ in num_taken), 100 * LEAST_PART)
    next(parts)
    assert next(num_taken) <= 2


@given(st.lists(st.binary(max_size=9), max_size=6), st.integers(0, 30), st.integers(0, 30))
def test_between_is_a_slice_of_the_whole(views: list[bytes], begin: int, end: int) -> None:
    found = between([memoryview(view) for view in views], begin, end)
    assert b"".join(found) == b"".join(views)[begin:end]


# --- bodies ---


class Writer:
    def __init__(self) -> None:
        self.written: list[memoryview] = []

    async def write(self, chunk: memoryview) -> None:
        self.written.append(chunk)


def test_a_body_is_written_from_memory_and_can_be_read_and_rewound_as_a_file() -> None:
    views = (memoryview(b"abc"), memoryview(bytes(600_000)), memoryview(b"xyz"))
    body = PartBody(Part(views=views, num_bytes=600_006))
    writer: Any = Writer()
    asyncio.run(body.write(writer))
    assert b"".join(writer.written) == body.read()
    assert writer.written[0].obj is views[0].obj
    assert (len(body), body.tell(), body.seek(1), body.read(3)) == (600_006, 600_006, 1, b"bc\0")


class Stream:
    def __init__(self, pieces: list[bytes]) -> None:
        self.raw_stream = self
        self.content = self
        self._pieces = iter(pieces)

    async def readchunk(self) -> tuple[bytes, bool]:
        return next(self._pieces, b""), False


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=6), st.lists(st.integers(1, 9), max_size=8))
def test_an_answer_fills_views_in_order_and_no_more(pieces: list[bytes], sizes: list[int]) -> None:
    data = b"".join(pieces)
    views = [memoryview(bytearray(size)) for size in sizes]
    counts: list[int] = []
    if len(data) > sum(sizes):
        with pytest.raises(ValueError, match="more than it was asked for"):
            asyncio.run(receive(Stream(pieces), views, counts.append))
        return
    assert asyncio.run(receive(Stream(pieces), views, counts.append)) == len(data) == sum(counts)
    assert b"".join(views)[: len(data)] == data


# --- budget ---


def test_a_budget_lets_a_few_in_whatever_their_size_and_others_when_there_is_room() -> None:
    budget = Budget(100)
    for _ in range(FEWEST):
        budget.take(1000)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(budget.take, 60)
        for _ in range(FEWEST - 1):
            assert not waiting.done()
            budget.give(1000)
        waiting.result(10)
    budget.give(1000)
    budget.give(60)


def test_a_budget_is_never_exceeded_by_many_threads() -> None:
    budget, held, most = Budget(FEWEST * 10), [], []
    lock = threading.Lock()

    def work(_: int) -> None:
        budget.take(10)
        with lock:
            held.append(10)
            most.append(sum(held))
        with lock:
            held.pop()
        budget.give(10)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(500)))
    assert max(most) <= FEWEST * 10


# --- window ---


def test_a_window_shrinks_once_for_refusals_that_come_together_and_grows_back() -> None:
    window = Window(8)
    for _ in range(5):
        window.throttled()
    assert window.limit == 4
    window.succeeded()
    window.throttled()
    assert window.limit == 2
    for _ in range(100):
        window.succeeded()
    assert window.limit == 8


def test_a_window_never_closes() -> None:
    window = Window(2)
    for _ in range(10):
        window.throttled()
        window.succeeded()
    assert window.limit >= 1


def test_no_more_requests_are_inside_than_the_window_allows_also_if_some_are_cancelled() -> None:
    async def many() -> int:
        window, inside, most = Window(3), 0, 0

        async def one(number: int) -> None:
            nonlocal inside, most
            async with window:
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                if number % 5 == 0:
                    window.throttled()
                inside -= 1
            window.succeeded()

        tasks = [asyncio.create_task(one(number)) for number in range(60)]
        await asyncio.sleep(0)
        for task in tasks[10:30]:
            task.cancel()
        await asyncio.wait(tasks, timeout=30)
        assert all(task.done() for task in tasks)
        return most

    assert asyncio.run(many()) == 3


# --- retries ---


def told(code: str, status: int) -> OSError:
    error = OSError(errno.EIO, "words of the server")
    answered: Any = Exception("answered")
    answered.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error.__cause__ = answered
    return error


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (told("SlowDown", 503), "busy"),
        (told("TooManyRequests", 429), "busy"),
        (told("InternalError", 500), "again"),
        (told("Unknown", 502), "again"),
        (told("InternalError", 200), "again"),
        (told("RequestTimeout", 400), "again"),
        (told("BadDigest", 400), "again"),
        (told("ExpiredToken", 400), "renew"),
        (told("AccessDenied", 403), "never"),
        (told("NoSuchBucket", 404), "never"),
        (told("PreconditionFailed", 412), "never"),
        (told("NotImplemented", 501), "never"),
        (TimeoutError(), "again"),
        (ConnectionResetError(), "again"),
        (BrokenAnswerError(), "again"),
        (EOFError(), "never"),
        (ValueError("no such setting"), "never"),
        (ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED]"), "never"),
    ],
    ids=repr,
)
def test_errors_are_judged_by_what_may_mend_them(error: Exception, verdict: str) -> None:
    assert judged(error) == verdict


def test_pauses_double_up_to_a_limit_and_differ() -> None:
    patience = Patience(pause_s=1, longest_pause_s=8)
    for num_failed, longest in [(1, 1), (2, 2), (3, 4), (4, 8), (9, 8)]:
        pauses = {patience.pause(num_failed) for _ in range(50)}
        assert longest / 2 <= min(pauses) <= max(pauses) <= longest
        assert len(pauses) > 1


def test_a_server_that_stays_busy_costs_few_requests_and_half_a_minute_at_most_by_default() -> None:
    patience = Patience()
    pauses = [patience.pause_s * 2.0**number for number in range(patience.tries - 1)]
    assert patience.tries <= 8
    assert sum(min(pause, patience.longest_pause_s) for pause in pauses) < 30


@pytest.mark.parametrize(
    ("settings", "tries"),
    [(None, 8), ({}, 8), ({"mode": "standard"}, 8), ({"total_max_attempts": 3}, 3), ({"max_attempts": 3}, 4)],
)
def test_tries_are_what_botocores_own_setting_says(settings: dict[str, Any] | None, tries: int) -> None:
    assert Patience.of_settings(settings).tries == tries


def test_giving_up_says_how_often_and_that_later_may_be_better() -> None:
    assert str(gave_up(told("SlowDown", 503), num_tries=4, elapsed_s=12.3)) == (
        "[Errno 5] words of the server (SlowDown); tried 4 times in 12 s, trying again later may help"
    )


# --- jobs ---


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()
    made.close()


def test_a_job_gives_its_result_or_its_error(loop: asyncio.AbstractEventLoop) -> None:
    async def work(number: int) -> int:
        return 10 // number

    good, bad = Job(work(2), loop), Job(work(0), loop)
    assert good.result() == 5
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert (good.has_succeeded, bad.has_succeeded, bad.has_ended) == (True, False, True)


def test_a_cancelled_job_has_ended_when_waiting_for_it_ends(loop: asyncio.AbstractEventLoop) -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    job = Job(work(), loop, on_end=lambda: ended.append("told"))
    job.cancel()
    job.wait(10)
    assert job.has_ended
    assert not job.has_succeeded
    assert ended[-1:] == ["told"]

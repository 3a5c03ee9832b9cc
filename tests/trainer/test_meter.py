"""The progress line: what it says, in how much room, on a terminal and elsewhere."""

from __future__ import annotations

import itertools
import os
import pty
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from distckpt.events import Trained
from distckpt.progress import Progress, span_text
from distckpt.trainer import meter
from distckpt.trainer.meter import Looks, Meter, Whereabouts, drawn, silence_s

SAVING = Progress(saved_step=322, saved_ago_s=3.2, saving_step=345, saving_bytes=1000, written_bytes=430)
FIGURES = Trained(step=345, epoch=16, loss=0.00812, lr=0.05, samples=20_000, samples_per_s=1234.5)


def half_way() -> Whereabouts:
    """Return a training that does two steps a second and has 345 to go."""
    where = Whereabouts(total=690)
    for step in range(330, 346):
        where.advance(step, FIGURES, now=step / 2)
    return where


def words(where: Whereabouts, saving: Progress, *, width: int) -> list[str]:
    return re.split("  +", re.sub("━+", "", drawn(where, saving, Looks(width=width)).plain))


def test_a_wide_line_says_all() -> None:
    where = half_way()
    left = where.left_s(now=345 / 2)
    assert left == pytest.approx(345 / 2)
    assert where.left_s(now=345 / 2 + 10) == pytest.approx(345 / 2 - 10)
    line = drawn(where, SAVING, Looks(width=160)).plain
    assert re.fullmatch(
        r"step 345/690  ━{40}  loss 0\.0081  lr 0\.05  1,23[45] samples/s  \d:\d\d:\d\d left  "
        r"saved 322, 3 s ago  saving 345: 43 %",
        line,
    )


@pytest.mark.parametrize("saving", [SAVING, Progress(), replace(SAVING, saving_step=None)], ids=str)
def test_no_line_is_wider_than_the_terminal_and_the_step_is_always_there(saving: Progress) -> None:
    where = half_way()
    for width in range(14, 200):
        text = drawn(where, saving, Looks(width=width))
        assert len(text.plain) < width
        assert text.plain.startswith("step 345/690")


def test_what_matters_least_is_left_out_first() -> None:
    where, kept = half_way(), []
    for width in range(200, 14, -1):
        found = [word for word in words(where, SAVING, width=width) if word]
        if not kept or found != kept[-1]:
            kept.append(found)
    pairs = itertools.pairwise(kept)
    gone = [next(word for word in before if word not in after).split()[-1] for before, after in pairs]
    assert gone == ["0.05", "samples/s", "ago", "%", "left", "0.0081"]


def test_the_bar_grows_with_the_steps_and_needs_neither_unicode_nor_colors() -> None:
    where = Whereabouts(total=100)
    where.step = 25
    assert drawn(where, Progress(), Looks(width=60, ascii_only=True)).plain.endswith("##########" + 30 * "-")
    assert drawn(where, Progress(), Looks(width=60, colored=False)).plain.endswith("━━━━━━━━━━" + 30 * " ")


def test_the_time_left_is_that_of_the_last_minutes_without_the_first_step() -> None:
    where = Whereabouts(total=10_000)
    assert where.left_s(now=0) is None
    where.advance(1, None, now=500)  # compiled
    assert where.left_s(now=500) is None
    for step in range(2, 1002):
        where.advance(step, None, now=500 + step)
    assert where.left_s(now=1501) == pytest.approx(10_000 - 1001, rel=0.01)
    for step in range(1002, 2002):  # faster
        where.advance(step, None, now=1501 + (step - 1001) / 2)
    assert where.left_s(now=2001) == pytest.approx((10_000 - 2001) / 2, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (59, "59 s"), (150, "2 min"), (7200, "2 h"), (200_000, "2 d")]
)
def test_a_span_of_time_is_told_in_its_largest_unit(seconds: float, text: str) -> None:
    assert span_text(seconds) == text


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress(), ""),
        (Progress(saved_step=5), "restored 5"),
        (Progress(saved_step=1500, saved_ago_s=61), "saved 1,500, 1 min ago"),
        (Progress(saving_step=7), "saving 7"),
        (SAVING, "saved 322, 3 s ago; saving 345: 43 %"),
    ],
    ids=str,
)
def test_progress_is_words(progress: Progress, text: str) -> None:
    assert str(progress) == text


def train(to: int, *, num_drawn: int = 0) -> None:
    """Show a training of some steps, of which the second is saved; in the last it is drawn `num_drawn` times."""
    progress = Progress()
    drawings = threading.Semaphore(0)

    def look() -> Progress:
        drawings.release()
        return progress

    bar = Meter(total=to, saving=look)
    with bar.shown(0):
        for step in range(1, to + 1):
            bar.advance(step, replace(FIGURES, step=step) if step % 2 else None)
            progress = Progress(saved_step=2, saved_ago_s=0.0) if step > 1 else progress
        for _ in range(num_drawn):
            assert drawings.acquire(timeout=60)
    bar.advance(to, FIGURES)  # shown no more


def test_without_a_terminal_it_is_a_plain_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(3)
    assert capsys.readouterr().err == ""  # too soon
    monkeypatch.setattr(meter, "_PLAIN_LINE_EVERY_S", 0.0)
    train(3)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 1/3  loss 0.0081  lr 0.05  1,234 samples/s"
    assert re.fullmatch(r"step 3/3  loss 0\.0081  lr 0\.05  1,234 samples/s  saved 2, 0 s ago", second)


@pytest.mark.parametrize(("elapsed_s", "silent_s"), [(0, 5), (500, 5), (3600, 36), (1e6, 60)])
def test_plain_lines_are_rarer_in_a_long_training(elapsed_s: float, silent_s: float) -> None:
    assert silence_s(elapsed_s) == silent_s


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Make stderr a terminal of 100 columns; yields what returns, at the end, all that was written to it."""
    master, slave = pty.openpty()
    seen = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:  # Linux's way to say that nobody holds the other end any more
                return
            if not data:
                return
            seen.extend(data)

    reader = threading.Thread(target=read)
    reader.start()

    def finish() -> str:
        if not file.closed:
            file.close()
        reader.join()
        return seen.decode()

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    with os.fdopen(slave, "w") as file, monkeypatch.context() as patched:
        patched.setattr("sys.stderr", file)
        yield finish
    finish()
    os.close(master)


def test_on_a_terminal_the_line_is_drawn_anew_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    with terminal(monkeypatch) as finish:
        train(5, num_drawn=3)
        seen = finish()
    assert "\r\x1b[2K" in seen  # back to the line's beginning, and the line erased
    assert "\x1b[?25l" not in seen  # the cursor is not hidden
    assert "\x1b[?1049h" not in seen  # nor the screen changed
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", seen.split("\x1b[2K")[-1]).strip()
    assert re.fullmatch(r"step 5/5  ━{10,40}  loss 0\.0081  lr 0\.05  1,234 samples/s  saved 2, 0 s ago", last)


def test_a_terminal_that_can_move_nothing_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_PLAIN_LINE_EVERY_S", 0.0)
    with terminal(monkeypatch) as finish:
        monkeypatch.setenv("TERM", "dumb")
        train(3)
        seen = finish()
    assert "\x1b" not in seen
    assert len(seen.splitlines()) == 2

"""What goes to the terminal: data to stdout, talk to stderr; and figures in words.

Invariant: rich is imported when something is drawn, not before.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distckpt import wording
from distckpt.progress import span_text
from distckpt.storage import Buffer, CountingStorage, Storage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

_UNBOUNDED = 10_000  # columns; what reads a pipe has no edge to wrap at
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(10), *range(11, 32), *range(127, 160))}  # all but newlines
_MOST_METRICS = 50  # on one line
size_text = wording.size_text
count_text = wording.count_text


def output() -> Console:
    """Return the console for data."""
    return _console(width=None if sys.stdout.isatty() else _UNBOUNDED)


def say(text: str) -> None:
    """Print talk: one line on stderr."""
    _talk().print(text, soft_wrap=True)


def complain(text: str) -> None:
    """Print an error on stderr."""
    from rich.text import Text

    _talk().print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def _talk() -> Console:
    return _console(stderr=True)


def _console(**options: Any) -> Console:
    """Return a console that shows control characters instead of sending them: names come from checkpoints."""
    from rich.console import Console
    from rich.segment import Segment

    class VisibleConsole(Console):
        def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **kwargs):
                yield segment if segment.control else Segment(segment.text.translate(_VISIBLE), segment.style)

    return VisibleConsole(highlight=False, markup=False, **options)


def visible(text: str) -> str:
    """Return text on one line, with control characters shown instead of sent."""
    return text.translate(_VISIBLE).replace("\n", "\\x0a")


def print_json(value: dict[str, Any]) -> None:
    """Print a command's answer as JSON."""
    print(json.dumps(finite(value), indent=2, allow_nan=False))


def finite(value: Any) -> Any:
    """Return `value` with what JSON lacks, NaN and the infinities, as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def make_table(columns: Sequence[str], *, right: Sequence[str] = ()) -> Table:
    """Return an empty table with these headings; those in `right` are of numbers."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


class _ReadsWatched(CountingStorage):
    """A storage that says how much is read from it."""

    def __init__(self, inner: Storage, advance: Callable[[int], object]) -> None:
        super().__init__(inner)
        self._advance = advance

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Read from the inner storage."""
        super().read(name, offset, into)
        self._advance(into.nbytes)


class _WritesWatched(CountingStorage):
    """A storage that says how much is written to it."""

    def __init__(self, inner: Storage, advance: Callable[[int], object]) -> None:
        super().__init__(inner)
        self._advance = advance

    def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
        """Write through to the inner storage."""

        def told() -> Iterator[Buffer]:
            for chunk in chunks:
                yield chunk
                self._advance(memoryview(chunk).nbytes)

        return super().put(name, told(), num_bytes=num_bytes)


class Meter:
    """Is told of bytes that are done, from any thread, and shows them if there is somebody to see it."""

    def __init__(self, progress: Progress | None = None, task: TaskID | None = None) -> None:
        self._progress = progress
        self._task = task

    def __call__(self, num_bytes: int) -> None:
        """Count bytes that are done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, num_bytes)

    def expect(self, total_bytes: int) -> None:
        """Say how many there will be."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=total_bytes)


@contextmanager
def moving(what: str, *, total_bytes: int | None = None) -> Iterator[Meter]:
    """Show on a terminal how many bytes are done, the rate and the time left, until the block ends."""
    if not sys.stderr.isatty():
        yield Meter()
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # What is printed meanwhile must not be drawn over; but in a pipe it is data, which is not for stderr.
    on_screen = sys.stdout.isatty()
    with Progress(*columns, console=_talk(), transient=True, redirect_stdout=on_screen) as progress:
        yield Meter(progress, progress.add_task(what, total=total_bytes))


@contextmanager
def watched(what: str, storages: Sequence[Storage], *, total_bytes: int) -> Iterator[list[Storage]]:
    """Show on a terminal how much of the storages that it gives back was read, until the block ends."""
    if not sys.stderr.isatty():
        yield list(storages)
        return
    with moving(what, total_bytes=total_bytes) as advance:
        yield [_ReadsWatched(storage, advance) for storage in storages]


@contextmanager
def watched_writes(what: str, storage: Storage, *, total_bytes: int) -> Iterator[Storage]:
    """Show on a terminal how much of the storage that it gives back was written, until the block ends."""
    if not sys.stderr.isatty():
        yield storage
        return
    with moving(what, total_bytes=total_bytes) as advance:
        yield _WritesWatched(storage, advance)


def rate_text(num_bytes: float, seconds: float) -> str:
    """Return an amount, how long it took, and the rate: "268 MB in 0.5 s, 530 MB/s"."""
    return f"{size_text(num_bytes)} in {seconds:.3g} s, {size_text(num_bytes / max(seconds, 1e-9))}/s"


def age_text(moment: float) -> str:
    """Return how long ago a moment, in seconds since 1970, was: "3 min ago"."""
    return f"{span_text(time.time() - moment)} ago"


def moment_text(moment: float) -> str:
    """Return a moment, in seconds since 1970, in this machine's time: "2026-03-01 12:04:31"."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    except (ValueError, OverflowError, OSError):
        return f"{moment:.0f}"


def date_text(moment: float | None) -> str:
    """Return how long ago a moment was, or its date if that is more than a day; "" if it is not known."""
    if moment is None:
        return ""
    return age_text(moment) if time.time() - moment < 86_400 else moment_text(moment)[:16]


def metrics_text(metrics: dict[str, float]) -> str:
    """Return metrics on one line: "val/loss 0.0021  val/top1 0.97"."""
    shown = [f"{name} {value:.4g}" for name, value in sorted(metrics.items())[:_MOST_METRICS]]
    return "  ".join(shown + ([f"and {len(metrics) - len(shown):,} more"] if len(shown) < len(metrics) else []))


def flattened(settings: Any, name: str, *, text: Callable[[Any], str] | None = None) -> Iterator[tuple[str, str]]:
    """Yield nested settings, each under its dotted name, in words; None is no words."""
    if isinstance(settings, dict) and settings:
        for key, item in settings.items():
            yield from flattened(item, f"{name}.{key}" if name else key, text=text)
    else:
        yield name, "" if settings is None else (text or setting_text)(settings)


def setting_text(setting: Any) -> str:
    """Return a setting, a metric or a time on one line."""
    return f"{setting:.6g}" if isinstance(setting, float) else str(setting)

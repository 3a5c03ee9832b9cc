"""The progress line: how far a training is, on a terminal in place, elsewhere as a plain line now and then.

Invariant: what is no terminal gets no control characters, and a killed training leaves a terminal as it was.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.text import Text

from distckpt.events import Trained
from distckpt.progress import Progress

_PLAIN_LINE_EVERY_S, _PLAIN_LINE_AT_LEAST_EVERY_S = 5.0, 60.0
_PACE_OVER_S = 300.0
_SHORTEST_BAR, _LONGEST_BAR = 10, 40  # columns


class Meter:
    """One line that shows how far the training is: step, loss, rate, time left, and how the saving stands.

    On a terminal it is drawn anew in place, several times a second; elsewhere it is a plain line now and then.

    Args:
        total: The last step.
        saving: Returns how the saving stands.
    """

    def __init__(self, *, total: int, saving: Callable[[], Progress]) -> None:
        self._saving = saving
        self._where = Whereabouts(total=total)
        self._is_shown = self._is_drawn = False
        self._begun = self._spoke = time.monotonic()

    @contextmanager
    def shown(self, done: int) -> Iterator[None]:
        """Show the line while the context lasts, from `done` steps on.

        Ranks: 0.
        """
        console = _SteadyConsole(stderr=True)
        self._where.step = done
        self._is_shown = True
        self._is_drawn = sys.stderr.isatty() and not console.is_dumb_terminal
        with Live(get_renderable=lambda: self._drawn(console), console=console) if self._is_drawn else nullcontext():
            yield
        self._is_shown = False

    def advance(self, step: int, trained: Trained | None = None) -> None:
        """Show that a step is completed, with its figures if there are any.

        Ranks: any; silent but in the context of `shown`.
        """
        self._where.advance(step, trained)
        now = time.monotonic()
        is_due = trained is not None and now - self._spoke >= silence_s(now - self._begun)
        if self._is_shown and not self._is_drawn and is_due:
            self._spoke = now
            print("  ".join(text for _, text in self._where.parts(self._saving())), file=sys.stderr, flush=True)

    def _drawn(self, console: Console) -> Text:
        looks = Looks(
            width=console.width,
            ascii_only=console.options.ascii_only,
            colored=console.color_system is not None and not console.no_color,
        )
        return drawn(self._where, self._saving(), looks)


def silence_s(elapsed_s: float) -> float:
    """Return for how long to be silent between two plain lines: longer in a long training, whose output is kept.

    Ranks: any.
    """
    return min(max(_PLAIN_LINE_EVERY_S, elapsed_s / 100), _PLAIN_LINE_AT_LEAST_EVERY_S)


class Whereabouts:
    """How far a training is, and how long the rest will take, from the pace of its last minutes.

    Args:
        total: The last step.

    Attributes:
        total: The last step.
        step: The newest completed step.
    """

    def __init__(self, *, total: int) -> None:
        self.total = total
        self.step = 0
        self._figures: Trained | None = None
        self._marks: deque[tuple[float, int]] = deque()  # a moment, and the step that was completed then
        self._newest = 0.0, 0

    def advance(self, step: int, trained: Trained | None, *, now: float | None = None) -> None:
        """Take note that a step is completed; the first one, in which much is made ready, counts for no pace.

        Ranks: any.
        """
        now = time.monotonic() if now is None else now
        self.step, self._figures, self._newest = step, trained or self._figures, (now, step)
        if not self._marks or now - self._marks[-1][0] >= 1:
            self._marks.append(self._newest)
        while now - self._marks[0][0] > _PACE_OVER_S and len(self._marks) > 2:
            self._marks.popleft()

    def left_s(self, *, now: float | None = None) -> float | None:
        """Return the seconds that the remaining steps will take; None before two of them are done.

        Ranks: any.
        """
        if not self._marks:
            return None
        (begun, first), (ended, last) = self._marks[0], self._newest  # read once: another thread may draw
        if last <= first:
            return None
        since = (time.monotonic() if now is None else now) - ended
        return max(0.0, (ended - begun) / (last - first) * (self.total - last) - since)

    def parts(self, saving: Progress) -> list[tuple[int, str]]:
        """Return the line's parts, each after a number: what has a higher one is left out first.

        Ranks: any.
        """
        left_s, figures = self.left_s(), self._figures
        parts = [(0, f"step {self.step:,}/{self.total:,}")]
        if figures is not None:
            parts += [(1, f"loss {figures.loss:.4f}"), (6, f"lr {figures.lr:.3g}")]
            parts += [(5, f"{figures.samples_per_s:,.0f} samples/s")]
        if left_s is not None and self.step < self.total:
            parts += [(2, f"{timedelta(seconds=round(left_s))} left")]
        parts += [(4, saving.saved_text), (3, saving.saving_text)]
        return [(number, text) for number, text in parts if text]


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """What a terminal can show.

    Attributes:
        width: Its columns.
        ascii_only: Whether it knows no other characters.
        colored: Whether it has colors.
    """

    width: int
    ascii_only: bool = False
    colored: bool = True


def drawn(where: Whereabouts, saving: Progress, looks: Looks) -> Text:
    """Return the line for a terminal: as many parts as fit, and a bar if there is room.

    Ranks: any.
    """
    parts = where.parts(saving)
    room = looks.width - 1  # what fills the last column too is broken into two lines by some terminals
    while sum(len(text) + 2 for _, text in parts) - 2 > room and len(parts) > 1:
        parts.remove(max(parts))
    first, *rest = (text for _, text in parts)
    text = Text(first, no_wrap=True, overflow="crop")
    num_columns = min(room - sum(len(text) + 2 for _, text in parts), _LONGEST_BAR)
    if num_columns >= _SHORTEST_BAR:
        num_full = num_columns * where.step // max(where.total, 1)
        full, empty = ("#", "-") if looks.ascii_only else ("━", "━" if looks.colored else " ")
        text.append("  ").append(full * num_full, "bar.complete").append(empty * (num_columns - num_full), "bar.back")
    for part in rest:
        text.append(f"  {part}")
    return text


class _SteadyConsole(Console):
    """A console that leaves the cursor where it can be seen: a killed training could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        """Change nothing."""
        return False

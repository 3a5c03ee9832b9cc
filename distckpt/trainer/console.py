"""What a person sees of a training: a progress bar, or plain lines without a terminal; messages; the final table.

Invariant: talk goes to stderr, results to stdout, and only rank 0 writes either.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distckpt.trainer.evaluation import Evaluation

_PLAIN_LINE_EVERY_S = 5.0


class Meter:
    """Shows how far the training is: step, loss, learning rate and samples per second.

    Without a terminal it is a line now and then.
    """

    def __init__(self, *, done: int, total: int, shown: bool) -> None:
        self._total = total
        self._shown = shown
        self._stack = ExitStack()
        self._bar: Progress | None = None
        self._spoke = time.monotonic()
        if shown and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("training", total=total, completed=done, figures="")

    def advance(self, step: int, figures: str | None = None) -> None:
        """Show that a step is completed, with new figures if there are any.

        Ranks: any; all but rank 0 are silent.
        """
        if self._bar is not None:
            if figures is None:
                self._bar.update(self._task, completed=step)
            else:
                self._bar.update(self._task, completed=step, figures=figures)
        elif self._shown and figures is not None and time.monotonic() - self._spoke >= _PLAIN_LINE_EVERY_S:
            self._spoke = time.monotonic()
            print(f"step {step}/{self._total}  {figures}", file=sys.stderr, flush=True)

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._stack.enter_context(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class _StderrHandler(logging.Handler):
    """Writes to what stderr is at the moment, so that a progress bar can move out of the way."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        print(self.format(record), file=sys.stderr, flush=True)


def show_messages() -> None:
    """Let distckpt's messages appear on stderr, one line each; for a program's start, once.

    Ranks: any.
    """
    logger = logging.getLogger("distckpt")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
        logger.setLevel(logging.INFO)


def print_classes(evaluation: Evaluation, classes: tuple[str, ...]) -> None:
    """Print the accuracy by class as a table on stdout.

    Ranks: 0.
    """
    table = Table(title="accuracy by class", title_justify="left")
    table.add_column("class")
    table.add_column("right", justify="right")
    table.add_column("samples", justify="right")
    table.add_column("top-1", justify="right")
    for name, right, samples in zip(classes, evaluation.num_right, evaluation.num_samples, strict=True):
        table.add_row(name, str(right), str(samples), f"{100 * right / samples:.1f} %" if samples else "")
    table.add_section()
    total = sum(evaluation.num_samples)
    table.add_row("all", str(sum(evaluation.num_right)), str(total), f"{100 * evaluation.top1:.2f} %")
    Console().print(table)

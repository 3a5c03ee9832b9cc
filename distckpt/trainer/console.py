"""What a person sees of a training beside the progress line: messages, and the final table.

Invariant: talk goes to stderr, results to stdout, and only rank 0 writes either.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # it needs torch, of which messages know nothing
    from distckpt.trainer.evaluation import Evaluation


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

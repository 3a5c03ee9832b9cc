"""Tables: drawn by rich for who looks at a short one, written plainly for a pipe and for many rows.

Source: rich takes about 1 ms for a row, a plain line 2 us; checkpoints can have 40,000 entries, runs 1,000 checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distckpt.cli import terminal
from distckpt.cli.terminal import visible

if TYPE_CHECKING:
    from rich.text import Text

MOST_DRAWN = 150  # rows
_GAP = "  "


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a table; the style is rich's, for all of it."""

    cells: Sequence[str | Text]
    style: str = ""


def print_table(columns: Sequence[str], rows: Sequence[Row], *, right: Iterable[str] = (), fixed: int = 0) -> None:
    """Print rows below their headings.

    Args:
        columns: The headings.
        rows: The rows.
        right: The headings of the columns of numbers.
        fixed: How many of the first columns are never folded on a narrow terminal; -1 is all but the last.
    """
    if not sys.stdout.isatty() or len(rows) > MOST_DRAWN:
        _write(columns, rows, right=set(right))
        return
    table = terminal.make_table(columns, right=[*right])
    for column in table.columns[:fixed]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*row.cells, style=row.style)
    terminal.output().print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and what they are, without headings."""
    if not sys.stdout.isatty():
        _write_lines([[name, visible(text)] for name, text in facts.items()], [str.ljust, str.ljust])
        return
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in facts.items():
        grid.add_row(name, text)
    terminal.output().print(grid)


def _write(columns: Sequence[str], rows: Sequence[Row], *, right: set[str]) -> None:
    lines = [list(columns), *([visible(str(cell)) for cell in row.cells] for row in rows)]
    _write_lines(lines, [str.rjust if name in right else str.ljust for name in columns])


def _write_lines(lines: Sequence[Sequence[str]], pads: Sequence[Callable[[str, int], str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True))
        sys.stdout.write(_GAP.join(cells).rstrip() + "\n")

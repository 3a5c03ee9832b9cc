"""Tables: drawn by rich for who looks at a short one, written plainly for a pipe and for many rows.

Source: rich takes about 1 ms for a row, a plain line 2 us; checkpoints can have 40,000 entries, runs 1,000 checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distckpt.cli import terminal

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


def _write(columns: Sequence[str], rows: Sequence[Row], *, right: set[str]) -> None:
    lines = [list(columns), *([terminal.visible(str(cell)) for cell in row.cells] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = [str.rjust if name in right else str.ljust for name in columns]
    for line in lines:
        cells = (pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True))
        sys.stdout.write(_GAP.join(cells).rstrip() + "\n")

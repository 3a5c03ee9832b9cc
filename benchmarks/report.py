"""What a benchmark gives: a table to read, and a JSON line with the machine, the versions and the commit."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import COMMIT, machine, versions
from benchmarks.rounds import Run
from benchmarks.targets import Column, Verdict, judge, ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of one benchmark on one state.

    Attributes:
        benchmark: The benchmark's name.
        about: What was measured, in a line.
        facts: State, ranks and the like.
        columns: What the table shows.
        run: What was measured.
        absent: Why a contender was not run at all, by name.
        own: distckpt's contenders, which have targets to reach.
        limits: The contenders that are what the machine can do.
        checks: Targets that have no column of their own.
    """

    benchmark: str
    about: str
    facts: Mapping[str, Any]
    columns: Sequence[Column]
    run: Run
    absent: Mapping[str, str] = field(default_factory=dict)
    own: Sequence[str] = ("distckpt",)
    limits: Sequence[str] = ()
    checks: Sequence[Column] = ()

    @property
    def contenders(self) -> list[str]:
        """Everyone who has a number, in the order of the first column."""
        names = {name for each in self.run.rounds for name in each}

        def place(name: str) -> float:
            spread = self.run.spread(name, self.columns[0].measure)
            return spread.median if spread else float("inf")

        return sorted(names - self.run.failed.keys(), key=place)

    def table(self) -> str:
        """Return the table; a run that was too noisy has no numbers in it."""
        titles = [""]
        for column in self.columns:
            titles += [column.title, *([column.against] if column.ceiling else [])]
        rows = [titles]
        for name in self.contenders if not self.run.is_too_noisy else []:
            row = [name]
            for column in self.columns:
                row += self._cells(name, column)
            rows.append(row)
        lines = [f"{self.benchmark}: {self.about}", ", ".join(f"{k} {v}" for k, v in self.facts.items())]
        lines += aligned(rows) if len(rows) > 1 else []
        lines += [f"FAILED  {name}: {error.splitlines()[0]}" for name, error in self.run.failed.items()]
        lines += [f"not run {name}: {reason}" for name, reason in self.absent.items()]
        lines += [verdict.line for verdict in self.verdicts] if not self.run.is_too_noisy else []
        return "\n".join([*lines, self.run.verdict])

    def _cells(self, name: str, column: Column) -> list[str]:
        spread = self.run.spread(name, column.measure)
        if spread is None:
            return ["", *([""] if column.ceiling else [])]
        low, high = spread.low * column.scale, spread.high * column.scale
        cells = [f"{spread.median * column.scale:.3g} [{low:.3g}-{high:.3g}]"]
        if column.ceiling:
            found = ratio(self.run, name, column)
            cells.append(f"{found:.3g}" if found is not None else "")
        return cells

    @property
    def verdicts(self) -> list[Verdict]:
        """What came of each target; without numbers if the run was too noisy."""
        columns = [*self.columns, *self.checks]
        return judge(self.run, columns, own=self.own, names=self.contenders, limits=self.limits)

    def to_json(self) -> dict[str, Any]:
        """Return everything, also what the table leaves out because the run was too noisy."""
        measures = {(name, m) for each in self.run.rounds for name, measured in each.items() for m in measured}
        figures = []
        for name, measure in sorted(measures):
            spread = self.run.spread(name, measure)
            values = [each[name][measure] for each in self.run.rounds if measure in each.get(name, {})]
            figure: dict[str, Any] = {"contender": name, "measure": measure, "all_rounds": values}
            if spread is not None and not self.run.is_too_noisy:
                figure.update(median=spread.median, low=spread.low, high=spread.high)
                for column in self.columns:
                    ceiling = self.run.best(column.ceiling) if column.measure == measure else None
                    if ceiling is not None:
                        figure.update(ceiling="/".join(ceiling), ratio=ratio(self.run, name, column))
            figures.append(figure)
        return {
            "benchmark": self.benchmark,
            "about": self.about,
            "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **self.facts,
            "too_noisy": self.run.is_too_noisy,
            "verdict": self.run.verdict,
            "good_rounds": list(self.run.good),
            "load_average": list(self.run.loads),
            "failed": dict(self.run.failed),
            "not_run": dict(self.absent),
            "targets": [verdict.to_json() for verdict in self.verdicts],
            "limits": list(self.limits),
            "figures": figures,
            "commit": COMMIT,
            "machine": machine(),
            "versions": versions(),
        }

    def give(self, results: Path) -> None:
        """Print the table, and append the JSON line to the benchmark's file of results."""
        print(self.table(), end="\n\n", flush=True)
        results.mkdir(parents=True, exist_ok=True)
        with (results / f"{self.benchmark}.jsonl").open("a") as file:
            file.write(json.dumps(self.to_json()) + "\n")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, each column as wide as it needs: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]

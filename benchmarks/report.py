"""What a benchmark gives: a table to read, and a JSON line with the machine, the versions and the commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.rounds import Run

ROOT = Path(__file__).parents[1]
PEERS = ("torchsnapshot", "torch_checkpointing", "lightning-fabric", "accelerate", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the table.

    Attributes:
        title: What stands above it.
        measure: The measure that it shows.
        ceiling: The contenders and measures of which the best is the ceiling; empty if there is none.
        against: What stands above the ratio to it.
        scale: What a value is multiplied by.
        target: The most that distckpt's ratio may be, as far as there is a target.
    """

    title: str
    measure: str
    ceiling: Sequence[tuple[str, str]] = ()
    against: str = "x ceiling"
    scale: float = 1.0
    target: float | None = None


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
    """

    benchmark: str
    about: str
    facts: Mapping[str, Any]
    columns: Sequence[Column]
    run: Run
    absent: Mapping[str, str] = field(default_factory=dict)

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
        lines += self._targets() if not self.run.is_too_noisy else []
        return "\n".join([*lines, self.run.verdict])

    def _cells(self, name: str, column: Column) -> list[str]:
        spread = self.run.spread(name, column.measure)
        if spread is None:
            return ["", *([""] if column.ceiling else [])]
        low, high = spread.low * column.scale, spread.high * column.scale
        cells = [f"{spread.median * column.scale:.3g} [{low:.3g}-{high:.3g}]"]
        if column.ceiling:
            ratio = self._ratio(name, column)
            cells.append(f"{ratio:.3g}" if ratio is not None else "")
        return cells

    def _ratio(self, name: str, column: Column) -> float | None:
        ceiling = self.run.best(column.ceiling)
        spread = self.run.ratio(name, column.measure, ceiling) if ceiling else None
        return spread.median if spread else None

    def _targets(self) -> list[str]:
        lines = []
        for column in self.columns:
            if column.target is None:
                continue
            for name in self.contenders:
                ratio = self._ratio(name, column) if name.startswith("distckpt") else None
                if ratio is not None:
                    reached = "reached" if ratio <= column.target else "BEHIND"
                    lines.append(
                        f"target  {name}, {column.title}: {ratio:.3g} of at most {column.target:.3g}: {reached}"
                    )
        return lines

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
                        figure.update(ceiling="/".join(ceiling), ratio=self._ratio(name, column))
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


def commit() -> str:
    """Return the commit that was measured, with "+changes" if the tree differs from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--", "distckpt") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()


COMMIT = commit()  # now, when the code is loaded: the tree may move while it is measured


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0].partition(": ")[2] if models else platform.processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
    }


def file_system(path: Path) -> str:
    """Return the type of the file system that a path lies on."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def versions() -> dict[str, str]:
    """Return the versions of what was measured; a peer that is not installed is not in it."""
    found = {"python": platform.python_version()}
    for name in ("torch", "distckpt", *PEERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

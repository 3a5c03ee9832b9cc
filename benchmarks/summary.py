"""What the newest results say of every target: reached or not, and ahead of every peer or not.

    python -m benchmarks.summary
    python -m benchmarks.summary --results benchmarks/results/gpu

Reads the JSON lines in `results/` and prints Markdown; `--output` writes it to a file, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import RESULTS
from benchmarks.targets import Verdict, brief

# What tells one run of a benchmark from another; of runs that agree in all of it the newest counts.
FACTS = ("benchmark", "state", "tensors", "size", "cache", "ranks", "device", "backend")
USUAL = {"ranks": 1, "device": "cpu", "backend": "gloo"}  # where a line does not say
Line = Mapping[str, Any]


def read(results: Path) -> list[dict[str, Any]]:
    """Return every JSON line of a folder, file by file."""
    files = sorted(results.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def newest(lines: Sequence[Line], *, facts: Sequence[str] = FACTS) -> list[Line]:
    """Return the last line of each kind; a run that was too noisy gives way to an older one that was not."""
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        kind = tuple(str(line.get(name, USUAL.get(name))) for name in facts)
        if kind not in found or not line["too_noisy"] or found[kind]["too_noisy"]:
            found[kind] = line
    return list(found.values())


def described(line: Line) -> str:
    """Return what was measured, in short."""
    parts = [str(line.get("state", ""))]
    if "tensors" in line:
        parts.append(f"{line['tensors']:,} tensors")
    elif "bytes" in line:
        parts.append(f"{line['bytes'] / 1e6:,.0f} MB")
    ranks = line.get("ranks", 1)
    parts += [f"{ranks} rank{'s' if ranks > 1 else ''}"]
    parts += [str(line["backend"])] if line.get("backend") == "nccl" else []
    return ", ".join(part for part in parts if part)


def rows(lines: Sequence[Line]) -> list[list[str]]:
    """Return a row for each target: figure, state, contender, target, aim, seen, verdict, best peer."""
    found = []
    for line in lines:
        for body in line.get("targets", []):
            verdict = Verdict.from_json(body)
            found.append(
                [
                    verdict.figure,
                    described(line),
                    verdict.contender,
                    brief(verdict.target),
                    brief(verdict.aim) if verdict.aim is not None else "",
                    f"**{brief(verdict.ratio)}**" if verdict.ratio is not None else "too noisy",
                    verdict.word if verdict.ratio is not None else "",
                    f"{brief(verdict.against_peer)} x {verdict.best_peer}" if verdict.against_peer is not None else "",
                ]
            )
    return sorted(found, key=lambda row: row[0])


def behind(lines: Sequence[Line]) -> list[str]:
    """Return a sentence for each figure in which distckpt was not ahead of every peer."""
    found = []
    for line in lines:
        for verdict in (Verdict.from_json(body) for body in line.get("targets", [])):
            if verdict.against_peer is not None and verdict.place != "ahead":
                place = "level with" if verdict.place == "level" else "behind"
                found.append(
                    f"- {verdict.figure} ({described(line)}): {verdict.contender} is {place} {verdict.best_peer}, "
                    f"{brief(verdict.against_peer)} times its figure."
                )
    return found


def failures(lines: Sequence[Line]) -> list[str]:
    """Return a sentence for each peer that failed, with its error; each only once a benchmark."""
    found = {
        (line["benchmark"], name): f"- {line['benchmark']}: {name}: {error.splitlines()[0]}"
        for line in lines
        for name, error in line.get("failed", {}).items()
    }
    return list(found.values())


def markdown(lines: Sequence[Line]) -> str:
    """Return everything as Markdown."""
    titles = ["figure", "state", "of", "at most", "aim", "seen", "verdict", "against the best peer"]
    found = rows(lines)
    table = [titles, ["---"] * len(titles), *found] if found else []
    text = ["| " + " | ".join(row) + " |" for row in table] or ["No figure that has a target was measured."]
    text += ["", *[f"Measured on {each}." for each in sorted({where(line) for line in lines})]]
    for title, sentences in (("Not ahead of every peer:", behind(lines)), ("Failed:", failures(lines))):
        text += ["", title, "", *sentences] if sentences else []
    return "\n".join(text) + "\n"


def where(line: Line) -> str:
    """Return machine, versions and commit in a line."""
    machine, versions = line["machine"], line["versions"]
    parts = [f"{machine['num_cores']} cores of {machine['processor']}", f"{machine['memory_gb']} GB"]
    parts += [machine["gpu"]] if machine.get("gpu") else []
    parts += [str(line.get("file_system", "")), f"torch {versions['torch']}", f"Python {versions['python']}"]
    return ", ".join(part for part in [*parts, f"commit {line['commit']}"] if part)


def main(arguments: list[str] | None = None) -> int:
    """Print the summary."""
    parser = argparse.ArgumentParser(description="what the newest results say of every target")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON lines are")
    parser.add_argument("--output", type=Path, help="a file to write it to, too")
    given = parser.parse_args(arguments)
    lines = newest(read(given.results))
    if not lines:
        print(f"no results in {given.results}; run a benchmark first: make bench", file=sys.stderr)
        return 1
    text = markdown(lines)
    print(text)
    if given.output is not None:
        given.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

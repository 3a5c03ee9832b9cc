"""Pictures of the newest results: a bar for each contender, beside the ceiling of the same run.

    python -m benchmarks.plots

Reads the JSON lines in `results/` and writes a PNG beside them for each benchmark; needs matplotlib. A run that was
too noisy has no numbers, and so no picture.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import RESULTS

# The measures worth a picture, with what stands above it.
MEASURES = {
    "local_save": {"save_s": "Seconds until a save is durable"},
    "async_stall": {
        "lost_s": "Training seconds lost by a background save",
        "stall_s": "Seconds that save() stops training",
    },
    "load": {"load_s": "Seconds until all values are loaded"},
    "small_tensors": {
        "save_cpu_s": "Processor seconds to save 20,000 small tensors",
        "load_cpu_s": "Processor seconds to load 20,000 small tensors",
    },
}
FACTS = ("state", "cache", "ranks")


def newest(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return the last run of each kind that has numbers: of each state, cache and number of ranks."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        run = json.loads(line)
        if not run["too_noisy"]:
            found[tuple(run.get(name) for name in (*FACTS, "size"))] = run
    return list(found.values())


def bars(run: dict[str, Any], measure: str) -> list[tuple[str, float, float, float]]:
    """Return each contender with its median and its ends, the least first."""
    figures = [each for each in run["figures"] if each["measure"] == measure and "median" in each]
    return sorted(((f["contender"], f["median"], f["low"], f["high"]) for f in figures), key=lambda bar: bar[1])


def title(run: dict[str, Any], text: str) -> str:
    """Return what stands above a picture."""
    ranks = f"{run['ranks']} ranks" if run.get("ranks", 1) > 1 else ""
    cache = f"{run['cache']} cache" if run.get("cache") else ""
    facts = [run["state"], f"{run['bytes'] / 1e6:,.0f} MB", ranks, cache]
    return f"{text}\n{', '.join(fact for fact in facts if fact)}"


def draw(run: dict[str, Any], measure: str, text: str, path: Path) -> None:
    """Write one picture."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    found = bars(run, measure)
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.32 * len(found)), layout="constrained")
    names = [name for name, *_ in found]
    medians = [median for _, median, *_ in found]
    errors = [[median - low for _, median, low, _ in found], [high - median for _, median, _, high in found]]
    colors = ["tab:orange" if name == "distckpt" else "silver" if is_ceiling(name) else "tab:blue" for name in names]
    axes.barh(names, medians, xerr=errors, color=colors, ecolor="dimgray")
    axes.bar_label(axes.containers[-1], labels=[f" {median:.3g}" for median in medians], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title(run, text), fontsize=10, loc="left")
    axes.set_xlabel(f"median of {len(run['good_rounds'])} rounds; grey: what the machine can do; lower is better")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def is_ceiling(name: str) -> bool:
    """Say whether a contender is what the machine can do."""
    return name.startswith(("raw", "memory copy"))


def main(arguments: list[str] | None = None) -> int:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description="pictures of the newest results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON lines are")
    results: Path = parser.parse_args(arguments).results
    importlib.import_module("matplotlib").use("Agg")
    for benchmark, measures in MEASURES.items():
        file = results / f"{benchmark}.jsonl"
        for run in newest(file.read_text().splitlines()) if file.exists() else []:
            for measure, text in measures.items():
                parts = [benchmark, measure.removesuffix("_s"), *(str(run[name]) for name in FACTS if name in run)]
                path = results / f"{'-'.join(parts)}.png"
                draw(run, measure, text, path)
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

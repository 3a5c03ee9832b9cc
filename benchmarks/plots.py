"""Pictures of the newest results, one for each question, for a README: 800 pixels wide, distckpt in colour.

    python -m benchmarks.plots

Reads the JSON lines in `results/` and writes PNGs to `pictures/`; needs matplotlib. A run that was too noisy has no
numbers, and so no picture. What the machine can do with the same bytes is a line, not a bar.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.options import RESULTS
from benchmarks.summary import Line, described, newest, read

PICTURES = Path(__file__).parent / "pictures"
OWN, PEER, LIMIT = "#e8590c", "#adb5bd", "#1971c2"
WIDTH_INCHES, DPI = 8.0, 100
MOST_PANELS = 2  # side by side at 800 pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a picture answers.

    Attributes:
        name: The picture's file, without the state.
        benchmark: Whose results.
        measures: A panel for each, by measure, with what stands above it.
        text: The question.
        unit: What stands below the bars.
        logarithmic: Whether the values lie too far apart for anything else.
    """

    name: str
    benchmark: str
    measures: Mapping[str, str]
    text: str
    unit: str = "seconds"
    logarithmic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One set of bars.

    Attributes:
        title: What stands above it.
        bars: Contender, median, least and greatest; the least first.
        limit: What the machine can do, and with what; None if nothing was measured.
    """

    title: str
    bars: Sequence[tuple[str, float, float, float]]
    limit: tuple[float, str] | None


QUESTIONS = (
    Question(
        name="save",
        benchmark="local_save",
        measures={"save_s": ""},
        text="How long until a save is durable?",
    ),
    Question(
        name="lost",
        benchmark="async_stall",
        measures={"lost_s": ""},
        text="How much training time does a background save cost?",
    ),
    Question(
        name="stall",
        benchmark="async_stall",
        measures={"stall_s": "later saves", "first_stall_s": "the first save"},
        text="How long does save() stop the training?",
        logarithmic=True,
    ),
    Question(name="load", benchmark="load", measures={"load_s": ""}, text="How long does a load take?"),
    Question(
        name="small-tensors",
        benchmark="small_tensors",
        measures={"save_cpu_s": "save", "load_cpu_s": "load"},
        text="What do many small tensors cost the processor?",
        unit="processor seconds",
        logarithmic=True,
    ),
    Question(
        name="memory",
        benchmark="ddp_bytes",
        measures={"memory_ratio": ""},
        text="How much memory does a background save need on each rank?",
        unit="of the state's size",
    ),
)


def panels(question: Question, lines: Sequence[Line]) -> list[Panel]:
    """Return the panels of one state: a measure, a cache and a number of ranks each."""
    found = []
    for line in sorted(lines, key=lambda each: (str(each.get("cache")) == "cold", each.get("ranks", 1))):
        for measure, title in question.measures.items():
            ranks = line.get("ranks", 1)
            cache = f"{line['cache']} cache" if line.get("cache") else ""
            parts = [title, cache, f"{ranks} rank{'s' if ranks > 1 else ''}"]
            bars, limit = split(line, measure)
            if bars:
                found.append(Panel(title=", ".join(part for part in parts if part), bars=bars, limit=limit))
    return found


def split(line: Line, measure: str) -> tuple[list[tuple[str, float, float, float]], tuple[float, str] | None]:
    """Return the contenders' bars, the least first, and the best of what the machine can do."""
    names = line.get("limits", ())
    figures = [each for each in line["figures"] if each["measure"] == measure and "median" in each]
    bars = [(f["contender"], f["median"], f["low"], f["high"]) for f in figures if f["contender"] not in names]
    ceilings = {each["ceiling"].rpartition("/")[::2] for each in figures if each.get("ceiling")}
    limits = [
        (each["median"], each["contender"])
        for each in line["figures"]
        if (each["contender"], each["measure"]) in ceilings and each["contender"] in names and "median" in each
    ]
    return sorted(bars, key=lambda bar: bar[1]), min(limits, default=None)


def draw(question: Question, found: Sequence[Panel], subtitle: str, path: Path) -> None:
    """Write one picture."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    num_columns = min(len(found), MOST_PANELS)
    num_rows = -(-len(found) // num_columns)
    most_bars = max(len(panel.bars) for panel in found)
    height = 0.7 + num_rows * (0.9 + 0.26 * most_bars)
    figure, grid = pyplot.subplots(
        *(num_rows, num_columns), figsize=(WIDTH_INCHES, height), layout="constrained", squeeze=False, facecolor="white"
    )
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, found, strict=False):
        _draw_panel(axes, panel, question)
    figure.suptitle(f"{question.text}\n", fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.text(0.01, 1 - 0.36 / height, f"{subtitle}; lower is better", fontsize=9, color="#495057", va="top")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")
    pyplot.close(figure)


def _draw_panel(axes: Any, panel: Panel, question: Question) -> None:
    names = [_short(name) for name, *_ in panel.bars]
    medians = [median for _, median, *_ in panel.bars]
    errors = [[median - low for _, median, low, _ in panel.bars], [high - median for _, median, _, high in panel.bars]]
    colors = [OWN if name.startswith("distckpt") else PEER for name, *_ in panel.bars]
    axes.barh(names, medians, xerr=errors, color=colors, ecolor="#868e96", error_kw={"linewidth": 0.8})
    axes.bar_label(axes.containers[-1], labels=[f" {median:.2g}" for median in medians], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log" if question.logarithmic and min(medians) > 0 else "linear")
    axes.margins(x=0.18)
    if panel.limit is not None:
        value, name = panel.limit
        axes.axvline(value, color=LIMIT, linewidth=1.4, linestyle="--")
        axes.set_title(f"- - {name}: {value:.2g}", fontsize=7.5, loc="right", color=LIMIT)
    above = "\n" if panel.limit is not None else ""  # in a line of its own: the two may be wider than a panel
    axes.set_title(f"{panel.title}{above}", fontsize=9.5, loc="left")
    axes.set_xlabel(question.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    for label, (name, *_) in zip(axes.get_yticklabels(), panel.bars, strict=True):
        label.set_fontweight("bold" if name.startswith("distckpt") else "normal")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short(name: str) -> str:
    """Return a name in lines that are narrow enough for two panels."""
    head, comma, tail = name.partition(", ")
    return f"{head},\n{tail}" if comma and len(name) > 24 else name


def main(arguments: list[str] | None = None) -> int:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description="pictures of the newest results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON lines are")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="where the PNGs go")
    given = parser.parse_args(arguments)
    importlib.import_module("matplotlib").use("Agg")
    lines = [line for line in newest(read(given.results)) if not line["too_noisy"]]
    for question in QUESTIONS:
        asked = [line for line in lines if line["benchmark"] == question.benchmark]
        for state, size in sorted({(line["state"], line["size"]) for line in asked}):
            chosen = [line for line in asked if (line["state"], line["size"]) == (state, size)]
            found = panels(question, chosen)
            if found:
                path = given.pictures / f"{question.name}-{state}.png"
                draw(question, found, described({**chosen[0], "ranks": 1}).rpartition(", ")[0], path)
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

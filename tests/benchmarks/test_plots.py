from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.plots import QUESTIONS, Question, draw, panels, split

SAVE = Question(name="save", benchmark="local_save", measures={"save_s": ""}, text="How long?")


def figure(contender: str, median: float, **others: Any) -> dict[str, Any]:
    spread = {"median": median, "low": median / 2, "high": median * 2}
    return {"contender": contender, "measure": "save_s", **spread, **others}


def line(**facts: Any) -> dict[str, Any]:
    figures = [
        figure("peer", 2.0, ceiling="raw/save_s"),
        figure("distckpt", 1.0, ceiling="raw/save_s"),
        figure("raw", 0.5),
        figure("raw, direct", 0.7),
        figure("distckpt", 9.0, measure="cpu_s"),
    ]
    return {"state": "vgg16", "limits": ["raw", "raw, direct"], "figures": figures, **facts}


def test_bars_stand_in_order_and_the_ceiling_is_none_of_them() -> None:
    bars, limit = split(line(), "save_s")
    assert bars == [("distckpt", 1.0, 0.5, 2.0), ("peer", 2.0, 1.0, 4.0)]
    assert limit == (0.5, "raw")


def test_each_cache_and_number_of_ranks_has_a_panel() -> None:
    lines = [line(ranks=2, cache="cold"), line(ranks=1, cache="cold"), line(ranks=2, cache="warm")]
    assert [panel.title for panel in panels(SAVE, lines)] == [
        "warm cache, 2 ranks",
        "cold cache, 1 rank",
        "cold cache, 2 ranks",
    ]


def test_a_measure_that_nobody_has_makes_no_panel() -> None:
    assert panels(SAVE, [line(figures=[])]) == []


def test_each_question_has_a_file_of_its_own() -> None:
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)


def test_a_picture_is_800_pixels_wide(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    draw(SAVE, panels(SAVE, [line(ranks=1), line(ranks=2)]), "vgg16", tmp_path / "save.png")
    data = (tmp_path / "save.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == 800

from __future__ import annotations

import json
from typing import Any

from benchmarks.plots import bars, newest, title


def run(time: str, **facts: Any) -> dict[str, Any]:
    figures = [
        {"contender": "peer", "measure": "save_s", "median": 2.0, "low": 1.0, "high": 3.0},
        {"contender": "distckpt", "measure": "save_s", "median": 1.0, "low": 0.5, "high": 4.0},
        {"contender": "distckpt", "measure": "cpu_s", "median": 9.0, "low": 9.0, "high": 9.0},
    ]
    return {"time": time, "too_noisy": False, "state": "small", "bytes": 5e6, "figures": figures, **facts}


def test_the_newest_run_of_each_kind_is_drawn_unless_it_was_too_noisy() -> None:
    lines = [run("1", ranks=1), run("2", ranks=2), run("3", ranks=1), run("4", ranks=1, too_noisy=True)]
    assert [each["time"] for each in newest([json.dumps(line) for line in lines])] == ["3", "2"]


def test_bars_stand_in_order() -> None:
    assert bars(run("1"), "save_s") == [("distckpt", 1.0, 0.5, 4.0), ("peer", 2.0, 1.0, 3.0)]


def test_a_title_says_what_was_measured() -> None:
    assert title(run("1", ranks=2, cache="cold"), "Seconds") == "Seconds\nsmall, 5 MB, 2 ranks, cold cache"

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.machine import commit, machine, versions
from benchmarks.report import Report, aligned
from benchmarks.rounds import Rules, Run
from benchmarks.targets import Column

COLUMNS = [
    Column(
        title="save s",
        measure="save_s",
        ceiling=[("raw", "save_s"), ("raw, direct", "save_s")],
        target=1.2,
        aim=1.05,
        figure="save / raw write",
    ),
    Column(title="MB", measure="written_bytes", scale=1e-6),
]


def report(*, direct: tuple[float, ...] = (0.5, 0.5, 0.5), save_s: float = 0.55) -> Report:
    rounds = tuple(
        {
            "raw": {"save_s": 1.0},
            "raw, direct": {"save_s": value},
            "distckpt": {"save_s": save_s, "written_bytes": 3e6},
            "peer": {"save_s": 2.0},
        }
        for value in direct
    )
    rules = Rules(num_rounds=3, max_noise=0.25)
    failed = {"broken": "rank 0: OSError: [Errno 22] Invalid argument\nmore"}
    run = Run(rounds=rounds, references=(("raw, direct", "save_s"),), rules=rules, failed=failed, loads=(0.1, 0.2, 0.3))
    facts = {"state": "small", "ranks": 1}
    return Report(
        benchmark="saving",
        about="seconds",
        facts=facts,
        columns=COLUMNS,
        run=run,
        absent={"away": "ImportError: no"},
        limits=("raw", "raw, direct"),
    )


def rows(text: str) -> dict[str, list[str]]:
    found = {}
    for line in text.splitlines():
        cells = [cell for cell in line.split("  ") if cell.strip()]
        found[cells[0].strip()] = [cell.strip() for cell in cells[1:]]
    return found


def test_each_figure_stands_beside_its_ratio_to_the_best_ceiling() -> None:
    table = rows(report().table())
    assert table["distckpt"] == ["0.55 [0.55-0.55]", "1.1", "3 [3-3]"]
    assert table["peer"] == ["2 [2-2]", "4"]
    assert table["raw, direct"][1] == "1"


def test_a_target_is_said_to_be_reached_or_not() -> None:
    start = "target  distckpt, save / raw write: "
    assert f"{start}1.1 of at most 1.2 (aim 1.05): reached; ahead: 0.275 x the best peer, peer" in report().table()
    assert f"{start}1.02 of at most 1.2 (aim 1.05): aim reached" in report(save_s=0.51).table()
    assert f"{start}1.4 of at most 1.2 (aim 1.05): BEHIND" in report(save_s=0.7).table()


def test_who_failed_and_who_is_away_stands_in_the_table_with_the_reason() -> None:
    table = report().table()
    assert "FAILED  broken: rank 0: OSError: [Errno 22] Invalid argument\n" in table
    assert "not run away: ImportError: no" in table


def test_a_run_that_was_too_noisy_gives_no_number() -> None:
    noisy = report(direct=(0.5, 0.5, 5.0))
    table = noisy.table()
    assert "too noisy: 2 of 3" in table
    assert "0.55" not in table
    assert "target" not in table
    body = noisy.to_json()
    assert body["too_noisy"]
    assert not [figure for figure in body["figures"] if "median" in figure]
    assert [f["all_rounds"] for f in body["figures"] if f["contender"] == "peer"] == [[2.0, 2.0, 2.0]]


def test_a_json_line_says_what_was_measured_on_what(tmp_path: Path) -> None:
    report().give(tmp_path)
    report().give(tmp_path)
    lines = (tmp_path / "saving.jsonl").read_text().splitlines()
    assert len(lines) == 2
    body = json.loads(lines[0])
    assert {"commit", "machine", "versions", "command", "load_average", "verdict", "time"} <= body.keys()
    [figure] = [f for f in body["figures"] if (f["contender"], f["measure"]) == ("distckpt", "save_s")]
    assert (figure["median"], figure["ceiling"]) == (0.55, "raw, direct/save_s")
    assert round(figure["ratio"], 6) == 1.1
    assert body["failed"].keys() == {"broken"}
    [verdict] = body["targets"]
    assert (verdict["word"], verdict["best_peer"], verdict["target"]) == ("reached", "peer", 1.2)


def test_columns_are_as_wide_as_they_need() -> None:
    assert aligned([["", "s"], ["long name", "1"], ["b", "12.5"]]) == [
        "              s",
        "long name     1",
        "b          12.5",
    ]


def test_the_machine_and_the_versions_are_known() -> None:
    assert machine()["num_cores"] >= 1
    assert {"python", "torch", "distckpt"} <= versions().keys()
    assert commit()

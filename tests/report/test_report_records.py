"""What logs say is read as it is found: cut off, damaged or hostile."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import histories
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import StorageError
from distckpt.logfolder import EVALUATION_NAME, EVENTS_NAME, LOG_NAME
from distckpt.report.evaluations import parse_evaluation
from distckpt.report.records import read_logs

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["time", "job", "kind", "step", "loss", "lr", "steps", "ending"])


def test_a_folder_without_logs_says_nothing(tmp_path: Path) -> None:
    assert read_logs(tmp_path).is_empty
    assert read_logs(tmp_path / "nowhere").is_empty


def test_half_a_line_and_what_is_no_event_are_left_out(tmp_path: Path) -> None:
    good = {"time": 5.0, "job": "a", "kind": "saved", "step": 3, "num_bytes": 7, "new": [1]}
    odd: list[Any] = [{"time": "now", "kind": "saved"}, {"time": -1, "kind": "saved"}, {"kind": "saved"}, [1], 7, None]
    lines = [json.dumps(line) for line in (*odd, good)]
    (tmp_path / EVENTS_NAME).write_text("\n".join([*lines, "", "[" * 100_000, json.dumps(good)[:-4]]))
    [event] = read_logs(tmp_path).events
    assert (event.kind, event.step, event.whole("num_bytes"), event.number("stall_s")) == ("saved", 3, 7, None)


@given(lines=st.lists(st.dictionaries(KEYS, JSON), max_size=6))
def test_no_line_is_too_odd_to_be_read(tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("odd")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for name in (EVENTS_NAME, LOG_NAME, EVALUATION_NAME):
        (folder / name).write_text(text, errors="surrogatepass")
    logs = read_logs(folder)
    assert all(isinstance(step, int) for points in logs.curves.values() for step, _ in points)


def test_a_loss_that_was_not_finite_is_a_gap(tmp_path: Path) -> None:
    histories.write_lines(
        tmp_path / LOG_NAME,
        [{"kind": "train", "step": 1, "loss": 0.5, "lr": 0.1}, {"kind": "train", "step": 2, "loss": None, "lr": 0.1}],
    )
    curves = read_logs(tmp_path).curves
    assert curves["train/lr"] == ((1, 0.1), (2, 0.1))
    assert curves["train/loss"][0] == (1, 0.5)
    assert math.isnan(curves["train/loss"][1][1])


def test_of_a_step_that_stands_twice_the_later_line_counts(tmp_path: Path) -> None:
    lines = [{"kind": "eval", "step": step, "val/loss": loss} for step, loss in ((9, 0.9), (4, 0.4), (9, 0.8))]
    histories.write_lines(tmp_path / LOG_NAME, lines)
    assert read_logs(tmp_path).curves == {"val/loss": ((4, 0.4), (9, 0.8))}


def test_a_log_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).mkdir()
    with pytest.raises(StorageError, match="--log-dir"):
        read_logs(tmp_path)


def test_an_evaluation_says_what_was_written() -> None:
    record = parse_evaluation(histories.evaluation(90))
    assert (record.step, len(record.classes), len(record.samples)) == (90, 10, 12)
    assert sum((record.confusion or {}).values()) == sum(record.num_samples)
    assert 0.98 < record.accuracy < 1


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"classes": []},
        {"classes": [1] * 10},
        {"num_right": [99] * 10},
        {"num_samples": [1]},
        {"confusion": [[0, 10, 1]]},
        {"confusion": [[0, 1]]},
        {"samples": [{"png": "%", "true": 0, "predicted": 0, "probability": 1}]},
        {"samples": [{"png": "PHNjcmlwdD4=", "true": 0, "predicted": 0, "probability": 1}]},
        {"samples": [{"png": histories.picture(0, size=2000), "true": 0, "predicted": 0, "probability": 1}]},
        {"samples": [{"png": histories.picture(0), "true": 11, "predicted": 0, "probability": 1}]},
        {"samples": [{"png": histories.picture(0), "true": 1, "predicted": 0, "probability": float("nan")}]},
    ],
)
def test_an_evaluation_that_contradicts_itself_is_none(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_evaluation({**histories.evaluation(90), **changes})

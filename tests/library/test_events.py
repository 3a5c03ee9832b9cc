"""Events as they are: their JSON, their figures, the page that lists them, and the file that keeps them."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
from pathlib import Path

import pytest

from distckpt import events
from distckpt.events import (
    Ended,
    Evaluated,
    Event,
    EventLog,
    Preempted,
    Pruned,
    Quarantined,
    Restored,
    Saved,
    SaveFailed,
    SaveSkipped,
    Started,
    Trained,
)

PAGE = Path(__file__).parents[2] / "docs" / "events.md"
CLASSES = {each for each in vars(events).values() if isinstance(each, type) and issubclass(each, Event)} - {Event}

ONE_OF_EACH = [
    Started(world_size=2, host="gpu-01", pid=7, directory="s3://bucket/run", version="1.0"),
    Restored(step=40, seconds=0.5, num_bytes=1000),
    Quarantined(step=50, reason="'a/rank-00000.safetensors' is missing; it is put aside"),
    Saved(step=60, stall_s=0.1, write_s=0.4, durable_s=0.5, num_bytes=1000, world_size=2, layout="full"),
    SaveFailed(step=70, error="StorageError", reason="no space left"),
    SaveSkipped(step=80, in_flight=70),
    Pruned(step=60, steps=(10, 20), num_bytes=2000),
    Preempted(step=90, signal="SIGTERM", left_s=25.0, choice="save now"),
    Ended(step=90, ending="preempted"),
    Trained(step=91, epoch=3, loss=0.25, lr=0.1, samples=5000, samples_per_s=99.5, grad_norm=1.5),
    Evaluated(step=92, epoch=3, metrics={"val/loss": 0.5, "val/top1": 0.75}),
]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def listed_on_the_page() -> dict[str, tuple[str, set[str]]]:
    """Return for each kind its class and its own keys, as the page's tables say."""
    rows = [row.split("|")[1:-1] for row in PAGE.read_text().splitlines() if row.startswith("| `")]
    return {
        row[0].strip(" `"): (row[1].strip(" `"), set(re.findall(r"`([\w/]+)`", row[3].partition("; as attributes")[0])))
        for row in rows
        if len(row) == 4
    }


def test_the_page_lists_every_kind_with_its_keys() -> None:
    listed = listed_on_the_page()
    kinds = {each.kind: each for each in CLASSES}
    assert {kind: name for kind, (name, _) in listed.items()} == {kind: each.__name__ for kind, each in kinds.items()}
    for kind, (_, keys) in listed.items():
        own = set(events.own_names(kinds[kind]))
        assert keys == (own - {"metrics"} | {"val/loss", "val/top1", "val/top5"} if kind == "eval" else own), kind


def test_there_is_one_example_of_each_kind_here() -> None:
    assert {type(event) for event in ONE_OF_EACH} == CLASSES


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: event.kind)
def test_an_event_is_one_line_of_json_that_begins_with_what_all_have(event: Event) -> None:
    body = json.loads(json.dumps(event.to_json(), allow_nan=False))
    assert list(body)[:4] == ["time", "job", "kind", "step"]
    assert (body["kind"], body["step"]) == (event.kind, event.step)
    own = events.own_names(type(event))
    assert set(body) - {"time", "job", "kind", "step"} == (
        {"epoch", *event.metrics} if event.kind == "eval" else {*own}
    )


def test_figures_are_the_numbers_under_names_that_no_other_kind_has() -> None:
    figures = {event.kind: event.figures for event in ONE_OF_EACH}
    assert figures["saved"] == {
        "saved/stall_s": 0.1,
        "saved/write_s": 0.4,
        "saved/durable_s": 0.5,
        "saved/num_bytes": 1000,
        "saved/world_size": 2,
    }
    assert figures["eval"] == {"eval/epoch": 3, "val/loss": 0.5, "val/top1": 0.75}
    assert figures["ended"] == {}
    names = [name for each in figures.values() for name in each]
    assert len(names) == len(set(names))


def test_a_number_that_json_does_not_know_is_null() -> None:
    event = Trained(step=1, epoch=1, loss=float("nan"), lr=0.1, samples=1, samples_per_s=float("inf"))
    assert (event.to_json()["loss"], event.to_json()["samples_per_s"]) == (None, None)


def test_the_reason_of_a_failed_save_is_one_line_of_bounded_length() -> None:
    event = SaveFailed.of(ValueError("a" * 10_000 + "\nFix: nothing"), step=5)
    assert (event.step, event.error, event.reason) == (5, "ValueError", "a" * events.MAX_TEXT_CHARS)


def test_a_log_holds_a_line_for_each_event_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "events.jsonl"
    for start in (0, 5):
        log = EventLog(path)
        for event in ONE_OF_EACH[start : start + 5]:
            log(event)
    assert lines(path) == [event.to_json() for event in ONE_OF_EACH[:10]]


def test_a_log_is_not_made_before_there_is_an_event(tmp_path: Path) -> None:
    EventLog(tmp_path / "folder" / "events.jsonl")
    assert not list(tmp_path.iterdir())


def test_half_a_line_of_a_killed_job_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path)(ONE_OF_EACH[0])
    with path.open("a") as file:
        file.write('{"time": 12.5, "jo')
    EventLog(path)(ONE_OF_EACH[1])
    found = path.read_text().splitlines()
    assert found[1] == '{"time": 12.5, "jo'
    assert [json.loads(found[0]), json.loads(found[2])] == [event.to_json() for event in ONE_OF_EACH[:2]]


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    threads = [threading.Thread(target=lambda: [log(event) for event in ONE_OF_EACH]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(path)) == 8 * len(ONE_OF_EACH)


def test_a_log_that_cannot_be_written_is_one_warning_and_goes_on_once_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "place").write_text("a file where a folder should be")
    log = EventLog(tmp_path / "place" / "events.jsonl")
    for event in ONE_OF_EACH[:3]:
        log(event)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "events are not logged: could not write" in record.message
    (tmp_path / "place").unlink()
    log(ONE_OF_EACH[3])
    assert lines(tmp_path / "place" / "events.jsonl") == [ONE_OF_EACH[3].to_json()]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    EventLog("/dev/full")(ONE_OF_EACH[0])
    assert os.strerror(errno.ENOSPC) in caplog.text

"""What a training tells of: to `events.jsonl`, to callbacks, and to TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from distckpt.events import Evaluated, Event, Saved, Trained
from distckpt.logfolder import EVENTS_NAME
from distckpt.trainer import CheckpointConfig, DataConfig, LoopConfig, TrainConfig, Trainer
from distckpt.trainer.logs import LOG_NAME


def config(directory: Path, *, epochs: int = 2, **train: Any) -> TrainConfig:
    """Return a training of 4 steps an epoch, each of them logged, saved after each second one and each epoch."""
    return TrainConfig(
        data=DataConfig(name="synthetic", image_size=32, num_classes=6, num_train=23, num_test=9),
        train=LoopConfig(epochs=epochs, global_batch_size=7, log_every=1, **train),
        checkpoint=CheckpointConfig(directory=str(directory), every=2),
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def board(folder: Path) -> dict[str, list[int]]:
    """Return the steps of each curve."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_callbacks_are_told_of_saves_and_figures_and_the_log_of_what_is_no_figure(tmp_path: Path) -> None:
    told: list[Event] = []
    logs = tmp_path / "logs"
    result = Trainer(config(tmp_path / "run", log_dir=str(logs)), callbacks=[told.append]).fit()
    logged = [event.to_json() for event in told if not isinstance(event, Trained | Evaluated)]
    assert lines(logs / EVENTS_NAME) == logged
    assert {body["kind"] for body in logged} >= {"started", "restored", "saved", "ended"}
    assert [body["step"] for body in logged if body["kind"] == "saved"] == [2, 4, 6, 8]
    common = {"time", "job", "samples_per_s"}
    figures = [event.to_json() for event in told if isinstance(event, Trained | Evaluated)]
    stripped = [{name: value for name, value in body.items() if name not in common} for body in figures]
    in_log = lines(logs / LOG_NAME)
    assert stripped == [{**line, "grad_norm": None} if line["kind"] == "train" else line for line in in_log]
    assert len({event.job for event in told}) == 1
    assert told[-1].to_json() | {"time": 0, "job": ""} == {
        **{"time": 0, "job": "", "kind": "ended", "step": 8},
        **{"ending": "complete", "reason": None},
    }
    [*_, last] = [event for event in told if isinstance(event, Evaluated)]
    assert last.metrics == result.metrics


def test_what_saves_cost_is_drawn_beside_the_loss_without_gaps_or_repeats(tmp_path: Path) -> None:
    Trainer(config(tmp_path)).fit()
    Trainer(config(tmp_path, epochs=3)).fit()
    drawn = board(tmp_path)
    for name in ("stall_s", "write_s", "durable_s", "MB", "MB_per_s"):
        assert drawn[f"save/{name}"] == [2, 4, 6, 8, 10, 12]
    assert drawn["train/loss"] == [*range(1, 13)]
    jobs = [line for line in lines(tmp_path / EVENTS_NAME) if line["kind"] == "started"]
    assert len(jobs) == 2


def test_a_callback_that_raises_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved: list[int | None] = []

    def careless(event: Event) -> None:
        if isinstance(event, Trained):
            raise ValueError("made by a test")

    def careful(event: Event) -> None:
        if isinstance(event, Saved):
            saved.append(event.step)

    assert Trainer(config(tmp_path, epochs=1), callbacks=[careless, careful]).fit().complete
    assert saved == [2, 4]
    assert len([record for record in caplog.records if "is not called again" in record.message]) == 1

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from distckpt.errors import ConfigError
from distckpt.trainer.config import DataConfig, LoopConfig, ModelConfig, OptimizerConfig, TrainConfig
from distckpt.trainer.history import Past, changed_settings, check_same_training, recorded

FACTS = {"classes": ["a", "b"], "num_classes": 2, "num_test": 3, "num_train": 9, "shape": [3, 8, 8]}
RECORD = recorded(TrainConfig(), FACTS)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"model": ModelConfig(name="resnet18")}, "model.name is lenet there and resnet18 here"),
        ({"model": ModelConfig(options={"dropout": 0.1})}, "model.options.dropout is None there and 0.1 here"),
        ({"data": DataConfig(name="synthetic")}, "data.name is digits there and synthetic here"),
        ({"optimizer": OptimizerConfig(name="adamw")}, "optimizer.name is sgd there and adamw here"),
        ({"train": LoopConfig(global_batch_size=3)}, "train.global_batch_size is 64 there and 3 here"),
        ({"train": LoopConfig(precision="bf16")}, "train.precision is fp32 there and bf16 here"),
    ],
)
def test_another_training_is_refused_by_name(changes: dict[str, Any], difference: str) -> None:
    wanted = recorded(dataclasses.replace(TrainConfig(), **changes), FACTS)
    with pytest.raises(ConfigError) as raised:
        check_same_training(RECORD, wanted, "runs/x")
    assert difference in str(raised.value)
    assert "runs/x holds checkpoints of another training" in str(raised.value)
    assert str(raised.value).endswith("use another --checkpoint.directory")
    assert "\n" not in str(raised.value)


def test_other_data_in_the_same_place_is_refused() -> None:
    wanted = recorded(TrainConfig(), {**FACTS, "num_train": 10})
    with pytest.raises(ConfigError, match=r"dataset\.num_train is 9 there and 10 here"):
        check_same_training(RECORD, wanted, "runs/x")


def test_checkpoints_that_no_trainer_made_are_refused() -> None:
    with pytest.raises(ConfigError, match="that no Trainer made"):
        check_same_training({}, RECORD, "runs/x")


def test_what_a_run_may_change_is_told() -> None:
    train, data = LoopConfig(epochs=99, workers=3), DataConfig(root="elsewhere")
    wanted = recorded(dataclasses.replace(TrainConfig(), train=train, data=data), FACTS)
    check_same_training(RECORD, wanted, "runs/x")
    assert changed_settings(Past(step=5, config=RECORD), wanted) == [
        "data.root data -> elsewhere",
        "train.epochs 30 -> 99",
        "train.workers 0 -> 3",
    ]

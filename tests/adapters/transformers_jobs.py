"""What ranks run in the tests of the Hugging Face Trainer: top-level functions, sent by name."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import Dataset

import distckpt
from distckpt.adapters.transformers import CheckpointedTrainer

SAMPLES, BATCH = 48, 4


class Crash(Exception):
    """What ends a training in its middle."""


class Numbers(Dataset[dict[str, torch.Tensor]]):
    """Sequences of which the first token names the sample."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor([index, *(index * k % SAMPLES for k in range(2, 7))])
        return {"input_ids": ids, "labels": ids}


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Crashes, or asks for a stop, at the end of a step."""

    def __init__(self, *, crash_at: int, preempt_at: int) -> None:
        self.crash_at, self.preempt_at, self.evaluations = crash_at, preempt_at, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.crash_at and state.global_step == self.crash_at:
            raise Crash
        if state.global_step == self.preempt_at - 1 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluations += 1


def tiny_model() -> Any:
    config = transformers.GPT2Config(
        vocab_size=SAMPLES, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)  # dropout, and an output layer that shares the embedding's weights


def train(directory: str, *, crash_at: int = 0, preempt_at: int = 0, every: int = 5, **options: Any) -> dict[str, Any]:
    """Train or go on, and return everything that two runs may be compared by."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.set_seed(3)
    options = {"num_train_epochs": 3, "eval_strategy": "epoch", "logging_steps": 4, **options}
    args = transformers.TrainingArguments(
        f"{directory}-output",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=0.01,
        metric_for_best_model="eval_loss",
        restore_callback_states_from_checkpoint=True,
        **options,
    )
    watch = Watch(crash_at=crash_at, preempt_at=preempt_at)
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=1000)
    evaluates = options["eval_strategy"] != "no"
    seen: list[int] = []

    class Seeing(CheckpointedTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            seen.extend(inputs["input_ids"][:, 0].tolist())
            return super().training_step(model, inputs, *rest)

    checkpoints = distckpt.CheckpointManager(directory, every=every, keep=100)
    numbers = Numbers()
    trainer = Seeing(
        model=tiny_model(),
        args=args,
        train_dataset=numbers,
        eval_dataset=torch.utils.data.Subset(numbers, range(8)),
        callbacks=[watch, *([stopping] if evaluates else [])],
        checkpoints=checkpoints,
    )
    crashed, handler = False, signal.getsignal(signal.SIGTERM)
    try:
        trainer.train()
    except Crash:
        crashed = True
    timed = ("runtime", "per_second")
    log = [{k: v for k, v in each.items() if not k.endswith(timed)} for each in trainer.state.log_history]
    return {
        "crashed": crashed,
        "preempted": checkpoints.preempted,
        "handlers_are_back": signal.getsignal(signal.SIGTERM) is handler,
        "evaluations": watch.evaluations,
        "step": trainer.state.global_step,
        "epoch": trainer.state.epoch,
        "log": [each for each in log if "train_loss" not in each],  # that of this call of `train` alone
        "flos": trainer.state.total_flos,
        "best": (trainer.state.best_metric, trainer.state.best_global_step),
        "rate": trainer.lr_scheduler.get_last_lr() if trainer.lr_scheduler else None,
        "stopping": [
            each.early_stopping_patience_counter
            for each in trainer.callback_handler.callbacks
            if isinstance(each, transformers.EarlyStoppingCallback)
        ],
        "seen": seen,
        "model": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "optimizer": [value["exp_avg"].clone() for value in trainer.optimizer.state.values()],
        "random": torch.rand(2),
        "files": sorted(each.name for each in Path(f"{directory}-output").glob("*")),
        "rank": dist.get_rank() if dist.is_initialized() else 0,
    }

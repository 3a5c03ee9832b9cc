"""Hugging Face transformers: a `Trainer` that saves and restores through a CheckpointManager.

A `TrainerCallback` could not do it: it sees a step before its evaluation, and can neither skip data nor say where an
epoch goes on. So this is the `Trainer` itself, with the few methods that its own checkpoints go through.
Invariant: a step is given to the manager once, when nothing that the Trainer does for this step is left to be done.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from distckpt.errors import DependencyError, UsageError
from distckpt.manager import CheckpointManager
from distckpt.rng import RandomState
from distckpt.slots import PerRank

try:
    import transformers
    from transformers.trainer import TRAINER_STATE_NAME
except ModuleNotFoundError as error:
    raise DependencyError(
        package="transformers", purpose="distckpt.adapters.transformers", fix="pip install 'distckpt[transformers]'"
    ) from error

__all__ = ["CheckpointedTrainer"]


class CheckpointedTrainer(transformers.Trainer):
    """A `transformers.Trainer` that saves and resumes through distckpt.

        trainer = CheckpointedTrainer(
            model=model,
            args=TrainingArguments("out", save_strategy="no"),
            train_dataset=dataset,
            checkpoints=distckpt.CheckpointManager("runs/first", every=50, keep=3),
        )
        trainer.train()

    `train` resumes from the newest good checkpoint by itself. Saved are the model, optimizer, scheduler, scaler, the
    trainer's and its callbacks' state, the running loss, and each rank's random-number generators; batches that were
    seen are skipped, as `ignore_data_skip` says. A resumed run is the undisturbed one, bit for bit, if dataset and
    collator draw no numbers from the global generators of the main process.

    A step is saved after its logging and evaluation, so `Retention(best=..., metric="eval_loss")` sees what they
    measured. On a signal the step is saved and `train` returns; `checkpoints.preempted` is then true. The manager is
    closed when `train` ends. To have another Trainer do this: `class Mine(CheckpointedTrainer, SFTTrainer): pass`.

    Args:
        *args: As the Trainer takes them.
        checkpoints: The manager; one for each `train`.
        **kwargs: As the Trainer takes them.

    Raises:
        UsageError: The training arguments ask for DeepSpeed or FSDP, or for checkpoints of the Trainer's own.

    Ranks: all; `train` raises and waits for what `CheckpointManager.restore`, `step` and `close` do, too.
    """

    def __init__(self, *args: Any, checkpoints: CheckpointManager, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UsageError(
                problem="CheckpointedTrainer does not know where DeepSpeed and FSDP keep a Trainer's state",
                fix="train with DDP, or with a loop of your own: distckpt saves FSDP2 modules as they are",
            )
        if self.args.save_strategy != "no":
            raise UsageError(
                problem=f"the Trainer would save by itself, too: save_strategy is {str(self.args.save_strategy)!r}",
                fix='TrainingArguments(..., save_strategy="no"); CheckpointManager(every=...) says when to save',
            )
        self._checkpoints = checkpoints
        self._done = 0  # the last step that the manager knows
        self._awaits_epoch_end = 0  # the step that the epoch's end still belongs to
        self._progress = _Progress(self)
        self._random: dict[str, Any] | None = None
        self._groups: list[dict[str, Any]] = []

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the newest good checkpoint on.

        Args:
            resume_from_checkpoint: Nothing, or True, which changes nothing.
            *args: As the Trainer takes them.
            **kwargs: As the Trainer takes them.

        Raises:
            UsageError: A checkpoint of another kind is asked for.
            As `CheckpointManager.restore`, `step` and `close` do.

        Ranks: all (collective).
        """
        if isinstance(resume_from_checkpoint, str):
            raise UsageError(
                problem=f"the run's directory says where to go on, not {resume_from_checkpoint!r}",
                fix="leave it out; to begin from old weights, load the model from them: from_pretrained(...)",
            )
        with self._checkpoints:
            return super().train(None, *args, **kwargs)

    def _inner_training_loop(
        self, batch_size: Any = None, args: Any = None, resume_from_checkpoint: Any = None, **kwargs: Any
    ) -> Any:
        return super()._inner_training_loop(
            batch_size=batch_size, args=args, resume_from_checkpoint=self._checkpoints.directory, **kwargs
        )

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: Any, trial: Any
    ) -> Any:
        """Restore, then let the Trainer read its own state, as from a file, and find its place in the data."""
        self.create_optimizer()
        self._done = self._checkpoints.restore(self._state(scheduler=self._progress.scheduler))
        positions = (max_steps, num_update_steps_per_epoch, num_train_epochs)
        if not self._done:
            return super()._init_training_state(*positions, None, trial)
        self._random = RandomState().state_dict()
        self._groups = [dict(group) for group in self.optimizer.param_groups]
        with tempfile.TemporaryDirectory() as folder:
            state = transformers.TrainerState(**self._progress.trainer)
            state.save_to_json(str(Path(folder) / TRAINER_STATE_NAME))
            return super()._init_training_state(*positions, folder, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """Give the scheduler, which is made only now, its state, and undo what making it has done to the optimizer."""
        if not self._done:
            return
        self.lr_scheduler.load_state_dict(self._progress.scheduler.loaded)
        for group, restored in zip(self.optimizer.param_groups, self._groups, strict=True):
            group.update({name: value for name, value in restored.items() if name != "params"})

    def _load_scaler(self, checkpoint: Any) -> None:
        """Do nothing: it is restored with all else."""

    def _load_rng_state(self, checkpoint: Any) -> None:
        """Set what beginning has used up, and the loss since it was logged last."""
        if self._random is None:
            return
        RandomState().load_state_dict(self._random)
        self._random = None
        running = self._progress.running.value.loaded
        self._tr_loss: torch.Tensor = running["loss"].to(self.args.device)
        self._globalstep_last_logged = running["last_logged"]
        self.current_flos = running["flos"]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After logging and evaluation the step is complete; one that ends an epoch, after those of the epoch's end."""
        step = self.state.global_step
        if self._checkpoints.preempted:  # the epoch's end, which there is no time for
            return
        super()._maybe_log_save_evaluate(*args, **kwargs)
        ends_epoch = float(self.state.epoch).is_integer()
        if step == self._done or (ends_epoch and self._awaits_epoch_end != step):
            self._awaits_epoch_end = step
            return
        self._done = step
        if self._checkpoints.step(step, self._state(scheduler=self.lr_scheduler), metrics=_Metrics(self.state)):
            self.control.should_training_stop = True

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step
        if not self._checkpoints.preempted and step:
            self._checkpoints.save(step, self._state(scheduler=self.lr_scheduler), metrics=_Metrics(self.state))
        return super()._finalize_training(*args, **kwargs)

    def _state(self, *, scheduler: Any) -> dict[str, Any]:
        optimizer = self.optimizer
        state = {
            "model": self.model,
            "optimizer": getattr(optimizer, "optimizer", optimizer),  # without accelerate's wrapper
            "scheduler": scheduler,
            "trainer": self._progress,
            "running": self._progress.running,
        }
        scaler = getattr(self.accelerator, "scaler", None)
        return state if scaler is None else {**state, "scaler": scaler}


class _Progress:
    """The trainer's own state and its callbacks', as it would write it to a file."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self.trainer: dict[str, Any] = {}
        self.scheduler = _Kept()
        self.running = PerRank(_Running(trainer))
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        callbacks = [*self._trainer.callback_handler.callbacks, self._trainer.control]
        fresh = transformers.TrainerState(
            stateful_callbacks=[each for each in callbacks if hasattr(each, "state") and hasattr(each, "from_state")]
        )
        facts = dataclasses.asdict(self._trainer.state)
        return {**facts, "stateful_callbacks": fresh.stateful_callbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer = state


class _Running:
    """What this rank has counted since it was logged last."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self.loaded: dict[str, Any] = {}
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "loss": getattr(trainer, "_tr_loss", torch.zeros(())),
            "last_logged": getattr(trainer, "_globalstep_last_logged", 0),
            "flos": float(trainer.current_flos),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


class _Kept:
    """Keeps a state until the object that it is for is made."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.loaded

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


class _Metrics(Mapping[str, float]):
    """What the trainer has logged for its last step; gathered only when a save is due."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def _found(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for entry in reversed(self._state.log_history):
            if entry.get("step") != self._state.global_step:
                break
            numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float)) and math.isfinite(v)}
            found = {**numbers, **found}
        return {name: value for name, value in found.items() if name not in ("step", "epoch")}

    def __getitem__(self, name: str) -> float:
        return self._found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

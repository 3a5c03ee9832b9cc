"""The training loop: restore, train, evaluate, log, save, and leave when asked to.

Invariant: what a step does depends on the configuration and on the state before it, never on when or how often the
run was stopped; and a step's log lines are in the file before its checkpoint can be.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from distckpt.manager import CheckpointManager
from distckpt.ranks import Ranks
from distckpt.retention import Retention
from distckpt.trainer.assembly import Batch, Parts, TestLoader, assemble, train_batches, uncompiled
from distckpt.trainer.config import TrainConfig, check
from distckpt.trainer.console import Meter
from distckpt.trainer.datasets import Images, download_images, open_images
from distckpt.trainer.evaluation import Evaluation, evaluate
from distckpt.trainer.history import changed_settings, find_past, recorded
from distckpt.trainer.logs import RunLog, log_folder
from distckpt.trainer.optimization import apply_settings, check_device
from distckpt.trainer.order import Plan
from distckpt.trainer.process import Process, deterministic, joined
from distckpt.trainer.recall import Hearing
from distckpt.trainer.reload import load_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """How a training ended.

    Attributes:
        step: Optimizer steps completed, over all restarts.
        total_steps: Optimizer steps that the configuration asks for.
        metrics: The last evaluation's figures: "val/loss", "val/top1", "val/top5"; empty if there was none.
        preempted: Whether the run was asked to stop, and did after saving.
        complete: Whether all steps are done.
        recalled: Whether it stopped only because ranks of other machines were asked to: this one is to be started
            again, to go on without those.
        evaluation: The last evaluation of this process, by class; None if it made none.
        classes: The classes' names, by label.
    """

    step: int
    total_steps: int
    metrics: dict[str, float]
    preempted: bool
    complete: bool
    evaluation: Evaluation | None
    classes: tuple[str, ...]
    recalled: bool = False


class Trainer:
    """Trains an image classifier as a configuration says, resumably.

    Attributes:
        config: The settings.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, config: TrainConfig) -> None:
        check(config)
        self.config = config

    def fit(self) -> FitResult:
        """Train until all steps are done or the job is asked to stop; goes on from the newest checkpoint.

        Under torchrun all ranks train together; alone, this process trains by itself.
        On SIGTERM or SIGINT the current step is saved before it returns.

        Raises:
            ConfigError: The settings do not fit this machine, the data, or the checkpoints in the directory.
            DistckptError: The checkpoints cannot be loaded or saved; see `distckpt.errors`.

        Ranks: all (collective); blocks until the training ends.
        """
        with ExitStack() as stack:
            hearing = stack.enter_context(Hearing())
            process = stack.enter_context(joined(timeout_s=self.config.train.timeout_s))
            check_device(self.config.train, process.device)
            stack.enter_context(deterministic(self.config.train.deterministic))
            ranks = Ranks(timeout_s=self.config.checkpoint.timeout_s)
            images = _agreed_images(self.config, process, ranks)
            record = recorded(self.config, images.facts())
            manager = stack.enter_context(_manager(self.config, images, record))
            past = find_past(manager, record, ranks)
            if process.is_first and past is not None:
                for change in changed_settings(past, record):
                    logger.info("changed since step %d: %s", past.step, change)
            parts = assemble(self.config, images, process)
            result = _Run(self.config, process, ranks, parts, manager).go()
            return replace(result, recalled=result.preempted and hearing.only_elsewhere(ranks))

    @staticmethod
    def load_model(
        directory: str | os.PathLike[str], *, step: int | None = None, storage_options: dict[str, Any] | None = None
    ) -> nn.Module:
        """Return the trained model, rebuilt from a run's checkpoint alone, in eval mode on the CPU.

        Args:
            directory: Path or URL of the run.
            step: Which checkpoint; None for the newest.
            storage_options: Options of the storage's fsspec file system.

        Raises:
            CheckpointNotFoundError: There is no such checkpoint.
            ConfigError: The checkpoint was not made by a Trainer.

        Ranks: any.
        """
        return load_model(directory, step=step, storage_options=storage_options)


def _agreed_images(config: TrainConfig, process: Process, ranks: Ranks) -> Images:
    """Return the data set; a rank that cannot open it fails all of them."""
    if config.data.download:
        ranks.agree("download of the data", lambda: _download(config, process), lambda _: None)
    opened: list[Images] = []
    ranks.agree("opening of the data", lambda: opened.append(open_images(config.data)), lambda _: None)
    return opened[0]


def _download(config: TrainConfig, process: Process) -> None:
    if process.local_rank == 0:
        download_images(config.data)


def _manager(config: TrainConfig, images: Images, record: dict[str, Any]) -> CheckpointManager:
    checkpoint = config.checkpoint
    steps_per_epoch = -(-images.num_train // config.train.global_batch_size)
    return CheckpointManager(
        checkpoint.directory,
        every=checkpoint.every or steps_per_epoch,
        keep=checkpoint.keep,
        layout=checkpoint.layout,
        background=checkpoint.background,
        timeout_s=checkpoint.timeout_s,
        storage_options=checkpoint.storage_options,
        config=record,
        mtbf_s=checkpoint.mtbf_s,
        when_busy=checkpoint.when_busy,
        check_replicas=checkpoint.check_replicas,
        check_finite=checkpoint.check_finite,
    )


class _Run:
    """One call of `Trainer.fit`."""

    def __init__(
        self, config: TrainConfig, process: Process, ranks: Ranks, parts: Parts, manager: CheckpointManager
    ) -> None:
        self.config = config
        self.process = process
        self.ranks = ranks
        self.parts = parts
        self.manager = manager
        self.plan = parts.plan
        self.evaluation: Evaluation | None = None
        self.metrics: dict[str, float] = {}
        keep = config.checkpoint.keep
        self.saves_evaluated = isinstance(keep, Retention) and keep.best > 0
        self.test_loader = TestLoader(parts.images, config, process)

    def go(self) -> FitResult:
        """Restore, train to the end or until preempted, and tell how it ended."""
        if self.process.is_first:
            logger.info("configuration: %s", json.dumps(self.config.as_json()))
        done = self.manager.restore(self.parts.state())
        self.parts.position.step = done
        apply_settings(self.config.optimizer, self.parts.optimizer, self.parts.scheduler)
        total = self.plan.total_steps
        if done >= total:
            latest = self.manager.latest
            self.metrics = dict(latest.metrics) if latest is not None else {}
            self._say("complete: all %d steps of %d epochs are done", total, self.config.train.epochs)
            return self._result(done)
        self._train(done)
        step = self.parts.position.step
        if step < total:
            self._say("preempted: saved step %d; run the same command to go on", step)
        else:
            self.manager.wait()
            self._say("complete: step %d, %s", step, _figures(self.metrics))
        return self._result(step)

    def _train(self, done: int) -> None:
        """Run the steps after `done` ones, until all are done and saved or the job is asked to stop."""
        with ExitStack() as stack:
            log = self._open_log(stack, done)
            meter = stack.enter_context(Meter(done=done, total=self.plan.total_steps, shown=self.process.is_first))
            batches = train_batches(self.parts, self.config, self.process)
            state = self.parts.state()
            rate = _Rate(self.plan, done)
            for step in range(done + 1, self.plan.total_steps + 1):
                self._train_step(step, batches, log, meter, rate)
                if step == done + 1 and self.config.checkpoint.background:
                    self.manager.prewarm(state)  # not before: optimizers make their state in their first step
                metrics = self._evaluate(step, log)
                if metrics and (self.saves_evaluated or step == self.plan.total_steps):
                    self.manager.save(step, state, metrics=metrics)
                if self.manager.step(step, state, metrics=metrics):
                    return

    def _open_log(self, stack: ExitStack, done: int) -> RunLog | None:
        """Return rank 0's log, which `stack` closes; if it cannot be written, all ranks fail."""
        opened: list[RunLog] = []

        def work() -> None:
            if self.process.is_first:
                folder = log_folder(self.config.train.log_dir, self.config.checkpoint.directory)
                opened.append(stack.enter_context(RunLog(folder, done=done)))

        self.ranks.agree("opening of the log", work, lambda _: None)
        return opened[0] if opened else None

    def _train_step(self, step: int, batches: Iterator[Batch], log: RunLog | None, meter: Meter, rate: _Rate) -> None:
        """Do one optimizer step, and log it when it is due."""
        loss, norm = self._optimize(batches)
        lr = self.parts.optimizer.param_groups[0]["lr"]
        self.parts.scheduler.step()
        self.parts.position.step = step
        if step % self.config.train.log_every:
            meter.advance(step)
            return
        if self.process.world_size > 1:
            dist.all_reduce(loss)
        epoch, start, stop = self.plan.bounds(step - 1)
        values = {
            "epoch": epoch + 1,
            "loss": loss.item() / (stop - start),
            "lr": lr,
            "samples": epoch * self.plan.num_samples + stop,
        }
        if norm is not None:
            values["grad_norm"] = norm.item()
        samples_per_s = rate.at(step)
        meter.advance(step, f"loss {values['loss']:.4f}  lr {lr:.3g}  {samples_per_s:,.0f} samples/s")
        if log is not None:
            log.write("train", step=step, values=values, board_only={"samples_per_s": samples_per_s})

    def _optimize(self, batches: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do one optimizer step; return this rank's sum of losses before it, and the gradients' norm if clipped.

        DDP averages over ranks; each rank's sum is weighted so that the average is the mean over samples.
        """
        parts, train = self.parts, self.config.train
        _, start, stop = self.plan.bounds(parts.position.step)
        weight = self.process.world_size / (stop - start)
        scaler = parts.precision.scaler
        parts.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.process.device)
        for part in range(train.accumulate):
            images, labels = next(batches)
            waits = part < train.accumulate - 1 and isinstance(parts.model, DistributedDataParallel)
            with parts.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                # A batch may be empty where ranks are many, which compiled convolutions do not take.
                with parts.precision.autocast(), nullcontext() if len(labels) else uncompiled(self.config):
                    loss = functional.cross_entropy(parts.model(images).float(), labels, reduction="sum")
                scaler.scale(loss * weight).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        norm = None
        if train.clip_grad_norm is not None:
            scaler.unscale_(parts.optimizer)
            norm = nn.utils.clip_grad_norm_(parts.bare.parameters(), train.clip_grad_norm)
        scaler.step(parts.optimizer)
        scaler.update()
        return total, norm

    def _evaluate(self, step: int, log: RunLog | None) -> dict[str, float] | None:
        """Evaluate if it is due after this step; return the metrics."""
        epoch, rest = divmod(step, self.plan.steps_per_epoch)
        if rest or (epoch % self.config.train.eval_every and step != self.plan.total_steps):
            return None
        self.evaluation = evaluate(
            self.parts.bare,
            self.test_loader,
            num_classes=len(self.parts.images.classes),
            precision=self.parts.precision,
            process=self.process,
        )
        self.metrics = self.evaluation.metrics()
        if log is not None:
            log.write("eval", step=step, values={"epoch": epoch, **self.metrics})
        self._say("epoch %d, step %d: %s", epoch, step, _figures(self.metrics))
        return self.metrics

    def _say(self, message: str, *values: Any) -> None:
        if self.process.is_first:
            logger.info(message, *values)

    def _result(self, step: int) -> FitResult:
        return FitResult(
            step=step,
            total_steps=self.plan.total_steps,
            metrics=self.metrics,
            preempted=step < self.plan.total_steps,
            complete=step >= self.plan.total_steps,
            evaluation=self.evaluation,
            classes=self.parts.images.classes,
        )


class _Rate:
    """Samples per second since the last time that it was asked."""

    def __init__(self, plan: Plan, step: int) -> None:
        self._plan = plan
        self._samples = plan.samples_seen(step)
        self._time = time.monotonic()

    def at(self, step: int) -> float:
        samples, now = self._plan.samples_seen(step), time.monotonic()
        rate = (samples - self._samples) / max(now - self._time, 1e-9)
        self._samples, self._time = samples, now
        return rate


def _figures(metrics: dict[str, float]) -> str:
    """Return an evaluation as a few words."""
    if not metrics:
        return "not evaluated"
    return (
        f"loss {metrics['val/loss']:.4f}, top-1 {100 * metrics['val/top1']:.2f} %, "
        f"top-5 {100 * metrics['val/top5']:.2f} %"
    )

"""The training loop: restore, train, evaluate, log, save, and leave when asked to.

Invariant: what a step does depends on the configuration and on the state before it, never on when or how often the
run was stopped; and a step's log lines are in the file before its checkpoint can be.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from distckpt.bulletin import Audience
from distckpt.events import Callback, Evaluated, Event, EventLog, Trained
from distckpt.logfolder import EVENTS_NAME, log_folder
from distckpt.manager import CheckpointManager
from distckpt.ranks import Ranks
from distckpt.retention import Retention
from distckpt.trainer.assembly import Batch, Parts, TestLoader, assemble, train_batches, uncompiled
from distckpt.trainer.config import TrainConfig, check
from distckpt.trainer.datasets import Images, download_images, open_images
from distckpt.trainer.evaluation import Evaluation, evaluate
from distckpt.trainer.evaluation_file import write_evaluation
from distckpt.trainer.history import changed_settings, find_past, recorded
from distckpt.trainer.logs import RunLog, find_evaluation
from distckpt.trainer.meter import Meter
from distckpt.trainer.optimization import apply_settings, check_device
from distckpt.trainer.order import Plan
from distckpt.trainer.process import Process, deterministic, joined
from distckpt.trainer.recall import Hearing
from distckpt.trainer.reload import load_model
from distckpt.trainer.sheet import Sheet

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """How a training ended.

    Attributes:
        step: Optimizer steps completed, over all restarts.
        total_steps: Optimizer steps that the configuration asks for.
        metrics: The last evaluation's figures: "val/loss", "val/top1", "val/top5"; empty if there was none.
        preempted: Whether the run was asked to stop, and did.
        complete: Whether all steps are done, and their last evaluation.
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

    Args:
        config: The settings.
        callbacks: What rank 0 tells of each event: those of the checkpoints, the figures of each step that is logged,
            and each evaluation; functions of one `distckpt.events.Event`. See docs/events.md.

    Attributes:
        config: The settings.

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(self, config: TrainConfig, *, callbacks: Sequence[Callback] = ()) -> None:
        check(config)
        self.config = config
        self._callbacks = tuple(callbacks)

    def fit(self) -> FitResult:
        """Train until all steps are done or the job is asked to stop; goes on from the newest checkpoint.

        Under torchrun all ranks train together; alone, this process trains by itself.
        On SIGTERM, SIGINT or SIGUSR1 the current step is saved before it returns; an evaluation is broken off, and made
        again by the next start.

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
            audience = Audience(self._callbacks)
            manager = stack.enter_context(_manager(self.config, images, record, audience))
            past = find_past(manager, record, ranks)
            if process.is_first and past is not None:
                for change in changed_settings(past, record):
                    logger.info("changed since step %d: %s", past.step, change)
            parts = assemble(self.config, images, process)
            result = _Run(self.config, process, ranks, parts, manager, audience=audience).go()
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


def _manager(config: TrainConfig, images: Images, record: dict[str, Any], audience: Audience) -> CheckpointManager:
    checkpoint = config.checkpoint
    folder = log_folder(config.train.log_dir, checkpoint.directory, branch=checkpoint.branch)
    steps_per_epoch = -(-images.num_train // config.train.global_batch_size)
    return CheckpointManager(
        checkpoint.directory,
        at=checkpoint.at,
        branch=checkpoint.branch,
        every=checkpoint.every or steps_per_epoch,
        keep=checkpoint.keep,
        layout=checkpoint.layout,
        background=checkpoint.background,
        timeout_s=checkpoint.timeout_s,
        storage_options=checkpoint.storage_options,
        config=record,
        grace_s=checkpoint.grace_s,
        ends_at=checkpoint.ends_at,
        mtbf_s=checkpoint.mtbf_s,
        when_busy=checkpoint.when_busy,
        check_replicas=checkpoint.check_replicas,
        check_finite=checkpoint.check_finite,
        memory_tier=checkpoint.memory_tier,
        callbacks=[EventLog(folder / EVENTS_NAME), audience],
    )


class _Run:
    """One call of `Trainer.fit`."""

    def __init__(
        self,
        config: TrainConfig,
        process: Process,
        ranks: Ranks,
        parts: Parts,
        manager: CheckpointManager,
        *,
        audience: Audience,
    ) -> None:
        self.config = config
        self.process = process
        self.ranks = ranks
        self.parts = parts
        self.manager = manager
        self.audience = audience
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
        self.metrics = self._past_metrics(done)
        is_evaluated = bool(self.metrics) or not self._evaluates_after(done)
        if done >= total and is_evaluated:
            self._say("complete: all %d steps of %d epochs are done", total, self.config.train.epochs)
            return self._result(done)
        if self.ranks.agree("start of the training", lambda: self.manager.stopping, any):
            self.manager.step(done, self.parts.state(), stop=True)
        else:
            self._train(done, is_evaluated=is_evaluated)
        step = self.parts.position.step
        if self.manager.preempted:
            self._say_preempted()
        else:
            self._say("complete: step %d, %s", step, _figures(self.metrics))
        return self._result(step)

    def _past_metrics(self, done: int) -> dict[str, float]:
        """Return the figures of the evaluation after the step that was restored, the same on all ranks; {} if none.

        A checkpoint has none if a signal came in its evaluation, which the next start makes again; that only logs them.
        """

        def look(_: list[None]) -> dict[str, float]:
            latest = self.manager.latest
            if not done or latest is None:
                return {}
            folder = log_folder(self.config.train.log_dir, self.config.checkpoint.directory)
            return (dict(latest.metrics) if latest.step == done else {}) or find_evaluation(folder, done) or {}

        metrics: dict[str, float] = self.ranks.agree("reading of the newest checkpoint's figures", lambda: None, look)
        return metrics

    def _say_preempted(self) -> None:
        if self.process.is_first:
            latest = self.manager.latest
            saved = "nothing is saved" if latest is None else f"saved step {latest.step}"
            self._say("preempted: %s; run the same command to go on", saved)

    def _train(self, done: int, *, is_evaluated: bool) -> None:
        """Run the steps after `done` ones, until all are done and saved or the job is asked to stop.

        If the last of these was not evaluated when that was due, that comes first.
        """
        with ExitStack() as stack:
            log = self._open_log(stack, done)
            meter = Meter(total=self.plan.total_steps, saving=lambda: self.manager.progress)
            if self.process.is_first:
                stack.enter_context(meter.shown(done))
            batches = train_batches(self.parts, self.config, self.process)
            state = self.parts.state()
            rate = _Rate(self.plan, done)
            if not is_evaluated and self._end_step(done, state, log):
                return
            for step in range(done + 1, self.plan.total_steps + 1):
                self._train_step(step, batches, log, meter, rate)
                if step == done + 1 and self.config.checkpoint.background:
                    self.manager.prewarm(state)  # not before: optimizers make their state in their first step
                if self._end_step(step, state, log):
                    return
            self.manager.wait()  # while the last save can still be seen, and noted in the log

    def _end_step(self, step: int, state: dict[str, Any], log: RunLog | None) -> bool:
        """Evaluate and save after a step, if that is due; return whether to leave the loop."""
        metrics = None
        if self._evaluates_after(step):
            metrics = self._evaluate(step, log)
            if metrics is None:
                return self.manager.step(step, state, stop=True)
            if self.saves_evaluated or step == self.plan.total_steps:
                self.manager.save(step, state, metrics=metrics)
        # The run that has saved its last step is complete, whoever asks it to stop.
        return step < self.plan.total_steps and self.manager.step(step, state, metrics=metrics)

    def _open_log(self, stack: ExitStack, done: int) -> RunLog | None:
        """Return rank 0's log, which `stack` closes; if it cannot be written, all ranks fail."""
        opened: list[RunLog] = []

        def work() -> None:
            if self.process.is_first:
                folder = log_folder(
                    self.config.train.log_dir, self.config.checkpoint.directory, branch=self.config.checkpoint.branch
                )
                opened.append(stack.enter_context(RunLog(folder, done=done)))
                self.audience.add(opened[0].tell)

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
        values: dict[str, Any] = {
            "epoch": epoch + 1,
            "loss": loss.item() / (stop - start),
            "lr": lr,
            "samples": epoch * self.plan.num_samples + stop,
        }
        if norm is not None:
            values["grad_norm"] = norm.item()
        trained = Trained(step=step, samples_per_s=rate.at(step), **values)
        meter.advance(step, trained)
        if log is not None:
            log.write("train", step=step, values=values, board_only={"samples_per_s": trained.samples_per_s})
        self._tell(trained)

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

    def _evaluates_after(self, step: int) -> bool:
        """Say whether an evaluation is due after this step."""
        epoch, rest = divmod(step, self.plan.steps_per_epoch)
        is_due = epoch % self.config.train.eval_every == 0 or step == self.plan.total_steps
        return step > 0 and not rest and is_due

    def _evaluate(self, step: int, log: RunLog | None) -> dict[str, float] | None:
        """Evaluate after this step; return the metrics, or None if the job is asked to stop meanwhile."""
        found = evaluate(
            self.parts.bare,
            self.test_loader,
            num_classes=len(self.parts.images.classes),
            precision=self.parts.precision,
            process=self.process,
            sheet=Sheet(self.parts.images, self.process),
            stopping=lambda: self.manager.stopping,
        )
        if found is None:
            return None
        self.evaluation = found
        self.metrics = found.metrics()
        epoch = step // self.plan.steps_per_epoch
        if log is not None:
            log.write("eval", step=step, values={"epoch": epoch, **self.metrics})
            write_evaluation(log.folder, self.evaluation, step=step, classes=self.parts.images.classes)
        self._tell(Evaluated(step=step, epoch=epoch, metrics=dict(self.metrics)))
        self._say("epoch %d, step %d: %s", epoch, step, _figures(self.metrics))
        return self.metrics

    def _tell(self, event: Event) -> None:
        if self.process.is_first:
            self.audience(replace(event, job=self.manager.job))

    def _say(self, message: str, *values: Any) -> None:
        if self.process.is_first:
            logger.info(message, *values)

    def _result(self, step: int) -> FitResult:
        return FitResult(
            step=step,
            total_steps=self.plan.total_steps,
            metrics=self.metrics,
            preempted=self.manager.preempted,
            complete=step >= self.plan.total_steps and not self.manager.preempted,
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

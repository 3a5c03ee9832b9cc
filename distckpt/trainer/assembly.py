"""The parts of a training, put together from the configuration on this rank.

Invariant: parts built from the same configuration and seed start equal on every rank, and nothing that a fresh build
does differs from what a build that will be restored does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from distckpt.errors import ConfigError
from distckpt.trainer.config import TrainConfig
from distckpt.trainer.datasets import Images, TestSamples, TrainSamples, build_loader
from distckpt.trainer.evaluation import test_batches
from distckpt.trainer.models import build_model, trains_on_one_sample
from distckpt.trainer.optimization import Precision, build_optimizer, build_scheduler
from distckpt.trainer.order import Plan, Position, RankBatches
from distckpt.trainer.process import Process, seed_everything

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a training works with.

    Attributes:
        images: The samples.
        plan: How the run is cut into steps.
        bare: The model without DDP.
        model: The model as it is trained: in DDP if there are several ranks.
        optimizer: Its optimizer.
        scheduler: The learning rate's schedule.
        precision: The number format.
        position: How far the run has come.
    """

    images: Images
    plan: Plan
    bare: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    precision: Precision
    position: Position

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint of this training holds."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.precision.scaler,
            "data": self.position,
        }


def assemble(config: TrainConfig, images: Images, process: Process) -> Parts:
    """Return the parts of a fresh training; random numbers are seeded, by rank, when it returns.

    Raises:
        ConfigError: The model does not exist or does not fit the images.

    Ranks: all (collective), through DDP; blocks until every rank has built its model.
    """
    plan = Plan(
        seed=config.seed,
        num_samples=images.num_train,
        global_batch_size=config.train.global_batch_size,
        epochs=config.train.epochs,
    )
    seed_everything("weights", config.seed)
    bare = build_model(config.model, num_classes=len(images.classes), image_shape=images.shape)
    _check_batch_norm(config, images, plan, process)
    bare = _placed(bare, config, process)
    model = _distributed(bare, config, process, images.shape)
    optimizer = build_optimizer(config.optimizer, bare)
    seed_everything("rank", config.seed, process.rank)
    return Parts(
        images=images,
        plan=plan,
        bare=bare,
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(config.schedule, optimizer, lr=config.optimizer.lr, plan=plan),
        precision=Precision(config.train.precision, process.device),
        position=Position(plan),
    )


def train_batches(parts: Parts, config: TrainConfig, process: Process) -> Iterator[Batch]:
    """Yield this rank's batches, on its device, from the parts' position to the end of the run.

    Ranks: any.
    """
    batches = RankBatches(
        plan=parts.plan,
        done=parts.position.step,
        rank=process.rank,
        world_size=process.world_size,
        accumulate=config.train.accumulate,
    )
    samples = TrainSamples(parts.images, config.seed)
    return on_device(_loader(samples, batches, parts.images, config, process), config, process)


class TestLoader:
    """This rank's test samples, to be gone through again and again; loader processes are kept in between."""

    __test__ = False  # no test for pytest to collect

    def __init__(self, images: Images, config: TrainConfig, process: Process) -> None:
        per_pass = config.train.global_batch_size // (process.world_size * config.train.accumulate)
        batches = test_batches(images.num_test, max(1, per_pass), process)
        self._loader = _loader(TestSamples(images), batches, images, config, process)
        self._config = config
        self._process = process

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, on this rank's device."""
        return on_device(self._loader, self._config, self._process)


def on_device(loader: Any, config: TrainConfig, process: Process) -> Iterator[Batch]:
    """Yield the loader's batches, on this rank's device and in the wanted memory format.

    Ranks: any.
    """
    layout = torch.channels_last if config.train.channels_last else torch.preserve_format
    for images, labels in loader:
        placed = images.to(process.device, non_blocking=True, memory_format=layout)
        if config.train.compile:
            # Else a size would be compiled anew when it comes second, and a resumed run would get other kernels.
            torch._dynamo.maybe_mark_dynamic(placed, 0)
        yield placed, labels.to(process.device, non_blocking=True)


def uncompiled(config: TrainConfig) -> AbstractContextManager[object]:
    """Return a context in which a compiled model runs as it was written.

    Ranks: any.
    """
    return torch.compiler.set_stance("force_eager") if config.train.compile else nullcontext()


def _check_batch_norm(config: TrainConfig, images: Images, plan: Plan, process: Process) -> None:
    """Refuse batches of one for a model that cannot train on them, rather than to fail at the end of an epoch."""
    sizes = plan.batch_sizes(world_size=process.world_size, accumulate=config.train.accumulate)
    if 1 not in sizes or config.train.sync_batchnorm:
        return
    if not trains_on_one_sample(config.model, num_classes=len(images.classes), image_shape=images.shape):
        batch = config.train.global_batch_size
        raise ConfigError(
            source="train.global_batch_size",
            problem=f"{batch} samples a step leave a rank with a single one at times, which the batch norm of "
            f"{config.model.name} cannot train on ({plan.num_samples} samples, {process.world_size} ranks)",
            fix="another train.global_batch_size or number of ranks, or a smaller train.accumulate",
        )


def _loader(samples: Any, batches: Any, images: Images, config: TrainConfig, process: Process) -> Any:
    pin = process.device.type == "cuda"
    return build_loader(samples, batches, shape=images.shape, workers=config.train.workers, pin=pin)


def _placed(model: nn.Module, config: TrainConfig, process: Process) -> nn.Module:
    """Return the model on its device, in the form that the options ask for."""
    if config.train.sync_batchnorm and process.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    layout = torch.channels_last if config.train.channels_last else torch.preserve_format
    model = model.to(process.device, memory_format=layout)  # type: ignore[call-overload]
    if config.train.compile:
        model.compile()  # in place, so that the parameters keep their names
    return model


def _distributed(
    model: nn.Module, config: TrainConfig, process: Process, image_shape: tuple[int, int, int]
) -> nn.Module:
    """Return the model in DDP, its gradient buckets in their final order.

    DDP puts the gradients into buckets anew after its first backward pass, in the order in which they came.
    With three ranks or more, the order of a sum depends on the place in a bucket, so the first step after a resume
    would differ in its last bits from the same step of a run that was never stopped.
    One pass over blank images, whose effects are undone, takes that first pass out of the training.
    """
    if process.world_size == 1:
        return model
    devices = [process.device] if process.device.type == "cuda" else None
    ddp = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    buffers = [buffer.clone() for buffer in model.buffers()]
    blank = torch.zeros(2, *image_shape, device=process.device)
    with Precision(config.train.precision, process.device).autocast(), uncompiled(config):
        logits = ddp(blank)
    logits.float().sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return ddp

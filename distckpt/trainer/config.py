"""The settings of a training: one frozen dataclass per section, each field with its meaning and unit.

The defaults train the digits on two CPU cores.
Invariant: a `TrainConfig` that `Trainer` accepts has passed `check`; every complaint is one line and names the key.
The sections have no slots: jsonargparse reads the defaults of nested dataclasses through `vars`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from distckpt.errors import ConfigError
from distckpt.interval import Every
from distckpt.retention import Retention


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    name: str = "lenet"
    """"lenet", or any torchvision classification model: resnet18, resnet50, vgg16, vit_b_16, ..."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of a torchvision model, such as {dropout: 0.1}."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The samples."""

    name: Literal["digits", "cifar10", "imagefolder", "synthetic"] = "digits"
    """Where samples come from: shipped digits, CIFAR-10, a folder of images with train/ and val/, or made-up noise."""
    root: str = "data"
    """Folder of cifar10 or imagefolder; not used by the others."""
    download: bool = False
    """Whether to download cifar10 into the folder if it is not there."""
    augment: bool = True
    """Whether to vary training images: shifts for digits, crops and flips for cifar10 and imagefolder."""
    image_size: int = 224
    """Height and width, in pixels, of imagefolder and synthetic images."""
    num_classes: int = 1000
    """Number of classes of synthetic data; the other data sets know their own."""
    num_train: int = 10000
    """Number of synthetic training samples."""
    num_test: int = 1000
    """Number of synthetic test samples."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients change the weights."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = 0.05
    """Highest learning rate, reached at the end of the warm-up; for the global batch, not for that of a rank."""
    momentum: float = 0.9
    """Momentum of SGD, from 0 to less than 1."""
    nesterov: bool = False
    """Whether SGD looks ahead (Nesterov momentum)."""
    weight_decay: float = 5e-4
    """Pull of every parameter towards zero: added to the gradient by SGD, decoupled in AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two running averages, each from 0 to less than 1."""
    eps: float = 1e-8
    """AdamW's guard against division by zero."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate changes over the run; if more epochs are asked for later, it is computed anew."""

    name: Literal["cosine", "step", "constant"] = "cosine"
    """Half a cosine from the highest rate down to `final_lr`, steps down by `gamma`, or no change."""
    warmup_steps: int = 30
    """Optimizer steps in which the rate grows linearly to its highest value."""
    final_lr: float = 0.0
    """Learning rate at the end of a cosine."""
    step_epochs: int = 30
    """Epochs between two steps down."""
    gamma: float = 0.1
    """Factor of each step down."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The training loop."""

    epochs: int = 30
    """Number of passes over the training samples."""
    global_batch_size: int = 64
    """Samples per optimizer step, over all ranks together, whatever their number."""
    accumulate: int = 1
    """Number of forward and backward passes that share one optimizer step; splits the batch to save memory."""
    clip_grad_norm: float | None = None
    """Largest norm of all gradients together; null for no clipping."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of most computations; parameters stay fp32. fp16 needs a GPU, and scales the loss."""
    compile: bool = False
    """Whether to compile the model with torch.compile."""
    channels_last: bool = False
    """Whether to keep images channels-last in memory, which is quicker for convolutions on GPUs."""
    sync_batchnorm: bool = False
    """Whether batch norm uses the statistics of all ranks together; needs GPUs."""
    deterministic: bool = False
    """Whether to refuse kernels that may differ from run to run; on GPUs an exact resume needs it."""
    workers: int = 0
    """Processes per rank that load samples; 0 loads in the training process."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for another in a step at most; then it fails, and its launcher may start all again."""
    log_every: int = 10
    """Optimizer steps between two lines of the training log."""
    eval_every: int = 1
    """Epochs between two evaluations on the test samples; the last epoch is always followed by one."""
    log_dir: str | None = None
    """Local folder of log.jsonl and the TensorBoard files; null for the checkpoint directory, if that is local."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where and when the run is saved."""

    directory: str = "runs/digits"
    """Path or URL that holds the run's checkpoints."""
    at: int | None = None
    """Step of the checkpoint that a new branch goes on from; restarts of the branch may leave it out."""
    branch: str | None = None
    """Go on in the branch of this name, <directory>/branches/<name>, and leave what came after that step as it is."""
    every: int | str | None = None
    """Optimizer steps between two checkpoints, or a time such as 90s, 10min or 2h, or auto for what loses least time.

    null for one at the end of each epoch.
    """
    mtbf_s: float | None = None
    """Mean time between failures of the job, in seconds, for auto; null estimates it from the run's history."""
    grace_s: float | None = None
    """Seconds from a signal until the launcher kills; null for what torchrun says, where it forwarded the signal."""
    ends_at: float | None = None
    """When the allocation ends, in seconds since 1970; the run saves and stops in time. null for what Slurm says."""
    when_busy: Literal["wait", "skip", "raise"] = "wait"
    """What a save does while the one before is still being written; the last one of a run always waits."""
    keep: int | Retention = 3
    """How many of the newest to keep, or rules: {last, best, metric, mode, every, within_s}.

    With a metric ("val/loss", "val/top1", "val/top5") every evaluation is followed by a checkpoint.
    """
    check_replicas: Literal["off", "warn", "error"] = "warn"
    """What happens if ranks differ in what data-parallel training keeps the same: nothing is compared, a warning, or
    the checkpoint is refused."""
    check_finite: Literal["off", "warn", "error"] = "warn"
    """What happens if parameters or optimizer states hold NaN or infinities: nobody looks, a warning, or the checkpoint
    is refused."""
    layout: Literal["sharded", "full"] = "sharded"
    """All ranks write their share, or rank 0 writes everything."""
    background: bool = True
    """Whether training goes on while a checkpoint is written."""
    memory_tier: bool = False
    """Whether each node also keeps what its ranks write of the newest checkpoint in /dev/shm, to restart from it after
    a crash without reading the storage."""
    timeout_s: float = 1800.0
    """Longest wait for storage and for other ranks, in seconds."""
    storage_options: dict[str, Any] | None = None
    """Options of the storage's fsspec file system, such as {endpoint_url: ...}; never logged nor stored."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training."""

    seed: int = 0
    """Seed of initial weights, order of samples and augmentation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """The samples."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How gradients change the weights."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate changes over the run."""
    train: LoopConfig = field(default_factory=LoopConfig)
    """The training loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Where and when the run is saved."""

    def as_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values, without `checkpoint.storage_options`, which may hold secrets."""
        plain = dataclasses.asdict(self)
        plain["optimizer"]["betas"] = list(self.optimizer.betas)
        del plain["checkpoint"]["storage_options"]
        return plain


def check(config: TrainConfig, source_of: Callable[[str], str] = lambda _: "TrainConfig") -> None:
    """Return if every value is in range.

    Args:
        config: The settings.
        source_of: Tells where the value of a dotted key came from, for the error.

    Raises:
        ConfigError: A value is out of range; names the first.
    """
    for key, holds, rule in _rules(config):
        if not holds:
            raise ConfigError(source=source_of(key), problem=f"{key} must be {rule}, is {_value_of(config, key)!r}")


def _value_of(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _rules(config: TrainConfig) -> Iterator[tuple[str, bool, str]]:
    """Yield (key, whether its value is in range, the rule in words)."""
    data, optimizer, schedule = config.data, config.optimizer, config.schedule
    train, checkpoint = config.train, config.checkpoint
    yield "seed", 0 <= config.seed < 2**63, "from 0 to 2^63 - 1"
    yield "model.name", bool(config.model.name), "the name of a model"
    yield "data.image_size", data.image_size >= 1, "at least 1 pixel"
    yield "data.num_classes", data.num_classes >= 2, "at least 2"
    yield "data.num_train", data.num_train >= 1, "at least 1"
    yield "data.num_test", data.num_test >= 1, "at least 1"
    yield "optimizer.lr", 0 < optimizer.lr < float("inf"), "more than 0"
    yield "optimizer.momentum", 0 <= optimizer.momentum < 1, "from 0 to less than 1"
    yield "optimizer.nesterov", not optimizer.nesterov or optimizer.momentum > 0, "false without momentum"
    yield "optimizer.weight_decay", 0 <= optimizer.weight_decay < float("inf"), "0 or more"
    yield "optimizer.betas", all(0 <= beta < 1 for beta in optimizer.betas), "from 0 to less than 1"
    yield "optimizer.eps", 0 < optimizer.eps < 1, "more than 0 and less than 1"
    yield "schedule.warmup_steps", schedule.warmup_steps >= 0, "0 steps or more"
    yield "schedule.final_lr", 0 <= schedule.final_lr <= optimizer.lr, "from 0 to optimizer.lr"
    yield "schedule.step_epochs", schedule.step_epochs >= 1, "at least 1 epoch"
    yield "schedule.gamma", 0 < schedule.gamma <= 1, "more than 0 and at most 1"
    yield "train.epochs", train.epochs >= 1, "at least 1"
    yield "train.global_batch_size", train.global_batch_size >= 1, "at least 1 sample"
    yield "train.accumulate", 1 <= train.accumulate <= train.global_batch_size, "from 1 to train.global_batch_size"
    yield "train.clip_grad_norm", train.clip_grad_norm is None or train.clip_grad_norm > 0, "more than 0, or null"
    yield "train.workers", train.workers >= 0, "0 or more"
    yield "train.log_every", train.log_every >= 1, "at least 1 step"
    yield "train.eval_every", train.eval_every >= 1, "at least 1 epoch"
    yield "train.log_dir", train.log_dir is None or "://" not in train.log_dir, "a local folder"
    yield "checkpoint.directory", bool(checkpoint.directory), "a path or URL"
    yield "checkpoint.at", checkpoint.at is None or checkpoint.at >= 0, "a step, from 0 on, or null"
    yield "checkpoint.at", checkpoint.at is None or checkpoint.branch is not None, "null without checkpoint.branch"
    yield "checkpoint.every", _is_every(checkpoint.every), "at least 1 step, a time such as 10min, auto, or null"
    yield "checkpoint.mtbf_s", _is_time(checkpoint.mtbf_s), "more than 0 s, or null"
    yield "checkpoint.grace_s", _is_time(checkpoint.grace_s), "more than 0 s, or null"
    yield "checkpoint.ends_at", _is_time(checkpoint.ends_at), "a time in seconds since 1970, or null"
    keep = checkpoint.keep
    yield "checkpoint.keep", isinstance(keep, Retention) or keep >= 1, "at least 1"
    yield "train.timeout_s", 0 < train.timeout_s < float("inf"), "more than 0 s"
    yield "checkpoint.timeout_s", 0 < checkpoint.timeout_s < float("inf"), "more than 0 s"


def _is_time(value: float | None) -> bool:
    return value is None or 0 < value < float("inf")


def _is_every(every: int | str | None) -> bool:
    try:
        Every.of(every)
    except ConfigError:
        return False
    return True

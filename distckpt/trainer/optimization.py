"""Optimizer, learning rate and precision, from the configuration.

Invariant: the learning rate is a pure function of the configuration and the steps completed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from distckpt.errors import ConfigError
from distckpt.trainer.config import LoopConfig, OptimizerConfig, ScheduleConfig
from distckpt.trainer.order import Plan


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters of a model.

    Ranks: any.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def build_scheduler(config: ScheduleConfig, optimizer: torch.optim.Optimizer, *, lr: float, plan: Plan) -> LambdaLR:
    """Return the scheduler, to be stepped once per optimizer step.

    Ranks: any.
    """
    scheduler = LambdaLR(optimizer, _factor(config, lr, plan))
    optimizer.step()  # no gradients, no change; else a first step that fp16 skips brings the scheduler's warning
    return scheduler


def apply_settings(config: OptimizerConfig, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
    """Let the configuration, not the restored checkpoint, decide rates and decays.

    Changes nothing, to the bit, if the configuration is the one that the checkpoint was saved with.

    Ranks: any.
    """
    scheduler.base_lrs = [config.lr for _ in scheduler.base_lrs]
    rates = [config.lr * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = list(rates)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"], group["initial_lr"], group["weight_decay"] = rate, config.lr, config.weight_decay
        if config.name == "adamw":
            group["betas"], group["eps"] = config.betas, config.eps
        else:
            group["momentum"], group["nesterov"] = config.momentum, config.nesterov


def _factor(config: ScheduleConfig, lr: float, plan: Plan) -> Callable[[int], float]:
    """Return the function from steps completed to the factor of the highest learning rate."""
    warmup = min(config.warmup_steps, plan.total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        match config.name:
            case "cosine":
                done = min(1.0, (step - warmup) / max(1, plan.total_steps - warmup))
                floor = config.final_lr / lr
                return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
            case "step":
                epoch = step // plan.steps_per_epoch
                return float(config.gamma ** (epoch // config.step_epochs))
            case "constant":
                return 1.0

    return factor


class Precision:
    """The number format of forward and backward passes.

    Attributes:
        scaler: Scales the loss for fp16; does nothing otherwise.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self._device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for a forward pass.

        Ranks: any.
        """
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)


def check_device(config: LoopConfig, device: torch.device) -> None:
    """Return if the device can do what the configuration asks for.

    Raises:
        ConfigError: It cannot.

    Ranks: any.
    """
    if device.type == "cuda":
        return
    if config.precision == "fp16":
        raise ConfigError(source="train.precision", problem="fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if config.sync_batchnorm:
        raise ConfigError(source="train.sync_batchnorm", problem="needs GPUs; leave it false on a CPU")

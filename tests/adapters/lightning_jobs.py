"""What ranks run in the tests of the Lightning callbacks: top-level functions, sent by name."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from distckpt import CheckpointManager

SAMPLES, BATCH = 48, 4


class Crash(Exception):
    """What ends a training in its middle."""


def quiet() -> None:
    """Lightning warns about what these tests do on purpose: few batches, no workers, no logger."""
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def module(package: str) -> Any:
    """Return a module whose result depends on order, generators, schedulers and validation, as a run's may."""
    pl = importlib.import_module(package)

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"width": 8, "loss": torch.nn.functional.mse_loss})
            self.model = torch.nn.Sequential(
                torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
            )
            self.seen: list[int] = []
            self.crash_at = self.preempt_at = 0
            self.count = self.validations = 0

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            if self.crash_at and self.global_step >= self.crash_at:
                raise Crash
            is_asked = self.global_rank == self.trainer.world_size - 1
            if is_asked and self.global_step == self.preempt_at - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            self.seen += batch[:, 0].int().tolist()
            self.count += 1
            return self.model(batch / SAMPLES + torch.randn_like(batch) * 0.01).square().mean()

        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            self.log("val/loss", self.model(batch / SAMPLES).square().mean(), sync_dist=True)

        def on_validation_end(self) -> None:
            self.validations += not self.trainer.sanity_checking

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["count"] = self.count

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.count = checkpoint["count"]

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": scheduler, "interval": "epoch"}]

    return Net()


def fit(
    package: str,
    directory: str,
    *,
    crash_at: int = 0,
    preempt_at: int = 0,
    workers: int = 0,
    validation: bool = True,
    own_sampler: bool = True,
    every: int = 5,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Train or go on, and return everything that two runs may be compared by."""
    quiet()
    pl = importlib.import_module(package)
    adapter = importlib.import_module(f"distckpt.adapters.{package.partition('.')[0]}")
    torch.manual_seed(seed)
    net = module(package)
    net.crash_at, net.preempt_at = crash_at, preempt_at
    numbers = torch.arange(SAMPLES, dtype=torch.float).reshape(-1, 1).repeat(1, 3)
    sampler = DistributedSampler(numbers) if dist.is_initialized() and own_sampler else None
    loader = StatefulDataLoader(
        numbers, batch_size=BATCH, shuffle=sampler is None, sampler=sampler, num_workers=workers
    )
    stopping = importlib.import_module(f"{package}.callbacks").EarlyStopping("val/loss", patience=1000)
    checkpoints = CheckpointManager(directory, every=every, keep=100)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if dist.is_initialized() else 1,
        strategy="ddp" if dist.is_initialized() else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        callbacks=[adapter.DistckptCallback(checkpoints), *([stopping] if validation else [])],
        **options,
    )
    val = torch.utils.data.DataLoader(numbers[:8], batch_size=4) if validation else None
    crashed, handler = False, signal.getsignal(signal.SIGTERM)
    try:
        trainer.fit(net, loader, val)
    except Crash:
        crashed = True
    return {
        "crashed": crashed,
        "handlers_are_back": signal.getsignal(signal.SIGTERM) is handler,
        "preempted": checkpoints.preempted,
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "seen": net.seen,
        "count": net.count,
        "validations": net.validations,
        "model": {name: value.clone() for name, value in net.state_dict().items()},
        "optimizer": [value["exp_avg"].clone() for value in trainer.optimizers[0].state.values()],
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "stopping": stopping.state_dict(),  # counts the validations that did not get better
        "random": torch.rand(2),
    }


def fit_with_unknown_strategy(package: str, directory: str) -> None:
    """Fit with a strategy that the callback knows nothing of."""
    quiet()
    pl = importlib.import_module(package)
    adapter = importlib.import_module(f"distckpt.adapters.{package.partition('.')[0]}")

    class Elsewhere(importlib.import_module(f"{package}.strategies").SingleDeviceStrategy):
        pass

    trainer = pl.Trainer(
        strategy=Elsewhere(device=torch.device("cpu")),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[adapter.DistckptCallback(CheckpointManager(directory, every=5))],
    )
    trainer.fit(module(package), torch.utils.data.DataLoader(torch.zeros(8, 3), batch_size=4))


def fit_and_listen(package: str, directory: str, **options: Any) -> str:
    """Train, and return what distckpt has logged."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("distckpt")
    logger.addHandler(handler)
    try:
        fit(package, directory, **options)
    finally:
        logger.removeHandler(handler)
    return "\n".join(heard)

"""Evaluation on the test samples: loss, top-1, top-5 and accuracy by class, exact over ranks.

Invariant: every test sample is counted once, whatever the number of ranks; the training is left as it was, its random
numbers included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from distckpt.trainer.optimization import Precision
from distckpt.trainer.order import share
from distckpt.trainer.process import Process


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model does on the test samples.

    Attributes:
        loss: Mean cross-entropy.
        top1: Fraction of samples whose class is the model's first choice.
        top5: Fraction of samples whose class is among the first five choices.
        num_samples: Samples by class.
        num_right: Samples by class whose class is the first choice.
    """

    loss: float
    top1: float
    top5: float
    num_samples: tuple[int, ...]
    num_right: tuple[int, ...]

    def metrics(self) -> dict[str, float]:
        """Return the figures over all classes, by the names under which they are logged and stored."""
        return {"val/loss": self.loss, "val/top1": self.top1, "val/top5": self.top5}


def test_batches(num_test: int, batch_size: int, process: Process) -> list[list[int]]:
    """Return the indices of this rank's test samples, batch by batch; the ranks' together are all, each once.

    Ranks: any.
    """
    mine = share(0, num_test, process.rank, process.world_size)
    return [list(mine[start : start + batch_size]) for start in range(0, len(mine), batch_size)]


test_batches.__test__ = False  # type: ignore[attr-defined]  # no test for pytest to collect


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    num_classes: int,
    precision: Precision,
    process: Process,
    stopping: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Return how the model does on the test samples of all ranks together; None if it was broken off.

    Args:
        model: The model without DDP; its buffers become those of rank 0, as the next training step would have it.
        batches: Images and labels of this rank, on `process.device`.
        num_classes: Number of logits.
        precision: The number format of the forward passes.
        process: This rank.
        stopping: Says whether to break off; asked before each batch. If it says so on one rank, none has a result.

    Ranks: all (collective); blocks until every rank has done its samples, or has broken off.
    """
    if process.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
    counts = torch.zeros(3, num_classes, dtype=torch.int64, device=process.device)  # samples, first choice, first five
    loss = torch.zeros((), dtype=torch.float64, device=process.device)
    broken = torch.zeros((), dtype=torch.int64, device=process.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for images, labels in batches:
            if stopping():
                broken += 1
                break
            with precision.autocast():
                logits = model(images)
            loss += functional.cross_entropy(logits.float(), labels, reduction="none").double().sum()
            counts += _count(logits, labels, num_classes)
    model.train(was_training)
    if process.world_size > 1:
        dist.all_reduce(counts)
        dist.all_reduce(loss)
        dist.all_reduce(broken)
    if broken.item():
        return None
    num_samples, first, five = counts.tolist()
    total = sum(num_samples)
    return Evaluation(
        loss=loss.item() / total,
        top1=sum(first) / total,
        top5=sum(five) / total,
        num_samples=tuple(num_samples),
        num_right=tuple(first),
    )


def _count(logits: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return [3, classes]: samples, those whose class is the first choice, those where it is among the first five."""
    choices = logits.topk(min(5, num_classes), dim=1).indices  # [batch, 5]
    hits = choices == labels.unsqueeze(1)
    weights = torch.stack([torch.ones_like(labels), hits[:, 0].long(), hits.any(dim=1).long()])  # [3, batch]
    counts = torch.zeros(3, num_classes, dtype=torch.int64, device=labels.device)
    return counts.index_add_(1, labels, weights)

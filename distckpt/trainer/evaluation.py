"""Evaluation on the test samples: loss, top-1, top-5, accuracy by class and what is taken for what; exact over ranks.

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
from distckpt.trainer.sheet import Picture, Sheet

MOST_CONFUSED = 1_000  # classes; the counts of so many take 8 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model does on the test samples.

    Attributes:
        loss: Mean cross-entropy.
        top1: Fraction of samples whose class is the model's first choice.
        top5: Fraction of samples whose class is among the first five choices.
        num_samples: Samples by class.
        num_right: Samples by class whose class is the first choice.
        confusion: (class, first choice, samples), where there are any; None if there are too many classes to count it.
        pictures: The samples that say most; on rank 0 alone, if they were asked for.
    """

    loss: float
    top1: float
    top5: float
    num_samples: tuple[int, ...]
    num_right: tuple[int, ...]
    confusion: tuple[tuple[int, int, int], ...] | None = None
    pictures: tuple[Picture, ...] = ()

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
    sheet: Sheet | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Return how the model does on the test samples of all ranks together; None if it was broken off.

    Args:
        model: The model without DDP; its buffers become those of rank 0, as the next training step would have it.
        batches: Images and labels of this rank, on `process.device`.
        num_classes: Number of logits.
        precision: The number format of the forward passes.
        process: This rank.
        sheet: Picks the samples that say most, if given.
        stopping: Says whether to break off; asked before each batch. If it says so on one rank, none has a result.

    Ranks: all (collective); blocks until every rank has done its samples, or has broken off.
    """
    if process.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
    tally = _Tally(num_classes, process)
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
            choices = logits.topk(min(5, num_classes), dim=1).indices  # [batch, 5]
            tally.count(choices, labels)
            if sheet is not None:
                sheet.see(images, labels, logits=logits.float(), choices=choices[:, 0])
    model.train(was_training)
    tally.share()
    if process.world_size > 1:
        dist.all_reduce(loss)
        dist.all_reduce(broken)
    if broken.item():
        return None
    num_samples, first, five = tally.by_class.tolist()
    total = sum(num_samples)
    return Evaluation(
        loss=loss.item() / total,
        top1=sum(first) / total,
        top5=sum(five) / total,
        num_samples=tuple(num_samples),
        num_right=tuple(first),
        confusion=tally.confusion(),
        pictures=() if sheet is None else sheet.pictures(),
    )


class _Tally:
    """Counts samples by class, and by class and first choice; all on the device.

    Attributes:
        by_class: [3, classes]: samples, those whose class is the first choice, those where it is among the first five.
    """

    def __init__(self, num_classes: int, process: Process) -> None:
        self._num_classes = num_classes
        self._process = process
        self.by_class = torch.zeros(3, num_classes, dtype=torch.int64, device=process.device)
        num_pairs = num_classes**2 if num_classes <= MOST_CONFUSED else 0
        self._pairs = torch.zeros(num_pairs, dtype=torch.int64, device=process.device)

    def count(self, choices: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: first choices [batch, 5], and labels [batch]."""
        hits = choices == labels.unsqueeze(1)
        ones = torch.ones_like(labels)
        self.by_class.index_add_(1, labels, torch.stack([ones, hits[:, 0].long(), hits.any(dim=1).long()]))
        if len(self._pairs):
            self._pairs.index_add_(0, labels * self._num_classes + choices[:, 0], ones)

    def share(self) -> None:
        """Add the counts of all ranks."""
        if self._process.world_size > 1:
            dist.all_reduce(self.by_class)
            dist.all_reduce(self._pairs)

    def confusion(self) -> tuple[tuple[int, int, int], ...] | None:
        """Return (class, first choice, samples) for each pair that occurs; None if they were not counted."""
        if not len(self._pairs):
            return None
        found = self._pairs.nonzero().squeeze(1)
        counts = self._pairs[found].tolist()
        return tuple(
            (*divmod(place, self._num_classes), count) for place, count in zip(found.tolist(), counts, strict=True)
        )

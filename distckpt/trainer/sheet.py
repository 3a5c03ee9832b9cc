"""The sheet: the few test samples that say most about a classifier, as pictures.

The mistakes that the model is surest of come first, then the hits that it is least sure of.
Invariant: the same model and samples give the same sheet; samples that tell equally much may change places with the
number of ranks.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
import torch.distributed as dist
from PIL import Image
from torch.nn import functional

from distckpt.trainer.datasets import Images
from distckpt.trainer.process import Process

NUM_SAMPLES = 24
MOST_PIXELS = 96  # on a side, so that a sheet takes less than a megabyte
_NOBODY = -1.0  # the rating of a place that no sample has taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One sample.

    Attributes:
        png: The picture's file.
        true: Its class.
        predicted: The class that the model takes it for.
        probability: How sure the model is of that, from 0 to 1.
    """

    png: bytes
    true: int
    predicted: int
    probability: float


class Sheet:
    """Finds the samples, batch by batch, without waiting for the device.

    Args:
        images: The data set.
        process: This rank.
        size: How many samples to keep.
    """

    def __init__(self, images: Images, process: Process, *, size: int = NUM_SAMPLES) -> None:
        self._process = process
        self._size = size
        self._mean, self._std = images.mean, images.std
        device = process.device
        self._images = torch.empty(0, *images.shape, device=device)
        self._facts = torch.empty(0, 4, dtype=torch.float64, device=device)  # rating, true, predicted, probability

    def see(self, images: torch.Tensor, labels: torch.Tensor, *, logits: torch.Tensor, choices: torch.Tensor) -> None:
        """Look at a batch, and keep what tells most.

        Args:
            images: [batch, channels, height, width].
            labels: [batch]
            logits: [batch, classes] float32.
            choices: [batch]: the class that the model takes each for.

        Ranks: any.
        """
        sure = logits.softmax(dim=1).gather(1, choices.unsqueeze(1)).squeeze(1).double().nan_to_num(0.0)
        rating = torch.where(choices != labels, 1.0 + sure, 1.0 - sure)
        facts = torch.stack([rating, labels.double(), choices.double(), sure], dim=1)
        chosen = rating.argsort(descending=True, stable=True)[: self._size]
        facts = torch.cat([self._facts, facts[chosen]])
        pixels = torch.cat([self._images, images[chosen].float()])
        chosen = facts[:, 0].argsort(descending=True, stable=True)[: self._size]
        self._facts, self._images = facts[chosen], pixels[chosen]

    def pictures(self) -> tuple[Picture, ...]:
        """Return the samples of all ranks that tell most; on rank 0 alone, nothing elsewhere.

        Ranks: all (collective); blocks until every rank has done its samples.
        """
        facts, pixels = self._agreed(self._facts, self._shrunk())
        if not self._process.is_first:
            return ()
        return tuple(
            Picture(
                png=_png(picture),
                true=int(true),
                predicted=int(predicted),
                probability=min(1.0, probability),
            )
            for (rating, true, predicted, probability), picture in zip(facts.tolist(), pixels.cpu(), strict=True)
            if rating != _NOBODY
        )

    def _agreed(self, facts: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the facts [size, 4] and pictures [size, 3, height, width] that tell most, in order, on every rank."""
        if self._process.world_size == 1:
            return facts, pixels
        room = self._size - len(facts)
        facts = functional.pad(facts, (0, 0, 0, room), value=_NOBODY)
        everyones = [torch.empty_like(facts) for _ in range(self._process.world_size)]
        dist.all_gather(everyones, facts)
        ratings = torch.cat(everyones)[:, 0]
        chosen = ratings.argsort(descending=True, stable=True)[: self._size]
        together = torch.zeros(self._size, *pixels.shape[1:], dtype=torch.uint8, device=self._process.device)
        first = self._process.rank * self._size
        mine = (chosen >= first) & (chosen < first + self._size - room)
        together[mine] = pixels[chosen[mine] - first]
        dist.all_reduce(together)  # every place is one rank's, and zero on all others
        return torch.cat(everyones)[chosen], together

    def _shrunk(self) -> torch.Tensor:
        """Return this rank's samples as pictures [samples, 3, height, width] uint8, on its device."""
        mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (self._mean, self._std))
        shown = (self._images.cpu() * std + mean).nan_to_num(0.0).clamp(0, 1)
        height, width = shown.shape[-2:]
        scale = MOST_PIXELS / max(height, width)
        if scale < 1 and len(shown):
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            shown = functional.interpolate(shown, size=size, mode="bilinear", antialias=True)
        elif scale < 1:
            shown = shown.new_empty(0, shown.shape[1], max(1, round(height * scale)), max(1, round(width * scale)))
        pixels = shown.mul(255).round().to(torch.uint8)
        return pixels.expand(-1, 3, -1, -1).to(self._process.device)


def _png(pixels: torch.Tensor) -> bytes:
    """Return a picture [3, height, width] uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return file.getvalue()

"""Which samples the trainer keeps as pictures, and the file that they go to."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rank_pool import RankPools

from distckpt.logfolder import EVALUATION_NAME
from distckpt.report.evaluations import parse_evaluation
from distckpt.trainer.datasets import Images
from distckpt.trainer.evaluation import Evaluation, evaluate, test_batches
from distckpt.trainer.evaluation_file import write_evaluation
from distckpt.trainer.optimization import Precision
from distckpt.trainer.process import Process, joined
from distckpt.trainer.sheet import MOST_PIXELS, Picture, Sheet

NUM_TEST, NUM_CLASSES = 61, 5
ALONE = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def data_set(shape: tuple[int, int, int] = (3, 4, 4)) -> Images:
    nothing: list[tuple[torch.Tensor, int]] = []
    return Images(
        train=nothing,
        test=nothing,
        train_transform=lambda image: image,
        test_transform=lambda image: image,
        classes=tuple("abcde"),
        shape=shape,
    )


class Shade(torch.nn.Module):
    """Takes a picture for the class that its shade says, the surer the brighter its corner."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        classes = ((images[:, 0, 1, 1] + 1) / 2 * NUM_CLASSES).long().clamp(0, NUM_CLASSES - 1)
        return torch.nn.functional.one_hot(classes, NUM_CLASSES) * (images[:, :1, 0, 0] + 2) * 3


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(2)
    images = torch.rand(NUM_TEST, 3, 4, 4, generator=chance) * 2 - 1
    labels = Shade()(images).argmax(1)
    labels[::7] = (labels[::7] + 1) % NUM_CLASSES  # nine mistakes
    return images, labels


def evaluated(process: Process, *, batch_size: int = 6, size: int = 12) -> Evaluation:
    images, labels = samples()
    batches = ((images[indices], labels[indices]) for indices in test_batches(NUM_TEST, batch_size, process))
    return evaluate(
        Shade(),
        batches,
        num_classes=NUM_CLASSES,
        precision=Precision("fp32", process.device),
        process=process,
        sheet=Sheet(data_set(), process, size=size),
    )


def evaluate_on_ranks() -> Evaluation:
    with joined(timeout_s=60) as process:
        return evaluated(process)


def test_mistakes_come_first_the_surest_of_them_at_the_head() -> None:
    pictures = evaluated(ALONE).pictures
    wrong = [picture.true != picture.predicted for picture in pictures]
    assert wrong == [True] * 9 + [False] * 3
    mistakes, hits = [one.probability for one in pictures[:9]], [one.probability for one in pictures[9:]]
    assert mistakes == sorted(mistakes, reverse=True)
    assert hits == sorted(hits)
    assert all(0 < one.probability <= 1 for one in pictures)


def test_a_sheet_does_not_depend_on_how_the_samples_came() -> None:
    assert evaluated(ALONE, batch_size=1).pictures == evaluated(ALONE, batch_size=100).pictures


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_agree_on_one_sheet_and_one_confusion(ranks: RankPools, num_ranks: int) -> None:
    alone = evaluated(ALONE)
    first, *others = ranks(num_ranks).run(evaluate_on_ranks)
    assert first.pictures == alone.pictures
    assert [other.pictures for other in others] == [()] * (num_ranks - 1)
    assert all(found.confusion == alone.confusion for found in (first, *others))


def test_the_confusion_counts_every_sample_once() -> None:
    found = evaluated(ALONE)
    assert found.confusion is not None
    assert sum(count for _, _, count in found.confusion) == NUM_TEST
    right = {true: count for true, predicted, count in found.confusion if true == predicted}
    assert tuple(right.get(label, 0) for label in range(NUM_CLASSES)) == found.num_right


def test_fewer_samples_than_places_are_all_there() -> None:
    assert len(evaluated(ALONE, size=100).pictures) == NUM_TEST
    assert Sheet(data_set(), ALONE).pictures() == ()


def seen(images: torch.Tensor, shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Return the picture of one image: [height, width, 3]."""
    sheet = Sheet(data_set(shape), ALONE)
    logits = torch.zeros(len(images), NUM_CLASSES)
    sheet.see(images, torch.zeros(len(images), dtype=torch.int64), logits=logits, choices=logits.argmax(1))
    [picture] = sheet.pictures()
    return np.asarray(Image.open(io.BytesIO(picture.png)))


def test_a_picture_has_the_shades_of_its_sample() -> None:
    image = torch.tensor([-1.0, 0.0, 1.0, 5.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert seen(image, (3, 2, 2)).tolist() == [[[0] * 3, [128] * 3], [[255] * 3] * 2]


def test_a_grey_sample_and_a_large_one_become_small_pictures_in_colour() -> None:
    assert seen(torch.zeros(1, 1, 500, 250), (1, 500, 250)).shape == (MOST_PIXELS, MOST_PIXELS // 2, 3)


def test_logits_that_are_not_finite_are_still_shown() -> None:
    sheet = Sheet(data_set(), ALONE)
    logits = torch.full((2, NUM_CLASSES), float("nan"))
    sheet.see(torch.full((2, 3, 4, 4), float("nan")), torch.tensor([1, 0]), logits=logits, choices=torch.tensor([0, 0]))
    assert [(one.true, one.probability) for one in sheet.pictures()] == [(1, 0.0), (0, 0.0)]


def test_the_file_says_what_was_evaluated(tmp_path: Path) -> None:
    found = evaluated(ALONE)
    write_evaluation(tmp_path, found, step=40, classes=data_set().classes)
    record = parse_evaluation(json.loads((tmp_path / EVALUATION_NAME).read_text()))
    assert (record.step, record.classes) == (40, tuple("abcde"))
    assert (record.num_samples, record.num_right) == (found.num_samples, found.num_right)
    assert record.accuracy == found.top1
    assert [sample.true for sample in record.samples] == [picture.true for picture in found.pictures]
    assert [file.name for file in tmp_path.iterdir()] == [EVALUATION_NAME]


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = Picture(png=b"", true=0, predicted=0, probability=1.0)
    found = Evaluation(loss=0.0, top1=1.0, top5=1.0, num_samples=(1,), num_right=(1,), pictures=(picture,))
    with caplog.at_level(logging.WARNING):
        write_evaluation(tmp_path / "nowhere", found, step=1, classes=("a",))
    assert "could not be written: No such file" in caplog.text

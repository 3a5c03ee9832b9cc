"""The record of an evaluation: what `evaluation.json` says, checked.

    {"format": 1, "step": 690, "classes": ["0", "1", ...],
     "num_samples": [36, 36, ...], "num_right": [36, 35, ...],
     "confusion": [[true class, predicted class, samples], ...] or null,
     "samples": [{"png": base64, "true": 3, "predicted": 8, "probability": 0.98}, ...]}

Classes are numbered from 0; "confusion" names the pairs that occur, and is null where classes are too many for it.
"samples" are pictures: the mistakes that the model is surest of, then the hits that it is least sure of.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

FORMAT = 1
MOST_CLASSES = 100_000
MOST_SAMPLES = 100
MOST_PNG_BYTES = 1 << 18
MOST_PIXELS = 1024  # on a side: a small file can hold a picture that fills all memory
_PNG = b"\x89PNG\r\n\x1a\n"
_SHOWN_CHARS = 120  # of a class's name


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture.

    Attributes:
        png: The picture's file, in base64.
        true: Its class.
        predicted: The class that the model takes it for.
        probability: How sure the model is of that, from 0 to 1.
    """

    png: str
    true: int
    predicted: int
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """One evaluation of a classifier.

    Attributes:
        step: Optimizer steps completed before it.
        classes: The classes' names.
        num_samples: Samples by true class.
        num_right: Of these, the ones that the model takes for what they are.
        confusion: Samples by true and predicted class, where there are any; None if it was not counted.
        samples: Pictures.
    """

    step: int
    classes: tuple[str, ...]
    num_samples: tuple[int, ...]
    num_right: tuple[int, ...]
    confusion: dict[tuple[int, int], int] | None
    samples: tuple[Sample, ...]

    @property
    def accuracy(self) -> float:
        """The share of all samples that the model is right about."""
        return sum(self.num_right) / max(1, sum(self.num_samples))


def parse_evaluation(body: Any) -> EvaluationRecord:
    """Return the record that a JSON value holds.

    Raises:
        ValueError: It holds none, or contradicts itself.
    """
    try:
        if body["format"] != FORMAT:
            raise ValueError(f"has the format {body['format']!r:.40}")
        classes = tuple(_text(name) for name in body["classes"])
        if not 1 <= len(classes) <= MOST_CLASSES:
            raise ValueError(f"has {len(classes)} classes")
        num_samples = tuple(_whole(number) for number in body["num_samples"])
        num_right = tuple(_whole(number) for number in body["num_right"])
        if not len(num_samples) == len(num_right) == len(classes):
            raise ValueError("has counts of other classes")
        if any(right > all_ for right, all_ in zip(num_right, num_samples, strict=True)):
            raise ValueError("is right more often than there are samples")
        return EvaluationRecord(
            step=_whole(body["step"]),
            classes=classes,
            num_samples=num_samples,
            num_right=num_right,
            confusion=None if body["confusion"] is None else _confusion(body["confusion"], len(classes)),
            samples=tuple(_sample(sample, len(classes)) for sample in body["samples"][:MOST_SAMPLES]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is no evaluation: {error!r:.80}") from error


def _confusion(body: Any, num_classes: int) -> dict[tuple[int, int], int]:
    return {
        (_whole(true, below=num_classes), _whole(predicted, below=num_classes)): _whole(number)
        for true, predicted, number in body
    }


def _sample(body: Any, num_classes: int) -> Sample:
    png, probability = body["png"], body["probability"]
    try:
        picture = base64.b64decode(png, validate=True)
    except binascii.Error as error:
        raise ValueError("has a picture that is no base64") from error
    if not picture.startswith(_PNG) or len(picture) > MOST_PNG_BYTES:
        raise ValueError("has a picture that is no PNG, or too large a one")
    width, height = (int.from_bytes(picture[begin : begin + 4]) for begin in (16, 20))
    if not (0 < width <= MOST_PIXELS and 0 < height <= MOST_PIXELS):
        raise ValueError(f"has a picture of {width} by {height} pixels")
    if not isinstance(probability, int | float) or not 0 <= probability <= 1:
        raise ValueError("has a probability that is none")
    return Sample(
        png=png,
        true=_whole(body["true"], below=num_classes),
        predicted=_whole(body["predicted"], below=num_classes),
        probability=float(probability),
    )


def _whole(value: Any, *, below: int = 1 << 53) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise ValueError(f"has {value!r:.40} where a whole number below {below} belongs")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"has a class named {value!r:.40}")
    return value[:_SHOWN_CHARS]

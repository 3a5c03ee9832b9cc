"""`evaluation.json`: the last evaluation by class, in the folder of the logs, for `distckpt report`.

`distckpt.report.evaluations` says what is in it.
Invariant: it is a by-product: that it cannot be written never stops a training.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from distckpt.logfolder import EVALUATION_NAME
from distckpt.report.evaluations import FORMAT
from distckpt.trainer.evaluation import Evaluation
from distckpt.wholefile import write_whole

logger = logging.getLogger(__name__)


def write_evaluation(folder: Path, evaluation: Evaluation, *, step: int, classes: Sequence[str]) -> None:
    """Write the record of an evaluation, in the place of the one before; a warning if that fails.

    Args:
        folder: The folder of the logs.
        evaluation: The evaluation, with its pictures.
        step: Optimizer steps completed before it.
        classes: The classes' names, by label.

    Ranks: 0.
    """
    body = {
        "format": FORMAT,
        "step": step,
        "classes": list(classes),
        "num_samples": evaluation.num_samples,
        "num_right": evaluation.num_right,
        "confusion": evaluation.confusion,
        "samples": [
            {
                "png": base64.b64encode(picture.png).decode(),
                "true": picture.true,
                "predicted": picture.predicted,
                "probability": round(picture.probability, 4),
            }
            for picture in evaluation.pictures
        ],
    }
    try:
        write_whole(folder / EVALUATION_NAME, (json.dumps(body, separators=(",", ":")) + "\n").encode())
    except OSError as error:
        logger.warning("%s could not be written: %s", folder / EVALUATION_NAME, error.strerror or error)

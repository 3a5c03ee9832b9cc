"""What ranks run in the tests of states that have diverged."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

from distckpt import CheckpointManager


class Lines(logging.Handler):
    """Keeps the warnings that it is given."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def save_after_an_error_of_one_bit(directory: str, options: dict[str, Any]) -> dict[str, Any]:
    """Save equal replicas, then with one bit flipped on rank 1, as often as it takes to compare all of them."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1000, 900)  # three parts of a megabyte and a bit
    told, lines = "", Lines()
    logging.getLogger("distckpt").addHandler(lines)
    try:
        with CheckpointManager(directory, rng=False, timeout_s=30, **options) as ckpt:
            ckpt.save(1, {"model": model})
            ckpt.wait()
            before = len(lines.lines)
            if dist.get_rank() == 1:
                with torch.no_grad():
                    model.weight[450].view(torch.int32)[7] ^= 1
            for step in range(2, 7):
                ckpt.save(step, {"model": model})
                ckpt.wait()
    except ArithmeticError as error:
        told = f"{type(error).__name__}: {error}"
    except RuntimeError as error:
        told = f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("distckpt").removeHandler(lines)
    return {"before": before, "warnings": lines.lines, "told": told}

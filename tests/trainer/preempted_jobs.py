"""What ranks run in the campaign of signals at random moments: a training, and a signal that comes beside it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist

from distckpt.manager import SIGNALS
from distckpt.trainer import FitResult, TrainConfig, Trainer


def fit_and_be_asked(config: TrainConfig, moments: Mapping[int, tuple[signal.Signals, float]]) -> FitResult:
    """Train on this rank, and get a signal.

    Args:
        config: The training.
        moments: By rank, which signal it gets, and how many seconds after the beginning.
    """
    torch.set_num_threads(1)
    rank = dist.get_rank()
    with _deaf(), _asked(*moments[rank]) if rank in moments else nullcontext():
        return Trainer(config).fit()


def time_of(config: TrainConfig) -> float:
    """Train on this rank, undisturbed, and return the seconds that it took."""
    begun = time.monotonic()
    fit_and_be_asked(config, {})
    return time.monotonic() - begun


@contextmanager
def _deaf() -> Iterator[None]:
    """Let the signals do nothing while nobody else listens to them: the rank is to live on for the next test."""
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _asked(number: signal.Signals, later_s: float) -> Iterator[None]:
    """Send this process a signal after a while, unless that is over before."""
    is_over = threading.Event()

    def ask() -> None:
        if not is_over.wait(later_s):
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()

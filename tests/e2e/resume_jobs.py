"""One rank of a training, as train.py runs it, for trials that start and kill it a hundred times."""

from __future__ import annotations

from forked_ranks import Pen

from distckpt.trainer import Trainer, parse_config, show_messages


def train(rank: int, pen: Pen, settings: list[str]) -> None:
    """Train to the end, or go on with it."""
    show_messages()
    pen.tell("ended", complete=Trainer(parse_config(settings)).fit().complete)

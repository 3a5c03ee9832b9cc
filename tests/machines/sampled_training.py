"""train.py, which also writes down which samples each rank takes for each step: the script that the machines run.

torchrun tests/machines/sampled_training.py SETTINGS...      with the folder of the notes in $SAMPLES
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from distckpt.trainer import assembly
from distckpt.trainer.order import Key, RankBatches

START = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"  # each start of the ranks has an address of its own
NOTES = Path(os.environ["SAMPLES"]) / f"{uuid.uuid4().hex}.jsonl"


class NotedBatches(RankBatches):
    """The real batches, each noted before it is loaded; without loader processes, none is loaded ahead."""

    def __iter__(self) -> Iterator[list[Key]]:
        assert self.accumulate == 1
        with NOTES.open("a", buffering=1) as notes:
            for step, keys in enumerate(super().__iter__(), start=self.done + 1):
                note = {"step": step, "rank": self.rank, "world_size": self.world_size, "start": START, "keys": keys}
                notes.write(json.dumps({**note, "time": time.monotonic()}) + "\n")
                yield keys


assembly.RankBatches = NotedBatches  # type: ignore[misc]

if __name__ == "__main__":
    sys.exit(train.main())

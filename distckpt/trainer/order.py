"""The order of samples: a pure function of seed, epoch and global position.

Invariant: over one epoch all ranks together see every sample exactly once, whatever the number of ranks, of loader
workers and of passes per step, and wherever the run was stopped and continued.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distckpt.errors import StateMismatchError


def derive_seed(*parts: int | str) -> int:
    """Return a seed below 2^63 that depends on all parts, such as a run's seed and a purpose.

    Ranks: any.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def epoch_order(seed: int, epoch: int, num_samples: int) -> npt.NDArray[np.int64]:
    """Return the samples' indices in the order in which this epoch sees them.

    Ranks: any.

    Source: NumPy freezes the stream of the legacy RandomState for good (NEP 19), unlike that of torch.randperm.
    """
    words = np.frombuffer(hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=32).digest(), dtype="<u4")
    return np.random.RandomState(words).permutation(num_samples).astype(np.int64)


def share(start: int, stop: int, part: int, num_parts: int) -> range:
    """Return the piece of [start, stop) that belongs to one of `num_parts`; sizes differ by one at most.

    The first parts get the larger pieces, so that rank 0, whose batch statistics count, is never the empty one.

    Ranks: any.
    """
    size, rest = divmod(stop - start, num_parts)
    first = start + part * size + min(part, rest)
    return range(first, first + size + (part < rest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the samples of a run are cut into optimizer steps.

    Attributes:
        seed: The run's seed.
        num_samples: Samples in an epoch.
        global_batch_size: Samples in a step, over all ranks; the last step of an epoch may have fewer.
        epochs: Number of epochs.
    """

    seed: int
    num_samples: int
    global_batch_size: int
    epochs: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.num_samples / self.global_batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the run."""
        return self.epochs * self.steps_per_epoch

    def bounds(self, step: int) -> tuple[int, int, int]:
        """Return (epoch, start, stop): the global positions of the step after `step` completed ones.

        Ranks: any.
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.global_batch_size
        return epoch, start, min(start + self.global_batch_size, self.num_samples)

    def samples_seen(self, step: int) -> int:
        """Return how many samples `step` completed steps have seen, over all epochs and ranks.

        Ranks: any.
        """
        epoch, start, _ = self.bounds(step)
        return epoch * self.num_samples + start

    def batch_sizes(self, *, world_size: int, accumulate: int) -> set[int]:
        """Return which numbers of samples occur in one pass of one rank.

        Ranks: any.
        """
        sizes = set()
        for step in {0, self.steps_per_epoch - 1}:
            _, start, stop = self.bounds(step)
            for rank in range(world_size):
                mine = share(start, stop, rank, world_size)
                sizes |= {len(share(mine.start, mine.stop, part, accumulate)) for part in range(accumulate)}
        return sizes


Key = tuple[int, int]
"""A sample as the loader asks for it: (epoch, index); the epoch decides how it is augmented."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBatches:
    """The batches that one rank loads from a step on, as a loader's batch sampler; a batch may be empty.

    Attributes:
        plan: How the run is cut into steps.
        done: Steps completed.
        rank: This rank.
        world_size: The number of ranks.
        accumulate: Batches per step.
    """

    plan: Plan
    done: int
    rank: int
    world_size: int
    accumulate: int

    def __len__(self) -> int:
        """Return the number of batches up to the end of the run."""
        return max(0, self.plan.total_steps - self.done) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield `accumulate` batches of keys for each step."""
        order_epoch = -1
        for step in range(self.done, self.plan.total_steps):
            epoch, start, stop = self.plan.bounds(step)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.plan.seed, epoch, self.plan.num_samples), epoch
            mine = share(start, stop, self.rank, self.world_size)
            for part in range(self.accumulate):
                positions = share(mine.start, mine.stop, part, self.accumulate)
                yield [(epoch, int(order[position])) for position in positions]


class Position:
    """How far the run has come in its data, as state for a checkpoint; the same on every rank.

    Attributes:
        plan: How the run is cut into steps.
        step: Steps completed.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and position, and what they were counted in."""
        epoch, start, _ = self.plan.bounds(self.step)
        return {
            "epoch": epoch,
            "global_batch_size": self.plan.global_batch_size,
            "num_samples": self.plan.num_samples,
            "position": start,
            "seed": self.plan.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a recorded place.

        Raises:
            StateMismatchError: It was counted in other data, or with another seed or batch size.
        """
        step = state["epoch"] * self.plan.steps_per_epoch + state["position"] // self.plan.global_batch_size
        fixed = ("global_batch_size", "num_samples", "seed")
        problems = [
            f"data.{name}: the checkpoint has {state[name]}, the run has {getattr(self.plan, name)}"
            for name in fixed
            if state[name] != getattr(self.plan, name)
        ]
        if problems:
            raise StateMismatchError(path="data", step=step, problems=problems)
        self.step = step

"""Inspection: what is looked at in a state while it is saved, so that no bad one is called good in silence.

Nearly nothing of it is done by the training's thread. That copies a sample of what should be the same on all ranks;
the thread that writes digests the sample, and looks for NaN and infinities in the bytes that it writes.
Invariant: nothing is changed, and what is written does not depend on it.
"""

from __future__ import annotations

import logging
import operator
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from distckpt.checksum import digest
from distckpt.devicecopy import OnDevice
from distckpt.divergence import Difference, differences
from distckpt.errors import NonFiniteStateError, StateDivergedError
from distckpt.fileplan import FilePlan
from distckpt.state import FlatObject
from distckpt.tensors import host_bytes, is_everywhere, local

logger = logging.getLogger("distckpt")

Mode = Literal["off", "warn", "error"]

SAMPLE_BYTES = 1 << 20
TENSOR_BYTES = 16 << 10  # what taking a sample of one more tensor costs, in bytes that are copied in that time
MOST_NAMES = 100

# A number is NaN or infinite if these bits are all set (of float8_e4m3fn, which has no infinity, NaN): as signed
# integers these are the largest of the positive ones, as unsigned integers those of the negative ones.
_BITS: Mapping[str, tuple[type[np.signedinteger[Any]], type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.int64, np.uint64, 0x7FF0000000000000),
    "F32": (np.int32, np.uint32, 0x7F800000),
    "F16": (np.int16, np.uint16, 0x7C00),
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F8_E5M2": (np.int8, np.uint8, 0x7C),
    "F8_E4M3": (np.int8, np.uint8, 0x7F),
    "C64": (np.int32, np.uint32, 0x7F800000),
    "C128": (np.int64, np.uint64, 0x7FF0000000000000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A copy of a part of the replicas.

    Attributes:
        pieces: The name of each tensor, and how many bytes of it there are.
        data: For each device, the bytes of its pieces one after another, in the order of `pieces`.
    """

    pieces: tuple[tuple[str, int], ...]
    data: tuple[OnDevice, ...]

    def digest(self) -> str:
        """Return one digest for all.

        Ranks: any; blocks on a copy from each device.
        """
        return digest(*(part.on_host() for part in self.data))

    def digests(self) -> dict[str, str]:
        """Return the digest of each tensor's piece, by its name.

        Ranks: any; blocks as `digest` does.
        """
        data, offset, found = memoryview(b"".join(bytes(part.on_host()) for part in self.data)), 0, {}
        for name, num_bytes in self.pieces:
            found[name] = digest(data[offset : offset + num_bytes])
            offset += num_bytes
        return found


class _Replica(NamedTuple):
    """Where a tensor stands that every rank has a copy of."""

    name: str
    of_object: int
    number: int


class _Run(NamedTuple):
    """Neighbouring blocks of one floating dtype in a data file: their bytes, and which they are."""

    begin: int
    end: int
    dtype: str
    first: int
    last: int


class Inspection:
    """Looks at the states of a run as they are saved; what it learns of their structure it keeps.

    Args:
        replicas: What happens if ranks differ in what should be the same: "off", "warn" or "error".
        finite: What happens if a parameter or an optimizer's state holds a NaN or an infinity.
    """

    def __init__(self, *, replicas: Mode, finite: Mode) -> None:
        self.replicas: Mode = replicas
        self.finite: Mode = finite
        self._structures: list[Any] = []
        self._places: list[_Replica] = []
        self._ends: list[int] = [0]
        self._turn: int | None = None
        self._plan: FilePlan | None = None
        self._runs: list[_Run] = []
        self._told: frozenset[str] = frozenset()

    def sample(self, objects: Sequence[FlatObject], *, attempt: str) -> Sampled | None:
        """Return a copy of this save's part of the replicas, the same part on every rank; None if there are none.

        Every save takes the next part, about `SAMPLE_BYTES` of few tensors, so that a known number of saves has taken
        every byte; where it begins, the save's name decides.

        Args:
            objects: The state.
            attempt: The save's name.

        Ranks: any; a GPU copies its part when it comes to it.
        """
        structures = [each.structure for each in objects]
        if len(structures) != len(self._structures) or not all(map(operator.is_, structures, self._structures)):
            self._learn(objects)
            self._structures = structures
        total = self._ends[-1]
        if not total:
            return None
        self._turn = int(attempt, 16) if self._turn is None else self._turn + 1
        turns = -(-total // SAMPLE_BYTES)
        first, last = (total * (self._turn % turns + more) // turns for more in (0, 1))
        parts: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
        for index in range(bisect_right(self._ends, first) - 1, len(self._places)):
            if self._ends[index] >= last:
                break
            place = self._places[index]
            tensor = local(objects[place.of_object].tensors[place.number]).resolve_conj().resolve_neg()
            begin, end = first - self._ends[index], last - self._ends[index]
            size = tensor.element_size()
            flat = tensor.reshape(-1)[max(0, begin) // size : -(-end // size)]
            if flat.numel():
                parts.setdefault(tensor.device, []).append((place.name, flat.view(torch.uint8)))
        with torch.no_grad():
            return Sampled(
                pieces=tuple((name, part.numel()) for on_device in parts.values() for name, part in on_device),
                data=tuple(OnDevice(_copied([part for _, part in on_device])) for on_device in parts.values()),
            )

    def _learn(self, objects: Sequence[FlatObject]) -> None:
        """Find the tensors of modules and optimizers of which every rank holds its own copy; see `divergence`."""
        self._places, costs = [], []
        for index, flat in enumerate(objects):
            if flat.kind not in ("module", "optimizer") or flat.per_rank:
                continue
            for number, entry in enumerate(flat.entries):
                if entry.owner is None and is_everywhere(entry.tensor) and entry.tensor.numel():
                    self._places.append(_Replica(entry.name, index, number))
                    costs.append(local(entry.tensor).nbytes + TENSOR_BYTES)
        self._ends = list(accumulate(costs, initial=0))

    def finite_check(self, plan: FilePlan, objects: Iterable[FlatObject]) -> FiniteCheck:
        """Return a check of a share that is to be written, for NaN and infinities.

        Ranks: any.
        """
        if plan is not self._plan:
            names = {
                name
                for flat in objects
                if flat.kind in ("module", "optimizer")
                for name, owner in zip(flat.structure.names, flat.structure.owners, strict=True)
                if owner is None or flat.per_rank  # buffers may hold infinities on purpose: masks do
            }
            self._plan, self._runs = plan, list(_runs(plan, names))
        return FiniteCheck(plan, self._runs)

    def judge_finite(self, step: int, by_rank: Sequence[Sequence[str]]) -> None:
        """Say which tensors hold a NaN or an infinity, if any do; the same ones are told once.

        Args:
            step: The step that is saved.
            by_rank: The names that each rank has found.

        Raises:
            NonFiniteStateError: There are such, and they are not to be saved.

        Ranks: 0.
        """
        names = sorted({name for found in by_rank for name in found})
        if names:
            error = NonFiniteStateError(step=step, names=names)
            if self.finite == "error":
                raise error
            if frozenset(names) != self._told:
                logger.warning("%s", error)
        self._told = frozenset(names)

    def judge_replicas(self, step: int, by_rank: Sequence[Mapping[str, str]]) -> None:
        """Say which tensors differ between ranks.

        Args:
            step: The step that is saved.
            by_rank: What `Sampled.digests` returned on each rank.

        Raises:
            StateDivergedError: Some do, and they are not to be saved.

        Ranks: 0.
        """
        found: list[Difference] = differences(by_rank)
        if found:
            ranks = sorted({rank for one in found for rank in one.ranks})
            error = StateDivergedError(step=step, names=[one.name for one in found], ranks=ranks)
            if self.replicas == "error":
                raise error
            logger.warning("%s", error)


class FiniteCheck:
    """Looks for NaN and infinities in a share's file while it is written.

    Args:
        plan: The plan of the file.
        runs: What is to be looked at.
    """

    def __init__(self, plan: FilePlan, runs: Sequence[_Run]) -> None:
        self._plan = plan
        self._runs = runs
        self._next_run = 0
        self._found: dict[str, None] = {}

    def look(self, begin: int, piece: memoryview) -> None:
        """Take in the next piece of the file.

        Args:
            begin: Where it begins in the file.
            piece: Its bytes.

        Ranks: any, the pieces in the order of the file.
        """
        end = begin + len(piece)
        while self._next_run < len(self._runs) and self._runs[self._next_run].end <= begin:
            self._next_run += 1
        for number in range(self._next_run, len(self._runs)):
            run = self._runs[number]
            if run.begin >= end:
                break
            first, last = max(run.begin, begin), min(run.end, end)
            if not _is_finite(piece[first - begin : last - begin], run.dtype):
                self._name(run, begin, piece)

    def found(self) -> list[str]:
        """Return the names of the tensors that hold a NaN or an infinity, at most `MOST_NAMES` of them.

        Ranks: any, when the file is written.
        """
        return list(self._found)[:MOST_NAMES]

    def _name(self, run: _Run, begin: int, piece: memoryview) -> None:
        """Find which blocks of a run hold a bad number in this piece of the file."""
        first, last = max(run.begin, begin), min(run.end, begin + len(piece))
        blocks, offsets = self._plan.blocks[run.first : run.last], self._plan.offsets[run.first : run.last]
        for block, offset in zip(blocks, offsets, strict=True):
            low, high = max(offset, first), min(offset + block.num_bytes, last)
            if low < high and not _is_finite(piece[low - begin : high - begin], run.dtype):
                self._found[block.name] = None


def _runs(plan: FilePlan, names: set[str]) -> Iterator[_Run]:
    """Yield the runs of blocks that are to be looked at."""
    run: _Run | None = None
    for index, (block, offset) in enumerate(zip(plan.blocks, plan.offsets, strict=True)):
        end = offset + block.num_bytes
        is_wanted = block.name in names and block.dtype in _BITS
        if run is not None and (not is_wanted or block.dtype != run.dtype):
            yield run
            run = None
        if is_wanted:
            run = _Run(
                offset if run is None else run.begin, end, block.dtype, index if run is None else run.first, index + 1
            )
    if run is not None:
        yield run


def _copied(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return bytes one after another, in memory of their own; of what lies on a GPU in one kernel."""
    if parts[0].device.type != "cpu":
        return torch.cat(list(parts))
    return torch.frombuffer(bytearray().join(host_bytes(part) for part in parts), dtype=torch.uint8)


def _is_finite(data: memoryview, dtype: str) -> bool:
    if not data:
        return True
    signed, unsigned, mask = _BITS[dtype]
    sign = 1 << (8 * np.dtype(unsigned).itemsize - 1)
    bits = np.frombuffer(data, dtype=unsigned)
    highest = int(bits.max())
    if highest < mask:
        return True  # and none is negative, as in an optimizer's second moments: that is known by one look
    return highest < mask | sign and int(bits.view(signed).max()) < mask

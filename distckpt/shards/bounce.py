"""Bounce buffers: pinned memory between the storage and GPUs, one half read into while the other is copied from.

It is made for one load and given back after it: what torch keeps pinned it keeps as long as the process lasts.
Invariant: no buffer is used again, and none is given back, before the GPUs have copied from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from distckpt.hostmemory import HostMemory

HALF_BYTES = 128 << 20
_ALIGNMENT = 64


def buffer_bytes(num_bytes: int) -> int:
    """Return what a buffer of so many bytes takes of a half.

    Ranks: any.
    """
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class BounceBuffers:
    """The buffers of one load.

    Args:
        num_bytes: What all take together, by `buffer_bytes`; no more memory is made than that needs.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_left = num_bytes
        self._halves: list[HostMemory | None] = [None, None]  # the one that is read into now, and the other
        self._used = 0
        self._copied: list[torch.cuda.Event] = []  # from the other half

    def taken(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Return a buffer for a tensor; None if this half has none of that size left.

        Raises:
            MemoryError: There is not as much memory.

        Ranks: any.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        end = self._used + buffer_bytes(num_bytes)
        if end > HALF_BYTES:
            return None
        half = self._halves[0]
        if half is None:
            half = self._halves[0] = HostMemory(min(HALF_BYTES, max(self._num_left, end)), pinned=True)
        if end > len(half.view):
            return None
        begin, self._used = self._used, end
        return half.tensor[begin : begin + num_bytes].view(dtype).view(tuple(shape))

    def turn(self, devices: Iterable[torch.device]) -> None:
        """Go on in the other half, once what was asked to be copied from there is copied.

        Args:
            devices: Those that were asked to copy from this half, on their current streams.

        Ranks: any; blocks on the GPUs.
        """
        copied, self._copied = self._copied, [_recorded(device) for device in devices]
        for event in copied:
            event.synchronize()
        self._num_left -= self._used
        self._used = 0
        self._halves.reverse()

    def close(self, devices: Iterable[torch.device]) -> None:
        """Give the memory back, once everything is copied.

        Ranks: any; blocks on the GPUs.
        """
        for device in devices:
            torch.cuda.synchronize(device)
        self._copied = []
        self._halves = [None, None]


def _recorded(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event

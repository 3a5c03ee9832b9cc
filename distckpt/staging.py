"""Staging: this rank's share of the state, copied to host memory, so that training may go on while it is written.

Invariant: once `stage` returns, nothing that training does changes what it returned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distckpt.tensors import memory


class Staging:
    """A host buffer that is kept from save to save: the first touch of fresh memory costs more than the copy.

    Pinned, if the state lies on a GPU.
    Source: copies into warm memory ran at 4.6 to 8.7 GB/s, into fresh pages at 1.6 to 2.7.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def stage(self, tensors: Sequence[torch.Tensor]) -> list[memoryview]:
        """Return the bytes of each tensor, copied; valid until the next call.

        Args:
            tensors: In an order in which each is aligned to its item's size when they are laid end to end.

        Ranks: any; blocks until the copies from the device are done.
        """
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if self._buffer.numel() != total or (on_gpu and not self._buffer.is_pinned()):
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=on_gpu)
        staged, offset = [], 0
        with torch.no_grad():
            for tensor in tensors:
                num_bytes = tensor.numel() * tensor.element_size()
                room = self._buffer[offset : offset + num_bytes]
                if num_bytes:
                    room.view(tensor.dtype).view(tensor.shape).copy_(_resolved(tensor), non_blocking=True)
                staged.append(memory(room))
                offset += num_bytes
        if on_gpu:
            torch.cuda.synchronize()
        return staged


def _resolved(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose memory holds its values: conjugation and negation done."""
    return tensor.resolve_conj().resolve_neg()

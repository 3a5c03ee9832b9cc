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
        self._layout: list[tuple[torch.dtype, torch.Size]] = []
        self._views: list[torch.Tensor] = []

    def stage(self, tensors: Sequence[torch.Tensor]) -> memoryview:
        """Return the bytes of all tensors, one after another, copied; valid until the next call.

        Args:
            tensors: In an order in which each is aligned to its item's size when they are laid end to end.

        Ranks: any; blocks until the copies from the device are done.
        """
        resolved = [tensor.resolve_conj().resolve_neg() for tensor in tensors]
        on_gpu = any(tensor.is_cuda for tensor in resolved)
        layout = [(tensor.dtype, tensor.shape) for tensor in resolved]
        if layout != self._layout or (on_gpu and not self._buffer.is_pinned()):
            self._make_room(layout, pinned=on_gpu)
        if resolved:
            with torch.no_grad():
                torch._foreach_copy_(self._views, resolved, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return memory(self._buffer)

    def _make_room(self, layout: list[tuple[torch.dtype, torch.Size]], *, pinned: bool) -> None:
        """Make a buffer, or keep the one of this size, and a view of it for each tensor."""
        total = sum(shape.numel() * dtype.itemsize for dtype, shape in layout)
        if self._buffer.numel() != total or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
        self._views, offset = [], 0
        for dtype, shape in layout:
            num_bytes = shape.numel() * dtype.itemsize
            self._views.append(self._buffer[offset : offset + num_bytes].view(dtype).view(shape))
            offset += num_bytes
        self._layout = layout

"""Copies from a GPU to pinned memory, beside the training that goes on there.

They run on a stream of their own. What may change in the next forward or backward (buffers, averages) is copied first,
and the training's stream waits for it on the GPU; what changes only in an optimizer's step (its parameters, its state)
is copied after that, and the step waits, again on the GPU. So the host waits for nothing, and the copy is of one
moment.
Invariant: a tensor is not changed by what this process asks of its current stream after `begin`, before it is copied.
That holds for changes by `Optimizer.step`, and by anything that is no parameter or state of an optimizer in the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Move(NamedTuple):
    """One piece of a copy: tensors on the GPU to tensors in pinned memory, and what it completes.

    Attributes:
        sources: What is copied.
        targets: Where to.
        patient: For each, whether it changes only in an optimizer's step.
        end: How much of the file is there after it, in bytes.
    """

    sources: Sequence[torch.Tensor]
    targets: Sequence[torch.Tensor]
    patient: Sequence[bool]
    end: int


class DeviceCopy:
    """One copy of a share from one GPU.

    Args:
        moves: Its pieces, in the order of the file.
        device: The GPU.
    """

    def __init__(self, moves: Sequence[Move], device: torch.device) -> None:
        self._moves = moves
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._hook: Any = None

    def begin(self) -> None:
        """Ask the GPU for all copies; training may go on when this returns.

        Ranks: any; does not wait for the GPU.
        """
        training = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(training)
        with torch.cuda.stream(stream), torch.no_grad():
            for move in self._moves:
                _copy(move, patient=False)
            training.wait_event(_recorded(stream))
            for move in self._moves:
                _copy(move, patient=True)
                self._events.append(_recorded(stream))
        if self._events:
            self._hook = register_optimizer_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Let the optimizer's step wait for the copy, on the GPU."""
        torch.cuda.current_stream(self._device).wait_event(self._events[-1])
        self._release()

    def ends(self) -> Iterator[int]:
        """Yield how much of the file is there, in bytes, as it arrives.

        Ranks: any; blocks on the GPU.
        """
        try:
            for move, event in zip(self._moves, self._events, strict=True):
                event.synchronize()
                yield move.end
        finally:
            self._release()

    def _release(self) -> None:
        """Let go of the hook and of the tensors, once all is copied."""
        if self._hook is not None and self._events[-1].query():  # type: ignore[no-untyped-call]
            self._hook.remove()
            self._hook, self._moves = None, ()


def _copy(move: Move, *, patient: bool) -> None:
    chosen = [index for index, each in enumerate(move.patient) if each is patient]
    if chosen:
        targets, sources = [move.targets[i] for i in chosen], [move.sources[i] for i in chosen]
        torch._foreach_copy_(targets, sources, non_blocking=True)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event

"""A GPU that is none: streams whose work is done some time after it was asked for, in any order that they allow.

What `distckpt.devicecopy` asks of torch for a GPU is asked of this instead, of tensors that lie on the host.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

DEVICE = torch.device("cpu")


class Event:
    """A mark in a stream."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu = gpu
        self.is_recorded = False
        self.has_happened = False

    def record(self, stream: Stream) -> None:
        self.is_recorded = True
        stream.ask(self._happen)

    def query(self) -> bool:
        return self.has_happened

    def synchronize(self) -> None:
        assert self.is_recorded
        while not self.has_happened:
            self._gpu.advance()

    def _happen(self) -> None:
        self.has_happened = True


class Stream:
    """Work that is done in order."""

    def __init__(self) -> None:
        self._work: deque[tuple[Event | None, Callable[[], object]]] = deque()

    def ask(self, work: Callable[[], object]) -> None:
        self._work.append((None, work))

    def wait_event(self, event: Event) -> None:
        assert event.is_recorded
        self._work.append((event, lambda: None))

    def wait_stream(self, other: Stream) -> None:
        event = other.marked()
        self.wait_event(event)

    def marked(self) -> Event:
        event = Event(self.gpu)
        event.record(self)
        return event

    @property
    def can_go_on(self) -> bool:
        return bool(self._work) and (self._work[0][0] is None or self._work[0][0].has_happened)

    def go_on(self) -> None:
        _, work = self._work.popleft()
        work()

    gpu: SimulatedGpu


class SimulatedGpu:
    """Streams, one of which is the training's, and the names in `torch` that are used with them.

    Args:
        seed: What decides over the order in which streams come to do their work.
        fullness: How likely it is that there is no memory when some is asked for.
    """

    def __init__(self, seed: int, *, fullness: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.training = self.new_stream()
        self.num_copies = 0
        self._num_changes: dict[int, int] = {}
        self._fullness = fullness
        self._current = self.training

    def new_stream(self, device: object = None) -> Stream:
        stream = Stream()
        stream.gpu = self
        self.streams.append(stream)
        return stream

    def change(self, tensor: torch.Tensor) -> None:
        """Ask the training's stream to change a tensor; its version is another one at once, as with torch."""
        self._num_changes[id(tensor)] = self.version(tensor) + 1
        self.training.ask(lambda: tensor.copy_(torch.rand(tensor.shape) * 9))

    def version(self, tensor: torch.Tensor) -> int:
        return self._num_changes.get(id(tensor), 0)

    def advance(self) -> bool:
        """Do one piece of work of some stream; say whether there was any."""
        ready = [stream for stream in self.streams if stream.can_go_on]
        if ready:
            self.random.choice(ready).go_on()
        return bool(ready)

    def finish(self) -> None:
        while self.advance():
            pass

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def _empty(self, *size: int, **options: Any) -> torch.Tensor:
        if self.random.random() < self._fullness:
            raise torch.OutOfMemoryError("no room on this GPU")
        made = torch.empty(*size, **options)
        return made.fill_(0xEE) if made.dtype == torch.uint8 else made

    def _cat(self, rows: Sequence[torch.Tensor], *, out: torch.Tensor) -> None:
        self._current.ask(lambda: torch.cat(list(rows), out=out))

    def _clone(self, source: torch.Tensor, *, memory_format: torch.memory_format) -> torch.Tensor:
        made = torch.empty_like(source, memory_format=memory_format)
        self._current.ask(lambda: made.copy_(source))
        return made

    def _foreach_copy(self, views: list[torch.Tensor], sources: list[torch.Tensor], *, non_blocking: bool) -> None:
        assert non_blocking
        assert len(views) == len(sources)
        for view, source in zip(views, sources, strict=True):
            assert (view.shape, view.dtype) == (source.shape, source.dtype)
            self.num_copies += 1
            self._current.ask(lambda view=view, source=source: view.copy_(source))

    @property
    def torch(self) -> SimpleNamespace:
        """What stands in for `torch` in the module under test."""
        cuda = SimpleNamespace(
            current_stream=lambda device: self._current,
            Stream=self.new_stream,
            stream=self._on,
            Event=lambda blocking: Event(self),
        )
        names = ("no_grad", "uint8", "contiguous_format", "OutOfMemoryError", "resolve_neg", "resolve_conj", "Tensor")
        return SimpleNamespace(
            cuda=cuda,
            empty=self._empty,
            cat=self._cat,
            clone=self._clone,
            _foreach_copy_=self._foreach_copy,
            device=torch.device,
            optim=torch.optim,
            **{name: getattr(torch, name) for name in names},
        )

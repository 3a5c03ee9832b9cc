"""Copies from a GPU to pinned memory, beside the training that goes on there.

They run on a stream of their own. What may change in the next forward or backward (buffers, averages) is copied first,
and the training's stream waits for that on the GPU; what changes only in an optimizer's step (its parameters, its
state) is copied after it, and the step waits, again on the GPU. So the host waits for nothing, and the copy is of one
moment.
To ask for a copy costs the host as much as some hundred kilobytes cost the bus, so small tensors are put together on
the GPU first, and those of them that may change are only put aside there at once.
Invariant: what `ends` has yielded is as it was at `begin`. Nothing that is asked of the training's stream after that,
and nothing that an optimizer's step does, changes a tensor before it is copied; what else changes a parameter too early
is found out by the tensor's version, where torch counts changes (it does not in DTensors), and `ends` raises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distckpt.errors import UsageError
from distckpt.fileplan import FilePlan
from distckpt.hostmemory import HostMemory
from distckpt.tensors import host_bytes

# Below it a tensor is small. PCIe moves as much in 20 to 50 microseconds; to ask for a copy takes about 10.
SMALL_BYTES = 1 << 20
# Of small tensors that are put together, and of a large one in one copy. The first is memory of the GPU, taken for as
# long as the copy lasts; the second is how early what has arrived can be written.
PACKED_BYTES = 8 << 20
PIECE_BYTES = 32 << 20
# Of small tensors that may change, put aside on the GPU; what is beyond is copied to the host at once.
ASIDE_BYTES = 32 << 20
# Between two looks at what has arrived.
ARRIVAL_BYTES = 16 << 20


class DeviceCopy:
    """One copy of a share from one GPU; what of it lies on the host is copied there.

    Args:
        memory: Where to; it is held until the GPU is done.
        plan: The file that it becomes.
        views: The place of each of its blocks there, as a tensor of its dtype and shape.
        sources: What each of them is filled with.
        patient: For each, whether it changes only in an optimizer's step.
        device: The GPU.
    """

    def __init__(
        self,
        memory: HostMemory,
        plan: FilePlan,
        views: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        *,
        patient: Sequence[bool],
        device: torch.device,
    ) -> None:
        self._memory: HostMemory | None = memory
        self._bytes = memory.tensor
        self._plan = plan
        self._views = views
        self._sources = list(sources)
        self._patient = patient
        self._device = device
        self._arrivals: list[tuple[torch.cuda.Event, int]] = []
        self._last: torch.cuda.Event | None = None
        self._turn = threading.Lock()
        self._versions: dict[int, int] = {}
        self._disturbed: str | None = None

    def begin(self) -> None:
        """Ask the GPU for all copies; training may go on when this returns.

        Ranks: any; does not wait for the GPU.
        """
        self._versions = {i: _version(self._sources[i]) for i, patient in enumerate(self._patient) if patient}
        training = torch.cuda.current_stream(self._device)
        stream = _stream_of(self._device)
        stream.wait_stream(training)
        try:
            with torch.cuda.stream(stream), torch.no_grad():
                there = self._copy_at_once()
                training.wait_event(_recorded(stream))
                due = 0
                for end in self._copy_in_order(there):
                    if end >= due:
                        self._arrivals.append((_recorded(stream), end))
                        due = end + ARRIVAL_BYTES
        finally:
            self._last = _recorded(stream)  # whatever was asked for is over when this is
        self._arrivals.append((self._last, self._plan.num_bytes))
        _gate.add(self)

    def hold_up(self) -> None:
        """Let what is asked of the current stream from now on wait for the copy, on the GPU.

        Ranks: any; does not wait for the GPU.
        """
        if self._last is not None:
            self._look_for_changes()
            torch.cuda.current_stream(self._device).wait_event(self._last)
            if self._last.query():  # type: ignore[no-untyped-call]
                self._let_go()

    def ends(self) -> Iterator[int]:
        """Yield how much of the file is there, in bytes, as it arrives.

        Raises:
            UsageError: A tensor that only a step should change was changed before it was copied, or soon after.

        Ranks: any; blocks on the GPU.
        """
        for event, end in self._arrivals:
            event.synchronize()
            if self._last is not None and self._last.query():  # type: ignore[no-untyped-call]
                self._look_for_changes()
            self._refuse_changes()
            yield end
        self._let_go()

    def wait(self) -> None:
        """Return once the GPU writes nothing more to the memory.

        Ranks: any; blocks on the GPU.
        """
        if self._last is not None:
            self._last.synchronize()
            self._let_go()

    def _look_for_changes(self) -> None:
        """See whether what only a step changes is as it was at the beginning; once that is seen, it may change."""
        with self._turn:
            sources = self._sources
            for index, version in self._versions.items():
                if sources and _version(sources[index]) != version:
                    self._disturbed = self._plan.blocks[index].name
            self._versions = {}

    def _refuse_changes(self) -> None:
        """Raise if there was such a change."""
        if self._disturbed is not None:
            raise UsageError(
                problem=f"{self._disturbed!r} was changed while it was copied from the GPU, by something else than an "
                "optimizer's step, which would have waited for the copy",
                fix="CheckpointManager(..., overlap=False), or change it by a torch.optim.Optimizer",
            )

    def _let_go(self) -> None:
        """Let go of the tensors and of the memory: all is copied."""
        _gate.remove(self)
        self._memory, self._sources, self._views = None, [], ()

    def _copy_at_once(self) -> set[int]:
        """Copy what may change before the next step, or put it aside on the GPU; return which lie on the host now."""
        aside: list[int] = []
        direct: list[int] = []
        num_bytes = 0
        for index, (source, patient) in enumerate(zip(self._sources, self._patient, strict=True)):
            if patient:
                continue
            size = source.nbytes
            if source.device == self._device and size < SMALL_BYTES and num_bytes + size <= ASIDE_BYTES:
                aside.append(index)
                num_bytes += size
            else:
                direct.append(index)
        packed = _packed([self._sources[index] for index in aside], num_bytes, self._device)
        if packed is None:
            direct += aside
        else:
            begin = 0
            for index in aside:
                end = begin + self._sources[index].nbytes
                self._sources[index] = packed[begin:end]
                begin = end
        self._copy(direct)
        return set(direct)

    def _copy_in_order(self, there: set[int]) -> Iterator[int]:
        """Copy the rest in the order of the file, and yield how much of it will be there after each copy, in bytes."""
        run: list[int] = []
        begin = end = 0
        for index, offset in enumerate(self._plan.offsets):
            size = self._sources[index].nbytes
            is_small = size < SMALL_BYTES and index not in there
            if run and not (is_small and offset == end and offset + size - begin <= PACKED_BYTES):
                self._copy_together(run, begin, end)
                yield offset
                run = []
            if is_small:
                begin = begin if run else offset
                run.append(index)
                end = offset + size
            elif index not in there:
                yield from self._copy_large(index, offset, size)
        if run:
            self._copy_together(run, begin, end)

    def _copy_together(self, run: Sequence[int], begin: int, end: int) -> None:
        """Copy tensors that stand one after another in the file."""
        packed = None
        if len(run) > 1:
            packed = _packed([self._sources[index] for index in run], end - begin, self._device)
        if packed is not None:
            torch._foreach_copy_([self._bytes[begin:end]], [packed], non_blocking=True)
        else:
            self._copy(run)

    def _copy_large(self, index: int, offset: int, size: int) -> Iterator[int]:
        """Copy one tensor, in pieces if it is very large, and yield as `_copy_in_order` does."""
        source = self._sources[index]
        if size <= PIECE_BYTES or not source.is_contiguous() or source.is_neg() or source.is_conj():
            self._copy([index])
            yield offset + size
            return
        whole = source.view(-1).view(torch.uint8)
        for begin in range(0, size, PIECE_BYTES):
            end = min(begin + PIECE_BYTES, size)
            torch._foreach_copy_([self._bytes[offset + begin : offset + end]], [whole[begin:end]], non_blocking=True)
            yield offset + end

    def _copy(self, indices: Sequence[int]) -> None:
        """Copy tensors one by one to where they belong."""
        if not indices:
            return
        views = [self._views[index] for index in indices]
        sources = [_plain(self._sources[index]) for index in indices]
        for place, (view, source) in enumerate(zip(views, sources, strict=True)):
            if (view.dtype, view.shape) != (source.dtype, source.shape):  # it was put aside, as a row of bytes
                views[place] = view.view(-1).view(torch.uint8)
        torch._foreach_copy_(views, sources, non_blocking=True)


class OnDevice:
    """What the current stream has been asked to make, for another thread to look at.

    Args:
        data: A tensor that nothing changes any more, on whatever device.
    """

    def __init__(self, data: torch.Tensor) -> None:
        self._data = data
        self._made = _recorded(torch.cuda.current_stream(data.device)) if data.is_cuda else None

    def on_host(self) -> memoryview:
        """Return its bytes, without waiting for what the training has asked for since.

        Ranks: any; blocks on the GPU.
        """
        if self._made is None:
            return host_bytes(self._data)
        stream = _stream_of(self._data.device)
        stream.wait_event(self._made)
        with torch.cuda.stream(stream):
            return host_bytes(self._data)


def hold_up() -> None:
    """Let what is asked of the GPUs from now on wait for the copies that are under way, as an optimizer's step does.

    Ranks: any; does not wait for the GPUs.
    """
    _gate.hold_up()


class _Gate:
    """Makes every optimizer's step wait for the copies that are under way.

    Its hook is set once and stays: torch does not allow that one is removed while others are being called.
    """

    def __init__(self) -> None:
        self._copies: dict[int, DeviceCopy] = {}
        self._is_set = False

    def add(self, copy: DeviceCopy) -> None:
        """Let the next steps wait for a copy."""
        if not self._is_set:
            register_optimizer_step_pre_hook(self._before_step)
            self._is_set = True
        self._copies[id(copy)] = copy

    def remove(self, copy: DeviceCopy) -> None:
        """Let no step wait for a copy any more."""
        self._copies.pop(id(copy), None)

    def hold_up(self) -> None:
        """Let what comes now wait for all copies that are under way."""
        for copy in list(self._copies.values()):
            copy.hold_up()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._copies:  # a compiled step is compiled for both answers, and looks no further
            _uncompiled(self.hold_up)


@_disable_dynamo  # torch.compiler.disable would import the compiler at once
def _uncompiled(work: Callable[[], None]) -> None:
    work()


_gate = _Gate()
_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all copies from a GPU: torch keeps the memory that was used on a stream for that stream."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


def _packed(sources: Sequence[torch.Tensor], num_bytes: int, device: torch.device) -> torch.Tensor | None:
    """Return the bytes of tensors one after another, in memory of the GPU; None if there is no room for them."""
    try:
        packed = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        rows = [_row(source) for source in sources]
        if rows:
            torch.cat(rows, out=packed)
    except torch.OutOfMemoryError:
        return None
    return packed


def _row(source: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes in the order of its elements, on its device."""
    source = _plain(source)
    if not source.is_contiguous():
        source = torch.clone(source, memory_format=torch.contiguous_format)
    return source.view(-1).view(torch.uint8)


def _plain(source: torch.Tensor) -> torch.Tensor:
    """Return a tensor what lies in whose memory are its values."""
    if source.is_neg() or source.is_conj():
        return torch.resolve_neg(torch.resolve_conj(source))
    return source


def _version(source: torch.Tensor) -> int:
    """Return a number that is another one once this tensor, or what shares its memory, was changed in place."""
    return 0 if source.is_inference() else source._version


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return what has happened once all that was asked of a stream so far is done; to wait takes no processor."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event

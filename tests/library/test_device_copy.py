"""Copies from a GPU beside the training: what is saved is the state of one moment, in whatever order streams come on.

The GPU is simulated; `test_gpu.py` asks a real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from simulated_gpu import DEVICE, SimulatedGpu, Stream
from torch._dynamo.testing import CompileCounter
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distckpt import devicecopy
from distckpt.devicecopy import DeviceCopy
from distckpt.errors import UsageError
from distckpt.fileplan import FilePlan
from distckpt.hostmemory import HostMemory
from distckpt.plan import Block, in_file_order
from distckpt.staging import Staged
from distckpt.tensors import DTYPE_NAMES, host_bytes

NUM_ORDERS = 300
# So small that a few numbers are a large tensor.
SIZES = {"SMALL_BYTES": 64, "PACKED_BYTES": 160, "PIECE_BYTES": 256, "ASIDE_BYTES": 96, "ARRIVAL_BYTES": 200}


def make_tensors() -> tuple[dict[str, torch.Tensor], set[str]]:
    """Return tensors by name, and which of them only a step changes."""
    tensors = {
        "weight": torch.randn(40, 5),
        "wide": torch.randn(6, 9).T,
        "huge": torch.randn(300),
        "huge turned": torch.randn(20, 15).T,
        "bias": torch.randn(5),
        "small turned": torch.randn(3, 4).T,
        "half": torch.randn(7).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        **{f"moment {i}": torch.randn(i + 1) for i in range(12)},
    }
    patient = set(tensors)
    tensors |= {
        "running mean": torch.randn(5),
        "running variance": torch.randn(11),
        "batches": torch.tensor(4),
        "signs": torch.randint(-100, 100, (7,), dtype=torch.int8),
        "switches": torch.randn(9) > 0,
        "quarters": torch.randn(33).to(torch.float8_e4m3fn),
        "beyond the room": torch.randn(15),
        "average": torch.randn(70),
        "average turned": torch.randn(9, 5).T,
    }
    return tensors, patient


class Training(torch.optim.Optimizer):
    """Asks a GPU to change tensors, as forward, backward and step do."""

    def __init__(self, gpu: SimulatedGpu, tensors: dict[str, torch.Tensor], patient: set[str]) -> None:
        super().__init__([torch.nn.Parameter(torch.ones(1))], {})
        self._gpu = gpu
        self._tensors = tensors
        self._patient = patient

    def forward(self) -> None:
        self._change({*self._tensors} - self._patient)

    def step(self, closure: Any = None) -> None:
        self._change(self._patient)

    def _change(self, names: set[str]) -> None:
        for name in sorted(names):
            self._gpu.change(self._tensors[name])


class Case:
    """One save of a training on a simulated GPU."""

    def __init__(self, gpu: SimulatedGpu, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(devicecopy, "torch", gpu.torch)
        patch.setattr(devicecopy, "_streams", {})
        patch.setattr(devicecopy, "_version", gpu.version)
        for name, value in SIZES.items():
            patch.setattr(devicecopy, name, value)
        self.gpu = gpu
        self.tensors, patient = make_tensors()
        self.training = Training(gpu, self.tensors, patient)
        blocks = [
            Block(name=name, dtype=DTYPE_NAMES[t.dtype], whole=t.shape, start=(0,) * t.dim(), shape=tuple(t.shape))
            for name, t in self.tensors.items()
        ]
        self.plan = FilePlan.of(in_file_order(blocks))
        self.memory = HostMemory(self.plan.num_bytes)
        self.memory.view[: len(self.plan.header)] = self.plan.header
        self.expected = bytearray(self.plan.num_bytes)
        self.copy = self._new_copy([block.name in patient for block in self.plan.blocks])

    def _new_copy(self, patient: list[bool]) -> DeviceCopy:
        views = [
            self.memory.tensor[offset : offset + block.num_bytes].view(self.tensors[block.name].dtype).view(block.shape)
            for block, offset in zip(self.plan.blocks, self.plan.offsets, strict=True)
        ]
        sources = [self.tensors[block.name] for block in self.plan.blocks]
        return DeviceCopy(self.memory, self.plan, views, sources, patient=patient, device=DEVICE)

    def save(self) -> Staged:
        """Begin a save; what the training has asked for until now is to be in it."""
        self.gpu.training.ask(self._remember)
        staged = Staged(self.memory.view[: self.plan.num_bytes], self.plan, self.copy)
        staged.begin()
        return staged

    def _remember(self) -> None:
        self.expected[: len(self.plan.header)] = self.plan.header
        for block, offset in zip(self.plan.blocks, self.plan.offsets, strict=True):
            self.expected[offset : offset + block.num_bytes] = host_bytes(self.tensors[block.name])

    def train(self) -> Iterator[None]:
        for _ in range(3):
            self.training.forward()
            yield
            self.training.step()
            yield


def wrong_bytes(case: Case) -> bool:
    """Save while the training goes on, each doing its next thing at any moment; say whether wrong bytes were taken."""
    order = case.gpu.random
    training = case.train()
    for _ in range(order.randrange(4)):  # the GPU has not done yet what it was asked for
        next(training)
    parts = case.save().parts()
    taken = bytearray()
    actors = {"training", "writing", "GPU"}
    while "writing" in actors or "training" in actors:
        match order.choice(sorted(actors)):
            case "training":
                if next(training, training) is training:
                    actors.remove("training")
            case "writing":
                part = next(parts, None)
                if part is None:
                    actors.remove("writing")
                else:
                    taken += part
                    if taken[-len(part) :] != case.expected[len(taken) - len(part) : len(taken)]:
                        return True
            case _:
                for _ in range(order.randrange(30)):
                    case.gpu.advance()
    case.gpu.finish()
    return not taken == case.expected == case.memory.view[: len(taken)]


@pytest.mark.parametrize("fullness", [0.0, 0.3, 1.0], ids=["room", "little room", "no room"])
def test_what_is_saved_is_of_one_moment_whatever_comes_first(fullness: float, monkeypatch: pytest.MonkeyPatch):
    for seed in range(NUM_ORDERS):
        case = Case(SimulatedGpu(seed, fullness=fullness), monkeypatch)
        assert not wrong_bytes(case), f"order {seed}"
        assert not devicecopy._gate._copies, f"order {seed}"


def nothing(*_: object) -> None:
    """Leave something out."""


@pytest.mark.parametrize(
    ("place", "name", "other"),
    [
        (devicecopy._Gate, "add", nothing),
        (Stream, "wait_stream", nothing),
        (DeviceCopy, "_copy_at_once", lambda self: set()),
        (devicecopy, "_packed", lambda sources, num_bytes, device: torch.zeros(num_bytes, dtype=torch.uint8)),
    ],
    ids=["steps do not wait", "copies do not wait", "nothing is copied at once", "nothing is put together"],
)
def test_a_copy_that_is_not_ordered_is_found_out(place: Any, name: str, other: object, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(place, name, other)
    monkeypatch.setattr(DeviceCopy, "_refuse_changes", nothing)  # it would find the first of them by itself
    assert any(wrong_bytes(Case(SimulatedGpu(seed), monkeypatch)) for seed in range(NUM_ORDERS))
    devicecopy._gate._copies.clear()


def test_what_changes_a_parameter_without_a_step_is_found_out_or_came_after_the_copy(monkeypatch: pytest.MonkeyPatch):
    refusals: list[str] = []
    for seed in range(NUM_ORDERS):
        case = Case(SimulatedGpu(seed), monkeypatch)
        monkeypatch.setattr(case.training, "step", lambda case=case: case.gpu.change(case.tensors["weight"]))
        try:
            assert not wrong_bytes(case), f"order {seed}"
        except UsageError as error:
            refusals.append(str(error))
        case.copy.wait()
    assert 0 < len(refusals) < NUM_ORDERS
    assert all("'weight' was changed while it was copied" in each and "overlap=False" in each for each in refusals)


def test_what_waits_for_the_copy_may_change_parameters(monkeypatch: pytest.MonkeyPatch):
    for seed in range(NUM_ORDERS):
        case = Case(SimulatedGpu(seed), monkeypatch)

        def read_into(case: Case = case) -> None:
            devicecopy.hold_up()
            case.gpu.change(case.tensors["weight"])

        monkeypatch.setattr(case.training, "step", read_into)
        assert not wrong_bytes(case), f"order {seed}"


def test_a_writer_that_comes_after_the_next_step_gets_everything(monkeypatch: pytest.MonkeyPatch):
    case = Case(SimulatedGpu(0), monkeypatch)
    staged = case.save()
    case.gpu.finish()
    case.training.step()
    case.gpu.finish()
    assert b"".join(staged.parts()) == case.expected


def test_others_may_watch_steps_too(monkeypatch: pytest.MonkeyPatch):
    case = Case(SimulatedGpu(0), monkeypatch)
    seen: list[str] = []
    staged = case.save()
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append("a step"))
    try:
        case.gpu.finish()
        case.training.step()  # ends the copy's part in the steps
        case.training.step()
    finally:
        handle.remove()
    assert seen == ["a step"] * 2
    assert b"".join(staged.parts()) == case.expected


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch 2.11's compiler imports what it deprecates
def test_a_compiled_step_waits_and_is_not_compiled_anew_for_each_copy(monkeypatch: pytest.MonkeyPatch):
    class Copy:
        num_waits = 0

        def hold_up(self) -> None:
            self.num_waits += 1

    monkeypatch.setattr(devicecopy, "_gate", gate := devicecopy._Gate())
    handles: list[Any] = []

    def registered(hook: Any) -> None:
        handles.append(register_optimizer_step_pre_hook(hook))

    monkeypatch.setattr(devicecopy, "register_optimizer_step_pre_hook", registered)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    compiler = CompileCounter()
    compiled = torch.compile(optimizer.step, backend=compiler)
    torch._dynamo.reset()
    try:
        for _ in range(12):
            parameter.grad = torch.ones(3)
            compiled()
            copy = Copy()
            gate.add(copy)  # type: ignore[arg-type]
            compiled()
            assert copy.num_waits == 1
            gate.remove(copy)  # type: ignore[arg-type]
    finally:
        for handle in handles:
            handle.remove()
    assert len(handles) == 1
    assert parameter.tolist() == pytest.approx([1 - 24 * 0.1] * 3)
    assert compiler.frame_count < 8


def test_small_tensors_are_put_together(monkeypatch: pytest.MonkeyPatch):
    case = Case(SimulatedGpu(0), monkeypatch)
    case.save()
    small = [name for name, tensor in case.tensors.items() if tensor.nbytes < SIZES["SMALL_BYTES"]]
    large = [tensor.nbytes for name, tensor in case.tensors.items() if name not in small]
    pieces = sum(-(-size // SIZES["PIECE_BYTES"]) for size in large)
    assert len(small) > 15
    assert case.gpu.num_copies <= pieces + 8
    case.copy.wait()


def test_memory_is_held_until_the_gpu_is_done_with_it_also_if_nobody_reads(monkeypatch: pytest.MonkeyPatch):
    case = Case(SimulatedGpu(0), monkeypatch)
    case.save()
    assert case.copy._memory is case.memory
    case.training.step()
    assert case.copy._memory is case.memory
    case.copy.wait()
    assert case.copy._memory is None
    assert not devicecopy._gate._copies
    assert case.memory.view[: case.plan.num_bytes] == case.expected
    case.copy.wait()  # once more does no harm


def test_a_copy_that_cannot_be_asked_for_is_waited_for_as_far_as_it_went(monkeypatch: pytest.MonkeyPatch):
    case = Case(SimulatedGpu(0), monkeypatch)

    def refuse(self: DeviceCopy, index: int, offset: int, size: int) -> Iterator[int]:
        raise RuntimeError("an error of the driver")

    monkeypatch.setattr(DeviceCopy, "_copy_large", refuse)
    with pytest.raises(RuntimeError, match="driver"):
        case.save()
    assert not devicecopy._gate._copies
    case.copy.wait()
    before = bytes(case.memory.view)
    case.gpu.finish()
    assert bytes(case.memory.view) == before


def test_values_that_are_negated_or_conjugated_by_a_mark_are_copied_as_values(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "test_device_copy.make_tensors",
        lambda: (
            {
                "negated": torch._neg_view(torch.randn(3)),
                "large negated": torch._neg_view(torch.randn(90)),
                "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
                "large conjugated": torch.randn(9, 5, dtype=torch.complex64).conj(),
            },
            {"negated", "large conjugated"},
        ),
    )
    case = Case(SimulatedGpu(0), monkeypatch)
    assert b"".join(case.save().parts()) == case.expected

"""Saves and restores of state on a GPU; each test runs on the CPU, too, where it has to hold as well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import distckpt
from distckpt import CheckpointManager
from distckpt.devicecopy import PIECE_BYTES, OnDevice
from distckpt.errors import CheckpointDamagedError, DistckptError, UsageError
from distckpt.storage import LocalStorage
from distckpt.tensors import host_bytes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAG_CYCLES = 200_000_000  # about a tenth of a second, by which the GPU is behind when a save begins
SPARE_BYTES = 100 << 20


class Net(nn.Module):
    """Convolutions whose normalization changes in each forward; on a GPU with a layer that is copied in pieces."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128), nn.Dropout(0.1)),
        )
        self.head = nn.Linear(128 * 16, PIECE_BYTES // (128 * 16 * 4) + 50 if device == "cuda" else 50)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images).flatten(1))


class Job:
    """A training on one device, with an average of the model that changes after each forward."""

    def __init__(self, device: str, *, seed: int = 0, channels_last: bool = False, tensor_lr: bool = False) -> None:
        torch.manual_seed(seed)
        self.device = device
        self.model = Net(device).to(
            device, memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        self.average = AveragedModel(self.model)
        self.lr = torch.tensor(1e-3, device=device) if tensor_lr else 1e-3
        capturable = tensor_lr and device == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, capturable=capturable)
        self.state: dict[str, Any] = {"model": self.model, "average": self.average, "optimizer": self.optimizer}

    def step(self) -> None:
        images = torch.randn(2, 3, 8, 8, device=self.device)
        self.optimizer.zero_grad()
        self.model(images).square().mean().backward()
        self.average.update_parameters(self.model)
        self.optimizer.step()

    def lag(self) -> None:
        """Let the GPU be behind with what it was asked for."""
        if self.device == "cuda":
            torch.cuda._sleep(LAG_CYCLES)

    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}

        def visit(path: str, node: Any) -> None:
            if isinstance(node, torch.Tensor):
                found[path] = node.detach().clone()
            elif isinstance(node, dict):
                for key, child in node.items():
                    visit(f"{path}.{key}", child)

        for key, each in self.state.items():
            visit(key, each.state_dict())
        return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(bytes(host_bytes(one[n])) == bytes(host_bytes(other[n])) for n in one)


def assert_holds(directory: Path, expected: dict[str, torch.Tensor], *, device: str) -> None:
    """See that the newest checkpoint of a directory is of a job that held these tensors."""
    found = Job(device, seed=1)
    found.step()
    distckpt.load(directory, found.state)
    assert same(found.tensors(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"overlap": False}, {"background": False}, {"layout": "full"}],
    ids=["as it is", "without overlap", "not in the background", "by rank 0"],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_save_is_of_one_moment_while_the_training_goes_on(
    device: str, settings: dict[str, Any], channels_last: bool, tmp_path: Path
):
    job = Job(device, channels_last=channels_last)
    job.step()
    with CheckpointManager(tmp_path, keep=10, **settings) as ckpt:
        expected = {}
        for step in (1, 2, 3):
            job.lag()
            job.step()
            expected[step] = job.tensors()
            ckpt.save(step, job.state)
            for _ in range(3):
                job.step()
        ckpt.wait()
        for step, tensors in expected.items():
            found = Job(device, seed=step, channels_last=channels_last)
            found.step()
            assert ckpt.restore(found.state, step=step) == step
            assert same(found.tensors(), tensors), step


@pytest.mark.parametrize("device", DEVICES)
def test_a_first_restore_reads_into_the_state_and_the_random_numbers_go_on(device: str, tmp_path: Path):
    job = Job(device)
    job.step()
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, job.state)
    drawn = torch.randn(5, device=device)
    later = Job(device, seed=7)
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.restore(later.state) == 1
    assert torch.equal(torch.randn(5, device=device), drawn)
    assert same(later.tensors(), job.tensors())
    assert all(tensor.device.type == device for tensor in later.model.state_dict().values())


@pytest.mark.parametrize("device", DEVICES)
def test_a_learning_rate_that_lies_on_the_device_may_change_before_the_next_step(device: str, tmp_path: Path):
    job = Job(device, tensor_lr=True)
    job.step()
    with CheckpointManager(tmp_path) as ckpt:
        job.lag()
        ckpt.save(1, job.state)
        assert isinstance(job.lr, torch.Tensor)
        job.lr.fill_(5.0)
    found = Job(device, seed=1, tensor_lr=True)
    distckpt.load(tmp_path, found.state)
    assert found.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_load_into_what_is_being_saved_spoils_no_save(device: str, tmp_path: Path):
    job = Job(device)
    job.step()
    distckpt.save(tmp_path / "other", job.state)
    job.step()
    expected = job.tensors()
    with CheckpointManager(tmp_path / "run") as ckpt:
        job.lag()
        ckpt.save(2, job.state)
        distckpt.load(tmp_path / "other", job.state)
    assert_holds(tmp_path / "run", expected, device=device)


@pytest.mark.gpu
def test_a_parameter_that_is_changed_by_hand_while_it_is_copied_is_found_out(tmp_path: Path):
    job = Job("cuda")
    job.step()
    with CheckpointManager(tmp_path) as ckpt:
        job.lag()
        ckpt.save(1, job.state)
        with torch.no_grad():
            job.model.head.weight.mul_(2)
        with pytest.raises(UsageError, match=r"'model\.head\.weight' was changed while it was copied"):
            ckpt.wait()
        ckpt.save(2, job.state)
        ckpt.wait()
        torch.cuda.synchronize()
    with CheckpointManager(tmp_path / "without", overlap=False) as ckpt:
        expected = job.tensors()
        job.lag()
        ckpt.save(1, job.state)
        with torch.no_grad():
            job.model.head.weight.mul_(2)
    assert_holds(tmp_path / "without", expected, device="cuda")


def odd_tensors(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    return {
        "empty": torch.empty(0, 3, device=device),
        "scalar": torch.tensor(3.5, device=device),
        "flags": made(1001) > 0,
        "half": made(5, 7, dtype=torch.bfloat16),
        "quarter": made(33, dtype=torch.float8_e4m3fn),
        "double": made(3, 5, dtype=torch.float64),
        "number": torch.arange(7, device=device),
        "turned": made(6, 4).T,
        "strided": torch.arange(40, device=device)[::3],
        "negated": torch._neg_view(made(3)),
        "conjugated": torch.complex(made(5), made(5)).conj(),
        "large": made(PIECE_BYTES // 2 + 77),
        "large turned": made(3000, 1000).T,
        "large conjugated": torch.complex(made(700, 900), made(700, 900)).conj(),
        "on the host": torch.arange(5.0),
        **{f"small {index}": made(index) for index in range(300)},
    }


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_of_all_kinds_come_back(device: str, tmp_path: Path):
    tensors = odd_tensors(device)
    distckpt.save(tmp_path / "one", {"x": tensors})
    state = {"x": {name: torch.zeros_like(tensor).contiguous() for name, tensor in tensors.items()}}
    distckpt.load(tmp_path / "one", state)
    for name, tensor in tensors.items():
        found = state["x"][name]
        assert found.device == tensor.device, name
        assert bytes(host_bytes(found)) == bytes(host_bytes(tensor)), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_load_changes_nothing_unless_all_is_good(device: str, tmp_path: Path):
    job = Job(device)
    job.step()
    distckpt.save(tmp_path / "one", job.state)
    [file] = (tmp_path / "one").rglob("*.safetensors")
    with file.open("r+b") as damaged:
        damaged.seek(-9, 2)
        damaged.write(b"X")
    other = Job(device, seed=3)
    other.step()
    before = other.tensors()
    with pytest.raises(CheckpointDamagedError):
        distckpt.load(tmp_path / "one", other.state)
    assert same(other.tensors(), before)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_go_to_the_device_of_the_model(device: str, tmp_path: Path):
    job = Job(device)
    job.step()
    distckpt.save(tmp_path / "one", job.state)
    model = distckpt.load_weights(tmp_path / "one", Net(device).to(device), key="model")
    assert all(parameter.device.type == device for parameter in model.parameters())
    assert same(model.state_dict(), job.model.state_dict())


@pytest.mark.parametrize("device", DEVICES)
def test_a_save_after_one_that_failed_is_good(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = Job(device)
    job.step()
    put: Callable[..., int] = LocalStorage.put
    failing = [True]

    def put_or_fail(self: LocalStorage, name: str, *args: Any, **kwargs: Any) -> int:
        if failing and name.endswith(".safetensors"):
            failing.pop()
            raise OSError("the disk is gone for a moment")
        return put(self, name, *args, **kwargs)

    monkeypatch.setattr(LocalStorage, "put", put_or_fail)
    with CheckpointManager(tmp_path) as ckpt:
        job.lag()
        ckpt.save(1, job.state)
        with pytest.raises((DistckptError, OSError), match="gone for a moment"):
            ckpt.wait()
        job.step()
        expected = job.tensors()
        ckpt.save(2, job.state)
        job.step()
    assert_holds(tmp_path, expected, device=device)


@pytest.mark.gpu
def test_a_save_takes_little_of_the_gpus_memory_and_the_host_does_not_wait_for_it(tmp_path: Path):
    job = Job("cuda")
    job.step()
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.prewarm(job.state)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job.lag()
        behind = torch.cuda.Event()
        behind.record()
        ckpt.save(1, job.state)
        assert not behind.query()  # the GPU has not even come to the save
        ckpt.wait()
        assert torch.cuda.max_memory_allocated() - before < SPARE_BYTES


@pytest.mark.gpu
def test_a_sample_that_was_taken_on_another_stream_is_waited_for():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LAG_CYCLES)
        made = torch.arange(1000, device="cuda")
        sample = OnDevice(made)
    assert bytes(sample.on_host()) == bytes(host_bytes(torch.arange(1000)))


@pytest.mark.gpu
def test_memory_for_saves_is_pinned():
    from distckpt.hostmemory import HostMemory

    memory = HostMemory(40 << 20, pinned=True)
    assert memory.is_pinned
    assert memory.tensor.is_pinned()
    assert memory.tensor[4096:8192].is_pinned()

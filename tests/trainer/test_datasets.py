from __future__ import annotations

import hashlib
import pickle
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from distckpt.errors import ConfigError
from distckpt.manager import SIGNALS
from distckpt.trainer.config import DataConfig
from distckpt.trainer.datasets import (
    Images,
    TestSamples,
    TrainSamples,
    build_loader,
    leave_signals_to_parent,
    open_images,
    read_digits,
    split_digits,
)
from distckpt.trainer.order import Plan, RankBatches


def write_cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Write two images a file in CIFAR-10's own format; torchvision is told the checksums of these files."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    chance = np.random.default_rng(0)
    pixels: dict[str, list[np.ndarray[Any, Any]]] = {}
    sums = {}
    for number, (name, _) in enumerate([*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]):
        data = chance.integers(0, 256, (2, 3072), dtype=np.uint8)
        pixels[name] = list(data.reshape(2, 3, 32, 32))
        content = pickle.dumps({"data": data, "labels": [number, (number + 1) % 10]})
        (base / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": [f"class {label}" for label in range(10)]})
    (base / "batches.meta").write_bytes(meta)
    for part in ("train_list", "test_list"):
        names = [name for name, _ in getattr(datasets.CIFAR10, part)]
        monkeypatch.setattr(datasets.CIFAR10, part, [[name, sums[name]] for name in names])
    facts = {**datasets.CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(datasets.CIFAR10, "meta", facts)
    return pixels


def write_folder(root: Path, split: str, classes: tuple[str, ...] = ("bird", "cat")) -> None:
    for label, name in enumerate(classes):
        folder = root / split / name
        folder.mkdir(parents=True)
        for number in range(3):
            pixels = np.full((40, 50, 3), 80 * label + number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")


def batches_of(
    images: Images, *, workers: int, done: int = 0, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return one rank's batches of two epochs of the first dozen samples."""
    plan = Plan(seed=seed, num_samples=12, global_batch_size=5, epochs=2)
    keys = RankBatches(plan=plan, done=done, rank=0, world_size=1, accumulate=1)
    return list(build_loader(TrainSamples(images, seed), keys, shape=images.shape, workers=workers, pin=False))


def test_the_digits_are_those_of_the_uci_test_set() -> None:
    images, labels = read_digits()
    assert (images.shape, labels.shape) == ((1797, 8, 8), (1797,))
    assert images.dtype == labels.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 16)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_a_fifth_of_every_digit_is_for_the_test_whatever_the_seed_of_a_run() -> None:
    _, labels = read_digits()
    train, test = split_digits(labels)
    assert sorted(train + test) == list(range(1797))
    shares = Counter(int(labels[index]) for index in test)
    assert all(abs(shares[digit] / int((labels == digit).sum()) - 0.2) < 0.005 for digit in range(10))
    assert test[:8] == [1, 2, 3, 13, 14, 15, 16, 24]


def test_digits_are_three_channels_of_32_pixels() -> None:
    images = open_images(DataConfig())
    assert images.facts() == {
        "classes": list("0123456789"),
        "num_classes": 10,
        "num_test": 359,
        "num_train": 1438,
        "shape": [3, 32, 32],
    }
    image, label = TestSamples(images)[0]
    assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, int(read_digits()[1][1]))
    assert torch.equal(image[0], image[2])
    assert -1 <= image.min() < image.max() <= 1


def test_augmentation_is_a_pure_function_of_seed_epoch_and_index() -> None:
    images = open_images(DataConfig())
    first, second = TrainSamples(images, 7), TrainSamples(images, 7)
    second[(0, 3)]
    assert torch.equal(first[(1, 5)][0], second[(1, 5)][0])
    others = [first[(2, 5)][0], TrainSamples(images, 8)[(1, 5)][0]]
    assert not any(torch.equal(first[(1, 5)][0], other) for other in others)
    plain = TrainSamples(open_images(DataConfig(augment=False)), 7)
    assert torch.equal(plain[(0, 5)][0], plain[(1, 5)][0])


@pytest.mark.parametrize("done", [0, 2])
def test_workers_change_nothing(done: int) -> None:
    images = open_images(DataConfig())
    alone, helped = batches_of(images, workers=0, done=done), batches_of(images, workers=2, done=done)
    assert len(alone) == len(helped) == 6 - done
    for ours, theirs in zip(alone, helped, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_no_global_random_number(workers: int) -> None:
    images = open_images(DataConfig())
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)
    batches_of(images, workers=workers)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert str(before[2]) == str(after[2])


def test_a_rank_without_samples_gets_an_empty_batch() -> None:
    images = open_images(DataConfig())
    plan = Plan(seed=0, num_samples=2, global_batch_size=2, epochs=1)
    keys = RankBatches(plan=plan, done=0, rank=2, world_size=3, accumulate=1)
    [(batch, labels)] = build_loader(TrainSamples(images, 0), keys, shape=images.shape, workers=0, pin=False)
    assert (batch.shape, labels.shape, labels.dtype) == ((0, 3, 32, 32), (0,), torch.int64)


def test_workers_leave_the_signals_that_end_a_job_to_their_parent() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        leave_signals_to_parent(0)
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
        assert signal.SIGUSR1 in SIGNALS
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_cifar10_is_read_from_its_own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = write_cifar10(tmp_path, monkeypatch)
    images = open_images(DataConfig(name="cifar10", root=str(tmp_path)))
    assert (images.num_train, images.num_test, images.shape) == (10, 2, (3, 32, 32))
    assert images.classes[3] == "class 3"
    image, label = TestSamples(images)[0]
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    expected = (torch.from_numpy(pixels["test_batch"][0]) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert label == 5
    torch.testing.assert_close(image, expected)
    varied = TrainSamples(images, 0)
    assert varied[(0, 1)][0].shape == (3, 32, 32)
    assert not torch.equal(varied[(0, 1)][0], varied[(1, 1)][0])


def test_damaged_cifar10_is_one_line_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"no whole CIFAR-10 in .*\nFix: --data\.download true"):
        open_images(DataConfig(name="cifar10", root=str(tmp_path)))


def test_a_folder_of_images_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path, "train")
    write_folder(tmp_path, "val")
    images = open_images(DataConfig(name="imagefolder", root=str(tmp_path), image_size=24))
    assert (images.num_train, images.num_test, images.classes) == (6, 6, ("bird", "cat"))
    image, label = TestSamples(images)[4]
    assert (image.shape, label) == ((3, 24, 24), 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(image[:, 0, 0], (torch.tensor(81 / 255) - mean) / std)
    assert TrainSamples(images, 0)[(0, 0)][0].shape == (3, 24, 24)


def test_a_folder_without_images_is_one_line_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root: no images in .*train: .*\nFix: give a folder"):
        open_images(DataConfig(name="imagefolder", root=str(tmp_path)))
    write_folder(tmp_path, "train")
    write_folder(tmp_path, "val", classes=("bird", "dog"))
    with pytest.raises(ConfigError, match="hold different classes"):
        open_images(DataConfig(name="imagefolder", root=str(tmp_path)))


def test_synthetic_data_has_the_wanted_size() -> None:
    images = open_images(DataConfig(name="synthetic", image_size=5, num_classes=4, num_train=9, num_test=3))
    assert (images.num_train, images.num_test, images.shape, len(images.classes)) == (9, 3, (3, 5, 5), 4)
    samples = [TestSamples(images)[index] for index in range(3)]
    assert all(0 <= label < 4 and image.shape == (3, 5, 5) for image, label in samples)
    assert torch.equal(samples[1][0], TestSamples(images)[1][0])
    assert not torch.equal(samples[0][0], TrainSamples(images, 0)[(0, 0)][0])
    with pytest.raises(IndexError):
        TestSamples(images)[3]

"""Training and test images by name.

Invariant: what a sample looks like depends on seed, epoch and index alone: each is augmented from a seed of its own,
so neither workers nor ranks nor prefetching matter, and no global random number is drawn.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode, v2

from distckpt.errors import ConfigError
from distckpt.manager import SIGNALS
from distckpt.trainer.config import DataConfig
from distckpt.trainer.order import Key, derive_seed

Sample = tuple[torch.Tensor, int]
Transform = Callable[[Any], torch.Tensor]

_SPLIT_SEED = 1998  # of the digits; no setting, so that every run is tested on the same samples
_TEST_FRACTION = 0.2
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """A data set: samples to train on, samples to test with.

    Attributes:
        train: (image, label) by index; an image is what `train_transform` takes.
        test: The same, never trained on.
        train_transform: Turns a training image into a float tensor; may draw from torch's random numbers.
        test_transform: The same without randomness.
        classes: The classes' names, by label.
        shape: Channels, height and width of a transformed image.
        mean: By channel, what a transformed image's 0 is as a shade, from 0 (black) to 1 (white).
        std: By channel, how much of that range a transformed image's 1 is.
    """

    train: Sequence[tuple[Any, int]] | Dataset[tuple[Any, int]]
    test: Sequence[tuple[Any, int]] | Dataset[tuple[Any, int]]
    train_transform: Transform
    test_transform: Transform
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def num_train(self) -> int:
        """Samples in an epoch."""
        return len(self.train)  # type: ignore[arg-type]  # torch's Dataset does not declare a length

    @property
    def num_test(self) -> int:
        """Samples to test with."""
        return len(self.test)  # type: ignore[arg-type]

    def facts(self) -> dict[str, Any]:
        """Return what must stay the same over a run, as plain JSON values."""
        return {
            "classes": list(self.classes),
            "num_classes": len(self.classes),
            "num_test": self.num_test,
            "num_train": self.num_train,
            "shape": list(self.shape),
        }


class TrainSamples(Dataset[Sample]):
    """Training samples by (epoch, index), each augmented from a seed of its own."""

    def __init__(self, images: Images, seed: int) -> None:
        self._images = images
        self._seed = seed

    def __getitem__(self, key: Key) -> Sample:
        """Return the transformed image and its label."""
        epoch, index = key
        # Only the CPU's generator is seeded: torch.manual_seed would reach into the GPUs' generators as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed("augment", self._seed, epoch, index))
            image, label = self._images.train[index]
            return self._images.train_transform(image), int(label)


class TestSamples(Dataset[Sample]):
    """Test samples by index."""

    __test__ = False  # no test for pytest to collect

    def __init__(self, images: Images) -> None:
        self._images = images

    def __getitem__(self, index: int) -> Sample:
        """Return the transformed image and its label."""
        image, label = self._images.test[index]
        return self._images.test_transform(image), int(label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collate:
    """Puts samples together to a batch, which may be empty.

    Attributes:
        shape: Channels, height and width of an image.
    """

    shape: tuple[int, int, int]

    def __call__(self, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images [batch, channels, height, width] float32, and labels [batch] int64."""
        if not samples:
            return torch.empty(0, *self.shape), torch.empty(0, dtype=torch.int64)
        return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def build_loader(
    samples: Dataset[Sample], batches: Iterable[list[Any]], *, shape: tuple[int, int, int], workers: int, pin: bool
) -> DataLoader[Any]:
    """Return a loader of the given batches that draws no global random number.

    Args:
        samples: What the batches' keys name.
        batches: Lists of keys.
        shape: Channels, height and width of an image.
        workers: Loader processes.
        pin: Whether batches are put into page-locked memory, for GPUs.

    Ranks: any.
    """
    return DataLoader(
        samples,
        batch_sampler=batches,  # torch asks for a Sampler, and uses any iterable
        num_workers=workers,
        collate_fn=Collate(shape=shape),
        pin_memory=pin,
        worker_init_fn=leave_signals_to_parent if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(0),  # seeds the workers' generators, which nobody draws from
    )


def leave_signals_to_parent(_worker: int) -> None:
    """Ignore the signals that ask the job to stop: the training process decides when its workers end.

    torchrun and schedulers signal whole process groups; a worker that died of it would take down the rank that is
    about to save.

    Ranks: any.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def download_images(config: DataConfig) -> None:
    """Download what the configuration asks to download, unless it is there already.

    Raises:
        ConfigError: It could not be downloaded.

    Ranks: one per host; the others open the images only once it has returned.
    """
    if config.name == "cifar10" and config.download:
        _cifar10_split(config, "train", download=True)


def open_images(config: DataConfig) -> Images:
    """Return the data set that a configuration names.

    Raises:
        ConfigError: The data is not there, or is damaged.

    Ranks: any.
    """
    match config.name:
        case "digits":
            return _digits(config)
        case "synthetic":
            return _synthetic(config)
        case "cifar10":
            return _cifar10(config)
        case "imagefolder":
            return _imagefolder(config)


def _digits(config: DataConfig) -> Images:
    small, labels = read_digits()
    train, test = split_digits(labels)
    # [1797, 1, 32, 32], about -1 to 1
    large = torch.nn.functional.interpolate(
        torch.from_numpy(small).float().div(8).sub(1).unsqueeze(1), size=(32, 32), mode="bilinear"
    )

    def pick(indices: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        return [(large[index].expand(3, 32, 32), int(labels[index])) for index in indices]

    shift = v2.RandomAffine(
        degrees=8, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR, fill=-1
    )
    return Images(
        train=pick(train),
        test=pick(test),
        train_transform=shift if config.augment else v2.Identity(),
        test_transform=v2.Identity(),
        classes=tuple("0123456789"),
        shape=(3, 32, 32),
    )


def read_digits() -> tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.uint8]]]:
    """Return the shipped digits: images [1797, 8, 8] uint8 from 0 to 16, and labels [1797] uint8.

    Ranks: any.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
        1998; the test set, CC BY 4.0.
    """
    with (
        resources.files("distckpt.trainer").joinpath("data/digits.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as held,
    ):
        return held["images"], held["labels"]


def split_digits(labels: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[list[int], list[int]]:
    """Return the indices to train on and to test with: a fifth of every class is for the test.

    Ranks: any.
    """
    chance = np.random.RandomState(_SPLIT_SEED)
    test: list[int] = []
    for digit in range(10):
        members = chance.permutation(np.flatnonzero(labels == digit))
        test.extend(int(index) for index in members[: round(len(members) * _TEST_FRACTION)])
    held_out = set(test)
    return [index for index in range(len(labels)) if index not in held_out], sorted(test)


class SyntheticSamples(Dataset[Sample]):
    """Noise with labels: as many samples as wanted, from nothing; each is a pure function of its index."""

    def __init__(self, *, size: int, shape: tuple[int, int, int], num_classes: int, purpose: str) -> None:
        self._size = size
        self._shape = shape
        self._num_classes = num_classes
        self._purpose = purpose

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._size

    def __getitem__(self, index: int) -> Sample:
        """Return noise around a level that tells the class."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        seed = derive_seed("synthetic", self._purpose, index)
        label = seed % self._num_classes
        noise = torch.randn(self._shape, generator=torch.Generator().manual_seed(seed))
        return noise.add_(2 * label / self._num_classes - 1), label


def _synthetic(config: DataConfig) -> Images:
    shape = (3, config.image_size, config.image_size)

    def make(size: int, purpose: str) -> SyntheticSamples:
        return SyntheticSamples(size=size, shape=shape, num_classes=config.num_classes, purpose=purpose)

    return Images(
        train=make(config.num_train, "train"),
        test=make(config.num_test, "test"),
        train_transform=v2.Identity(),
        test_transform=v2.Identity(),
        classes=tuple(str(label) for label in range(config.num_classes)),
        shape=shape,
    )


def _cifar10_split(config: DataConfig, split: Literal["train", "test"], *, download: bool) -> datasets.CIFAR10:
    try:
        return datasets.CIFAR10(config.root, train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            source="data.root",
            problem=f"no whole CIFAR-10 in {config.root}: {str(error).partition('. ')[0]}",
            fix="--data.download true, or give the folder that holds cifar-10-batches-py",
        ) from error


def _cifar10(config: DataConfig) -> Images:
    train = _cifar10_split(config, "train", download=False)
    as_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_CIFAR_MEAN, _CIFAR_STD)]
    varied = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if config.augment else []
    return Images(
        train=train,
        test=_cifar10_split(config, "test", download=False),
        train_transform=transforms.Compose([*varied, *as_tensor]),
        test_transform=transforms.Compose(as_tensor),
        classes=tuple(train.classes),
        shape=(3, 32, 32),
        mean=_CIFAR_MEAN,
        std=_CIFAR_STD,
    )


def _imagefolder(config: DataConfig) -> Images:
    folders = {}
    for split in ("train", "val"):
        try:
            folders[split] = datasets.ImageFolder(str(Path(config.root) / split))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(
                source="data.root",
                problem=f"no images in {Path(config.root) / split}: {str(error).splitlines()[0]}",
                fix="give a folder that holds train/<class>/ and val/<class>/",
            ) from error
    if folders["train"].classes != folders["val"].classes:
        raise ConfigError(source="data.root", problem=f"train and val in {config.root} hold different classes")
    size = config.image_size
    as_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)]
    plain = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
    varied = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()] if config.augment else plain
    return Images(
        train=folders["train"],
        test=folders["val"],
        train_transform=transforms.Compose([*varied, *as_tensor]),
        test_transform=transforms.Compose([*plain, *as_tensor]),
        classes=tuple(folders["train"].classes),
        shape=(3, size, size),
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
    )

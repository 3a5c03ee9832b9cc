"""Models by name: torchvision's classification models, and the small network of PyTorch's CIFAR-10 tutorial.

Invariant: a model that `build_model` returns has been seen to take one image and to give one number per class.
"""

from __future__ import annotations

import difflib

import torch
import torchvision
from torch import nn
from torch.nn import functional

from distckpt.errors import ConfigError
from distckpt.trainer.config import ModelConfig


class LeNet(nn.Module):
    """The convolutional network for 3x32x32 images that PyTorch's CIFAR-10 tutorial teaches.

    Source: https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch of images."""
        maps = self.pool(functional.relu(self.conv1(images)))  # [batch, 6, 14, 14]
        maps = self.pool(functional.relu(self.conv2(maps)))  # [batch, 16, 5, 5]
        hidden = functional.relu(self.fc1(maps.flatten(1)))
        logits: torch.Tensor = self.fc3(functional.relu(self.fc2(hidden)))
        return logits


def build_model(config: ModelConfig, *, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Return a freshly initialized model on the CPU; draws from torch's global random numbers.

    Args:
        config: Which model.
        num_classes: Number of logits.
        image_shape: Channels, height and width of an image.

    Raises:
        ConfigError: There is no such model, or it does not take these options or images.

    Ranks: any.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            logits = _make(config, num_classes, image_shape).eval()(torch.empty(1, *image_shape))
    except ConfigError:
        raise
    except Exception as error:
        shape = "x".join(str(size) for size in image_shape)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            source="model.name", problem=f"{config.name} does not work with images of {shape}: {reason}"
        ) from error
    if tuple(logits.shape) != (1, num_classes):
        raise ConfigError(source="model.name", problem=f"{config.name} does not give one number per class")
    return _make(config, num_classes, image_shape)


def trains_on_one_sample(config: ModelConfig, *, num_classes: int, image_shape: tuple[int, int, int]) -> bool:
    """Return whether a model that `build_model` accepts can train on a batch of one.

    Batch norm cannot where an image has shrunk to a single pixel: it would have one value to normalize.

    Ranks: any.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            _make(config, num_classes, image_shape).train()(torch.empty(1, *image_shape))
    except ValueError:
        return False
    return True


def _make(config: ModelConfig, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    if config.name == "lenet":
        if config.options:
            raise ConfigError(source="model.options", problem=f"lenet has none, found {', '.join(config.options)}")
        return LeNet(num_classes)
    known = torchvision.models.list_models(module=torchvision.models)
    if config.name not in known:
        near = difflib.get_close_matches(config.name, ["lenet", *known], n=1)
        hint = f"did you mean {near[0]}?" if near else "there are lenet and torchvision's classification models"
        raise ConfigError(source="model.name", problem=f"unknown model {config.name}; {hint}")
    options = _usual_options(config.name, image_shape) | config.options
    model: nn.Module = torchvision.models.get_model(config.name, weights=None, num_classes=num_classes, **options)
    return model


def _usual_options(name: str, image_shape: tuple[int, int, int]) -> dict[str, object]:
    """Return what a model needs to take such images and to give logits alone."""
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        return {"image_size": image_shape[1]}
    if name == "maxvit_t":
        return {"input_size": image_shape[1:]}
    return {}

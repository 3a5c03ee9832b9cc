from __future__ import annotations

import pytest
import torch

from distckpt.errors import ConfigError
from distckpt.trainer.config import ModelConfig
from distckpt.trainer.models import LeNet, build_model, trains_on_one_sample

SMALL = (3, 32, 32)
USUAL = (3, 224, 224)


def test_lenet_is_the_network_of_the_tutorial() -> None:
    model = build_model(ModelConfig(name="lenet"), num_classes=10, image_shape=SMALL)
    assert [tuple(parameter.shape) for parameter in model.parameters()] == [
        *((6, 3, 5, 5), (6,), (16, 6, 5, 5), (16,)),
        *((120, 400), (120,), (84, 120), (84,), (10, 84), (10,)),
    ]
    assert model(torch.zeros(7, *SMALL)).shape == (7, 10)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", SMALL),
        ("resnet50", USUAL),
        ("vgg16", SMALL),
        ("vit_b_16", SMALL),
        ("vit_b_16", USUAL),
        ("googlenet", USUAL),
        ("inception_v3", USUAL),
        ("mobilenet_v3_small", SMALL),
        ("swin_t", USUAL),
    ],
)
def test_torchvision_models_give_one_number_per_class(name: str, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name), num_classes=7, image_shape=shape)
        assert model.train()(torch.empty(2, *shape)).shape == (2, 7)


def test_options_reach_the_model() -> None:
    model = build_model(ModelConfig(name="squeezenet1_1", options={"dropout": 0.25}), num_classes=3, image_shape=SMALL)
    assert [part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)] == [0.25]


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (ModelConfig(name="resnet19"), SMALL, "unknown model resnet19; did you mean resnet1"),
        (ModelConfig(name="zzz"), SMALL, "unknown model zzz; there are lenet and torchvision's"),
        (ModelConfig(name="fasterrcnn_resnet50_fpn"), SMALL, "unknown model"),
        (ModelConfig(name="lenet"), USUAL, "lenet does not work with images of 3x224x224: "),
        (ModelConfig(name="alexnet"), SMALL, "alexnet does not work with images of 3x32x32: "),
        (ModelConfig(name="resnet18", options={"nonsense": 1}), SMALL, "nonsense"),
        (ModelConfig(name="lenet", options={"dropout": 1}), SMALL, "lenet has none, found dropout"),
    ],
)
def test_what_does_not_fit_is_one_line(config: ModelConfig, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build_model(config, num_classes=10, image_shape=shape)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_model(ModelConfig(), num_classes=10, image_shape=SMALL)
    torch.manual_seed(1)
    second = LeNet(10)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_batch_norm_over_a_single_pixel_cannot_train_on_one_sample() -> None:
    def trains(name: str, shape: tuple[int, int, int]) -> bool:
        return trains_on_one_sample(ModelConfig(name=name), num_classes=10, image_shape=shape)

    assert not trains("resnet18", SMALL)
    assert trains("resnet18", (3, 64, 64))
    assert trains("lenet", SMALL)

"""A module's state, gone through once, is what its own `state_dict` says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from distckpt.modules import module_state, plain_names


class _Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


class _OwnLoad(nn.Linear):
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)


def passing_buffer() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("passing", torch.ones(2), persistent=False)
    module.register_buffer("nothing", None)
    return module


def hooked(register: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = nn.Sequential(nn.Linear(2, 2))
        getattr(module[0], register)(lambda *_: None)
        return module

    return make


def shared() -> nn.Module:
    one = nn.Linear(2, 2)
    return nn.Sequential(one, nn.Sequential(one, nn.ReLU()))


def overridden() -> nn.Module:
    module = nn.Linear(2, 2)
    module.state_dict = lambda *_, **__: {"weight": torch.zeros(1)}
    return module


def wrapped() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"), nn.DataParallel(nn.BatchNorm1d(2)))


SAVED_AS_STOCK = {
    "resnet": lambda: torchvision.models.resnet18(num_classes=2),
    "transformer": lambda: nn.Transformer(16, 2, 1, 1),
    "passing buffer": passing_buffer,
    "shared": shared,
    "wrapped": wrapped,
    "parametrized": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
}
OF_THEIR_OWN = {
    "own load": lambda: nn.Sequential(_OwnLoad(2, 2)),
    "load hook": hooked("register_load_state_dict_pre_hook"),
    "extra state": lambda: nn.Sequential(_Extra(2, 2)),
    "save hook": hooked("register_state_dict_post_hook"),
    "save pre-hook": hooked("register_state_dict_pre_hook"),
    "overridden": overridden,
    "script": lambda: torch.jit.script(nn.Linear(2, 2)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*SAVED_AS_STOCK, *OF_THEIR_OWN])
def test_a_modules_state_is_its_state_dict_under_plain_names(name: str):
    module = {**SAVED_AS_STOCK, **OF_THEIR_OWN}[name]()
    content, buffers, is_stock = module_state(module)
    plain = plain_names(module)
    expected = {plain(key): value for key, value in module.state_dict().items()}

    assert is_stock is (name in SAVED_AS_STOCK)
    assert list(content) == list(expected)
    assert buffers == {plain(key) for key, _ in module.named_buffers(remove_duplicate=False)} & expected.keys()
    for key, value in expected.items():
        assert type(content[key]) is type(value)
        if isinstance(value, torch.Tensor):
            assert torch.equal(content[key], value)
            assert not content[key].requires_grad
            assert name == "overridden" or content[key].data_ptr() == value.data_ptr()


def test_a_hook_that_is_added_later_is_seen():
    module = nn.Sequential(nn.Linear(2, 2))
    assert module_state(module).is_stock
    module[0].register_state_dict_post_hook(lambda _, state, prefix, __: state.update({prefix + "more": torch.ones(1)}))
    assert "0.more" in module_state(module).content

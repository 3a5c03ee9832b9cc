"""What one process may save, how it comes back, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import distckpt
from distckpt import PerRank
from distckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    RankFailedError,
    StateLoadError,
    StateMismatchError,
    UnsupportedStateError,
    UsageError,
)
from distckpt.tensors import DTYPES


def moved(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, name: str):
    size = torch.empty(0, dtype=DTYPES[name]).element_size()
    data = torch.randint(0, 2 if name == "BOOL" else 256, (6 * size,), dtype=torch.uint8)
    state = {"x": data.view(DTYPES[name]).reshape(2, 3), "scalar": data[:size].view(DTYPES[name])[0]}
    distckpt.save(tmp_path, state)
    found = {"x": moved(state["x"]), "scalar": moved(state["scalar"])}
    distckpt.load(tmp_path, found)
    for key, tensor in state.items():
        assert torch.equal(found[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[::3],
        torch.empty(0, 5),
        torch.tensor(3),
        torch.arange(4).expand(3, 4),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.complex(torch.ones(3), torch.arange(3.0)).conj(),
        torch.full((3,), float("nan")),
        torch.arange(20_000.0).reshape(*[1] * 40, 20_000),
        torch.arange(40_000).to(torch.bfloat16).reshape(2, 20_000),
    ],
    ids=[
        *("transposed", "strided", "empty", "scalar", "expanded", "channels last", "conjugate", "nan"),
        *("of many dimensions", "large and unknown to NumPy"),
    ],
)
def test_odd_tensors_come_back_the_same(tmp_path: Path, tensor: torch.Tensor):
    distckpt.save(tmp_path, {"x": tensor})
    found = {"x": torch.zeros(tensor.shape, dtype=tensor.dtype)}
    distckpt.load(tmp_path, found)
    assert torch.equal(found["x"].nan_to_num(7.0), tensor.nan_to_num(7.0))


def test_every_data_file_opens_with_safetensors(tmp_path: Path):
    model = nn.Linear(3, 2).bfloat16()
    distckpt.save(tmp_path, {"model": model, "c": torch.ones(2, dtype=torch.complex64)})
    (file,) = tmp_path.rglob("*.safetensors")
    with safe_open(str(file), framework="pt") as opened:
        assert torch.equal(opened.get_tensor("model.weight"), model.weight)
        assert torch.equal(torch.view_as_complex(opened.get_tensor("c")), torch.ones(2, dtype=torch.complex64))


def test_a_fresh_optimizer_gets_its_full_state(tmp_path: Path):
    state = jobs.build()
    jobs.train(state, 3)
    distckpt.save(tmp_path, state)
    fresh = jobs.build(seed=9)
    assert not fresh["optimizer"].state
    distckpt.load(tmp_path, fresh)
    assert jobs.facts(fresh) == jobs.facts(state)
    jobs.seeded(3)
    jobs.train(state, 2)
    jobs.seeded(3)
    jobs.train(fresh, 2)
    assert jobs.facts(fresh) == jobs.facts(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, centered=True),
        torch.optim.LBFGS,
        torch.optim.Rprop,
    ],
    ids=["sgd", "adam", "adafactor", "rmsprop", "lbfgs", "rprop"],
)
def test_optimizers_go_on_as_if_nothing_had_happened(tmp_path: Path, make: Any):
    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, make(model.parameters())

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    model, optimizer = built()
    go_on(model, optimizer)
    distckpt.save(tmp_path, {"model": model, "optimizer": optimizer})
    go_on(model, optimizer)
    again, fresh = built()
    distckpt.load(tmp_path, {"model": again, "optimizer": fresh})
    go_on(again, fresh)
    assert repr(again.state_dict()) == repr(model.state_dict())
    assert repr(fresh.state_dict()) == repr(optimizer.state_dict())


def test_optimizer_states_in_another_dtype_than_their_parameter_are_not_cast(tmp_path: Path):
    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 3).bfloat16()
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = built()
    master = torch.full((3, 3), 1 / 3)
    optimizer.state[model.weight]["master"] = master
    distckpt.save(tmp_path, {"optimizer": optimizer})
    again, fresh = built()
    distckpt.load(tmp_path, {"optimizer": fresh})
    assert torch.equal(fresh.state[again.weight]["master"], master)


SCHEDULERS = {
    "multistep": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "plateau": torch.optim.lr_scheduler.ReduceLROnPlateau,
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_come_back_the_same(tmp_path: Path, name: str):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)
    scheduler = SCHEDULERS[name](optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step(*([0.5] if name == "plateau" else []))
    distckpt.save(tmp_path, {"scheduler": scheduler})
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5)
    fresh = SCHEDULERS[name](other)
    distckpt.load(tmp_path, {"scheduler": fresh})
    assert fresh.state_dict() == scheduler.state_dict()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4)
        self.head = nn.Linear(4, 50, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_are_stored_once_and_load_untied_too(tmp_path: Path):
    model = Tied()
    facts = distckpt.save(tmp_path, {"model": model}, rng=False)
    assert facts.num_bytes == 4096 + 50 * 4 * 4
    again = Tied()
    distckpt.load(tmp_path, {"model": again})
    assert again.head.weight is again.embedding.weight
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(50, 4))
    distckpt.load(tmp_path, {"model": untied})
    for found in (again.head.weight, untied.head.weight, untied.embedding.weight):
        assert torch.equal(found, model.embedding.weight)


class WithExtra(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_a_modules_extra_state_comes_back(tmp_path: Path):
    distckpt.save(tmp_path, {"model": nn.Sequential(WithExtra({"scale": torch.ones(3), "history": [1, (2, "x")]}))})
    model = nn.Sequential(WithExtra(None))
    distckpt.load(tmp_path, {"model": model})
    assert model[0].extra["history"] == [1, (2, "x")]
    assert torch.equal(model[0].extra["scale"], torch.ones(3))


def test_a_compiled_model_is_saved_under_its_plain_names(tmp_path: Path):
    inner = nn.Linear(2, 2)
    # "eager": nothing is run, and importing the usual backend warns in torch 2.11.
    model = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"), nn.ReLU())
    distckpt.save(tmp_path, {"model": torch.compile(model, backend="eager"), "inner": inner})
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    distckpt.load(tmp_path, {"model": plain}, only=["model"])
    assert torch.equal(plain[0].weight, dict(model.named_parameters())["0._orig_mod.weight"])
    parts = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"), nn.ReLU())
    compiled = torch.compile(parts, backend="eager")
    distckpt.load(tmp_path, {"model": compiled}, only=["model"])
    assert torch.equal(dict(compiled.named_parameters())["_orig_mod.0._orig_mod.weight"], plain[0].weight)


def test_several_models_in_dicts_and_lists_come_back(tmp_path: Path):
    def built() -> dict[str, Any]:
        return {"gan": {"g": nn.Linear(2, 3), "d": nn.Linear(3, 1)}, "experts": [nn.Linear(2, 2), nn.Linear(2, 2)]}

    saved, found = built(), built()
    distckpt.save(tmp_path, saved)
    distckpt.load(tmp_path, found)
    assert torch.equal(found["gan"]["d"].weight, saved["gan"]["d"].weight)
    assert torch.equal(found["experts"][1].weight, saved["experts"][1].weight)


def test_values_are_given_back_in_the_users_own_containers(tmp_path: Path):
    distckpt.save(tmp_path, {"epoch": 7, "extra": {"loss": 0.5, "new": [1]}, "log": [1, 2], "own": PerRank([5])})
    extra, log = {"loss": 0.0, "stale": 1}, [0]
    state = {"epoch": 0, "extra": extra, "log": log, "own": PerRank([0])}
    distckpt.load(tmp_path, state)
    assert state["epoch"] == 7
    assert extra == {"loss": 0.5, "new": [1]}
    assert log == [1, 2]
    assert state["own"].value == [5]


def refused(tmp_path: Path, state: dict[str, Any], **options: Any) -> str:
    """Load into a state that does not fit, check that nothing changed, and return the message."""
    before = {key: repr(getattr(value, "state_dict", lambda value=value: value)()) for key, value in state.items()}
    with pytest.raises((StateMismatchError, UsageError)) as caught:
        distckpt.load(tmp_path, state, **options)
    after = {key: repr(getattr(value, "state_dict", lambda value=value: value)()) for key, value in state.items()}
    assert after == before
    return str(caught.value)


def net(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes))


def test_a_state_that_does_not_fit_is_refused_with_one_report_and_untouched(tmp_path: Path):
    distckpt.save(tmp_path, {"model": net(), "optimizer": torch.optim.Adam(net().parameters()), "epoch": 1})
    text = refused(tmp_path, {"model": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 3))})
    assert "model.2.weight: the checkpoint holds (10, 8) float32, the state expects (3, 8) float32" in text
    assert "missing in the checkpoint: model.3.bias (3,) float32" in text
    assert "not in the state: optimizer (optimizer)" in text
    assert "not in the state: epoch (value)" in text
    assert "\nFix: " in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": net().double()}, "the checkpoint holds (8, 4) float32, the state expects (8, 4) float64"),
        ({"model": nn.Sequential(nn.Linear(4, 8))}, "not in the state: model.2.weight (10, 8) float32"),
        ({"more": 1}, "missing in the checkpoint: more"),
        ({"x": torch.zeros(3)}, "x: the checkpoint holds (2,) float32, the state expects (3,) float32"),
        ({"x": torch.zeros(2).int()}, "x: the checkpoint holds (2,) float32, the state expects (2,) int32"),
        ({"optimizer": torch.optim.Adam(net()[0].parameters())}, "parameter groups of [4] parameters"),
    ],
    ids=["dtype", "unexpected", "missing", "shape", "tensor dtype", "optimizer"],
)
def test_each_kind_of_mismatch_is_reported(tmp_path: Path, change: dict[str, Any], words: str):
    model = net()
    state = {"model": model, "optimizer": torch.optim.Adam(model.parameters()), "x": torch.ones(2)}
    distckpt.save(tmp_path, state)
    assert words in refused(tmp_path, {**state, **change})


def test_skip_and_only_pick_entries_for_a_warm_start(tmp_path: Path):
    old = net()
    distckpt.save(tmp_path, {"model": old, "optimizer": torch.optim.Adam(old.parameters()), "epoch": 9})
    new = net(3)
    head = new[2].weight.clone()
    distckpt.load(tmp_path, {"model": new}, only=["model.*"], skip=["model.2.*"])
    assert torch.equal(new[0].weight, old[0].weight)
    assert torch.equal(new[2].weight, head)
    state: dict[str, Any] = {"model": net(), "epoch": 0}
    distckpt.load(tmp_path, state, skip=["optimizer", "model"])
    assert state["epoch"] == 9


def test_a_pattern_that_fits_nothing_is_refused(tmp_path: Path):
    distckpt.save(tmp_path, {"model": net()})
    assert "'modle.*' fits no entry" in refused(tmp_path, {"model": net()}, skip=["modle.*"])
    assert "only is a string" in refused(tmp_path, {"model": net()}, only="model")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: 0, "'a.b' is a builtins.function"),
        (torch.ones(2).to_sparse(), "'a.b' is a sparse tensor"),
        (torch.ones(2, device="meta"), "'a.b' is on the meta device"),
        (nn.LazyLinear(3), "'a.b.weight' is not initialized yet"),
        (np.array([object()]), "'a.b' is a NumPy array of dtype object"),
        ({1, 2}, "'a.b' is a builtins.set"),
    ],
    ids=["function", "sparse", "meta", "lazy", "objects", "set"],
)
def test_what_cannot_be_saved_is_refused_by_key_and_leaves_nothing(tmp_path: Path, value: Any, words: str):
    with pytest.raises(UnsupportedStateError) as caught:
        distckpt.save(tmp_path / "one", {"a": {"b": value}, "ok": torch.ones(3)})
    assert words in str(caught.value)
    assert not (tmp_path / "one").exists()


def test_two_entries_of_one_name_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"two entries of the state have the name 'a\.b'"):
        distckpt.save(tmp_path, {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})


@pytest.mark.parametrize("state", [[1], {3: 1}, {"_rng": 1}, None], ids=repr)
def test_a_state_that_is_no_dict_of_names_is_refused(tmp_path: Path, state: Any):
    with pytest.raises(UsageError):
        distckpt.save(tmp_path, state)


def test_a_checkpoint_is_never_overwritten(tmp_path: Path):
    distckpt.save(tmp_path, {"x": 1})
    with pytest.raises(CheckpointExistsError, match="by process"):
        distckpt.save(tmp_path, {"x": 2})
    state = {"x": 0}
    distckpt.load(tmp_path, state)
    assert state["x"] == 1


def test_loading_where_nothing_is_says_so(tmp_path: Path):
    with pytest.raises(CheckpointNotFoundError, match="empty, or not there"):
        distckpt.load(tmp_path / "none", {"x": 1})


def test_generators_are_left_alone_if_so_wished(tmp_path: Path):
    jobs.seeded(1)
    distckpt.save(tmp_path, {"x": 1})
    expected = jobs.draws()
    distckpt.load(tmp_path, {"x": 1}, rng=False)
    assert jobs.draws() != expected
    distckpt.load(tmp_path, {"x": 1})
    assert jobs.draws() == expected


def test_an_error_while_objects_load_is_raised(tmp_path: Path):
    class Odd:
        def state_dict(self) -> dict[str, int]:
            return {"a": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise ValueError("planned")

    distckpt.save(tmp_path, {"odd": Odd()})
    with pytest.raises((RankFailedError, StateLoadError), match="planned"):
        distckpt.load(tmp_path, {"odd": Odd()})

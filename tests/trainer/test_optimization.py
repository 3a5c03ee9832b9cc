from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distckpt.errors import ConfigError
from distckpt.trainer.config import LoopConfig, OptimizerConfig, ScheduleConfig
from distckpt.trainer.optimization import Precision, apply_settings, build_optimizer, build_scheduler, check_device
from distckpt.trainer.order import Plan

PLAN = Plan(seed=0, num_samples=100, global_batch_size=10, epochs=4)  # 40 steps


def rates(schedule: ScheduleConfig, *, lr: float = 0.5, plan: Plan = PLAN) -> list[float]:
    """Return the learning rate of each step."""
    config = OptimizerConfig(lr=lr)
    optimizer = build_optimizer(config, nn.Linear(1, 1))
    scheduler = build_scheduler(schedule, optimizer, lr=lr, plan=plan)
    found = []
    for _ in range(plan.total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_a_cosine_rises_then_falls_to_its_end() -> None:
    found = rates(ScheduleConfig(name="cosine", warmup_steps=5, final_lr=0.1))
    assert found[:6] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert found[5:] == sorted(found[5:], reverse=True)
    assert found[5 + 7] == pytest.approx(0.1 + 0.4 * 0.5 * (1 + math.cos(math.pi * 7 / 35)))
    assert found[-1] == pytest.approx(0.1, abs=0.001)


def test_steps_go_down_by_gamma_at_epochs() -> None:
    found = rates(ScheduleConfig(name="step", warmup_steps=0, step_epochs=2, gamma=0.1))
    assert found == pytest.approx([0.5] * 20 + [0.05] * 20)


def test_constant_stays_after_the_warm_up() -> None:
    assert rates(ScheduleConfig(name="constant", warmup_steps=2)) == pytest.approx([0.25] + [0.5] * 39)


def test_a_warm_up_longer_than_the_run_ends_with_it() -> None:
    found = rates(ScheduleConfig(warmup_steps=1000))
    assert found[-1] == 0.5
    assert found == sorted(found)


@pytest.mark.parametrize("config", [OptimizerConfig(name="sgd"), OptimizerConfig(name="adamw", lr=1e-3)])
def test_settings_that_did_not_change_change_nothing(config: OptimizerConfig) -> None:
    optimizer = build_optimizer(config, nn.Linear(2, 2))
    scheduler = build_scheduler(ScheduleConfig(warmup_steps=3), optimizer, lr=config.lr, plan=PLAN)
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    before = optimizer.state_dict()["param_groups"], scheduler.state_dict()
    apply_settings(config, optimizer, scheduler)
    assert (optimizer.state_dict()["param_groups"], scheduler.state_dict()) == before


def test_a_changed_rate_holds_after_a_restore() -> None:
    old, new = OptimizerConfig(lr=0.5), OptimizerConfig(lr=0.2, momentum=0.5, weight_decay=0.1)
    schedule = ScheduleConfig(name="constant", warmup_steps=0)
    before = build_optimizer(old, nn.Linear(2, 2))
    optimizer = build_optimizer(new, nn.Linear(2, 2))
    scheduler = build_scheduler(schedule, optimizer, lr=new.lr, plan=PLAN)
    scheduler.load_state_dict(build_scheduler(schedule, before, lr=old.lr, plan=PLAN).state_dict())
    optimizer.load_state_dict(before.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    apply_settings(new, optimizer, scheduler)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.5, 0.1)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_the_optimizer_is_the_one_that_was_asked_for() -> None:
    sgd = build_optimizer(OptimizerConfig(nesterov=True, momentum=0.7), nn.Linear(1, 1))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["nesterov"], sgd.defaults["momentum"]) == (True, 0.7)
    adamw = build_optimizer(OptimizerConfig(name="adamw", betas=(0.5, 0.6), eps=1e-3), nn.Linear(1, 1))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["betas"], adamw.defaults["eps"]) == ((0.5, 0.6), 1e-3)


@pytest.mark.parametrize("config", [OptimizerConfig(name="sgd"), OptimizerConfig(name="adamw", lr=1e-3)])
def test_a_first_step_that_fp16_skips_is_no_reason_to_warn(config: OptimizerConfig) -> None:
    layer = nn.Linear(2, 2)
    before = [parameter.clone() for parameter in layer.parameters()]
    optimizer = build_optimizer(config, layer)
    build_scheduler(ScheduleConfig(), optimizer, lr=config.lr, plan=PLAN).step()
    assert optimizer.state_dict()["state"] == {}
    assert all(torch.equal(old, new) for old, new in zip(before, layer.parameters(), strict=True))


def test_bf16_computes_in_bf16_and_fp32_does_not() -> None:
    layer, batch = nn.Linear(4, 4), torch.ones(2, 4)
    for name, dtype in [("bf16", torch.bfloat16), ("fp32", torch.float32)]:
        precision = Precision(name, torch.device("cpu"))
        with precision.autocast():
            assert layer(batch).dtype == dtype
        assert not precision.scaler.is_enabled()
        assert precision.scaler.state_dict() == {}


@pytest.mark.parametrize("config", [LoopConfig(precision="fp16"), LoopConfig(sync_batchnorm=True)])
def test_what_needs_a_gpu_is_refused_on_a_cpu(config: LoopConfig) -> None:
    with pytest.raises(ConfigError, match="GPU"):
        check_device(config, torch.device("cpu"))
    check_device(config, torch.device("cuda"))

"""Whole trainings, on real ranks: what they promise over ranks, restarts and signals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPools
from safetensors.torch import load_file

import distckpt
from distckpt.catalog import locate
from distckpt.errors import CheckpointNotFoundError, ConfigError, RankFailedError
from distckpt.leasefiles import standing
from distckpt.logfolder import EVALUATION_NAME, LOG_NAME
from distckpt.retention import Retention
from distckpt.storage import open_storage
from distckpt.trainer import (
    CheckpointConfig,
    DataConfig,
    FitResult,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    Trainer,
)

ROOT = Path(__file__).parents[2]
SMALL = DataConfig(name="synthetic", image_size=32, num_classes=6, num_train=23, num_test=9)


def small(directory: Path, *, data: DataConfig = SMALL, **train: Any) -> TrainConfig:
    """Return a training of a few steps: 4 an epoch, the last of them with 2 samples."""
    settings: dict[str, Any] = {"epochs": 2, "global_batch_size": 7, "log_every": 1, **train}
    return TrainConfig(
        data=data,
        schedule=ScheduleConfig(warmup_steps=3),
        train=LoopConfig(**settings),
        checkpoint=CheckpointConfig(directory=str(directory)),
    )


def fit(config: TrainConfig, *, stop_after: int | None = None) -> FitResult:
    """Train on this rank; once `stop_after` steps are logged, the last rank gets a SIGTERM."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if stop_after is not None and rank == world_size - 1:
        threading.Thread(target=ask_to_stop, args=(config, stop_after), daemon=True).start()
    return Trainer(config).fit()


def fit_and_be_asked_at_once(config: TrainConfig) -> FitResult:
    """Train on this rank; the allocation ends so soon that not one step is worth beginning."""
    ends_soon = dataclasses.replace(config.checkpoint, ends_at=time.time() + 5)
    return Trainer(dataclasses.replace(config, checkpoint=ends_soon)).fit()


def ask_to_stop(config: TrainConfig, stop_after: int) -> None:
    log = Path(config.checkpoint.directory) / LOG_NAME
    while not (log.exists() and log.read_text().count('"train"') >= stop_after):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


def contents(directory: str | Path, step: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return all state in a checkpoint: what stands in its manifest, and what in its data files."""
    folder, manifest = locate(open_storage(directory), step=step)
    trees = {key: dataclasses.asdict(entry) for key, entry in manifest.objects.items()}
    tensors: dict[str, torch.Tensor] = {}
    for file in manifest.files:
        tensors |= load_file(Path(directory) / folder / file.name)
    return trees, tensors


def assert_equal_to_the_bit(first: Path, second: Path, step: int) -> None:
    (trees, tensors), (other_trees, other_tensors) = contents(first, step), contents(second, step)
    assert trees == other_trees
    assert tensors.keys() == other_tensors.keys()
    assert len(tensors) > 10
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, other_tensors[name])] == []
    for name in (LOG_NAME, EVALUATION_NAME):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def assert_close(first: Path, second: Path) -> None:
    weights, others = (Trainer.load_model(str(path)).state_dict() for path in (first, second))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-6)
    logs = [[json.loads(line) for line in (path / LOG_NAME).read_text().splitlines()] for path in (first, second)]
    assert [[line["step"], line.get("samples")] for line in logs[0]] == [
        [line["step"], line.get("samples")] for line in logs[1]
    ]
    losses = [[line["loss"] for line in log if line["kind"] == "train"] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gradients_weigh_samples_whatever_the_number_of_ranks(ranks: RankPools, tmp_path: Path) -> None:
    alone, two, three, parts = (tmp_path / name for name in ("alone", "two", "three", "parts"))
    fit(small(alone))
    ranks(2).run(fit, small(two, accumulate=2, clip_grad_norm=100.0))  # 7 samples: 4 and 3, in 2 passes
    ranks(3).run(fit, small(three))  # the last batch has 2 samples: rank 2 has none
    fit(small(parts, accumulate=3))
    for other in (two, three, parts):
        assert_close(alone, other)


RESUMED = {
    "alone with loader workers": (1, {"workers": 1, "clip_grad_norm": 1.0, "precision": "bf16"}, "adamw"),
    "two ranks": (2, {}, "sgd"),
    "three ranks": (3, {}, "sgd"),
}


@pytest.mark.parametrize(("num_ranks", "train", "optimizer"), RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(
    num_ranks: int, train: dict[str, Any], optimizer: str, ranks: RankPools, tmp_path: Path
) -> None:
    def config(directory: Path) -> TrainConfig:
        data = dataclasses.replace(SMALL, image_size=33, num_train=52)  # 6 or 7 steps an epoch; batch norm, dropout
        plain = small(directory, data=data, global_batch_size=8, epochs=4, **train)
        return dataclasses.replace(
            plain,
            model=ModelConfig(name="mobilenet_v3_small"),
            optimizer=OptimizerConfig(name=optimizer, lr=0.01),  # type: ignore[arg-type]
        )

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    ranks(num_ranks).run(fit, config(whole))
    first = ranks(num_ranks).run(fit, config(resumed), stop_after=9)
    assert all(result.preempted and not result.complete for result in first)
    assert len({result.step for result in first}) == 1
    assert 9 <= first[0].step < 28
    assert locate(open_storage(resumed))[1].step == first[0].step
    second = ranks(num_ranks).run(fit, config(resumed))
    assert all(result.complete and result.step == 28 for result in second)
    assert_equal_to_the_bit(whole, resumed, 28)


LONG_EVALUATION = dataclasses.replace(SMALL, num_test=3000)


def evaluated_steps(directory: Path) -> list[int]:
    lines = [json.loads(line) for line in (directory / LOG_NAME).read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "eval"]


@pytest.mark.parametrize("at", [4, 8], ids=["in the middle", "at the end"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_evaluation_is_broken_off_on_request_and_made_again(
    num_ranks: int, at: int, ranks: RankPools, tmp_path: Path
) -> None:
    def train(directory: Path, **options: Any) -> list[FitResult]:
        made = small(directory, data=LONG_EVALUATION)
        return ranks(num_ranks).run(fit, made, **options)

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    undisturbed = train(whole)
    for result in train(resumed, stop_after=at):
        assert (result.step, result.preempted, result.complete) == (at, True, False)
        assert bool(result.metrics) == (at == 8), "those of the last evaluation that came to its end"
    assert evaluated_steps(resumed) == [4][: at // 8]
    assert standing(open_storage(resumed)).state == "preempted"  # type: ignore[union-attr]
    for result in train(resumed):
        assert (result.step, result.preempted, result.complete) == (8, False, True)
        assert result.metrics == undisturbed[0].metrics
    assert_equal_to_the_bit(whole, resumed, 8)
    assert standing(open_storage(resumed)).state == "complete"  # type: ignore[union-attr]
    assert all(result.metrics == undisturbed[0].metrics for result in train(resumed)), (
        "the log has them, if nobody else"
    )
    assert evaluated_steps(resumed) == [4, 8]


def test_a_signal_before_the_first_step_leaves_a_run_that_is_preempted(ranks: RankPools, tmp_path: Path) -> None:
    for done in (0, 8):
        for result in ranks(2).run(fit_and_be_asked_at_once, small(tmp_path, epochs=3)):
            assert (result.step, result.preempted, result.complete) == (done, True, False)
        assert standing(open_storage(tmp_path)).state == "preempted"  # type: ignore[union-attr]
        assert not done or locate(open_storage(tmp_path))[1].step == done
        ranks(2).run(fit, small(tmp_path, epochs=2))
    assert ranks(2).run(fit, small(tmp_path, epochs=3))[0].complete


def test_a_run_goes_on_with_another_number_of_ranks(ranks: RankPools, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    fit(small(whole, epochs=12))
    [first, _] = ranks(2).run(fit, small(resumed, epochs=12), stop_after=6)
    assert first.preempted
    fit(small(resumed, epochs=12))
    assert_close(whole, resumed)


def test_a_complete_run_is_complete_and_goes_on_with_more_epochs(tmp_path: Path) -> None:
    first = fit(small(tmp_path))
    log = (tmp_path / LOG_NAME).read_bytes()
    again = fit(small(tmp_path))
    assert (first.step, again.step, again.complete, again.preempted) == (8, 8, True, False)
    assert (again.metrics, again.evaluation) == (first.metrics, None)
    assert (tmp_path / LOG_NAME).read_bytes() == log
    more = fit(small(tmp_path, epochs=3))
    assert (more.step, more.total_steps, more.complete) == (12, 12, True)
    lines = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 13))
    assert [(line["step"], line["epoch"]) for line in lines if line["kind"] == "eval"] == [(4, 1), (8, 2), (12, 3)]


def test_metrics_are_stored_and_every_epoch_is_saved(tmp_path: Path) -> None:
    result = fit(small(tmp_path))
    with distckpt.CheckpointManager(tmp_path) as manager:
        found = manager.checkpoints
    assert [checkpoint.step for checkpoint in found] == [4, 8]
    assert found[-1].metrics == result.metrics
    assert set(result.metrics) == {"val/loss", "val/top1", "val/top5"}
    assert result.evaluation is not None
    assert sum(result.evaluation.num_samples) == 9


def test_the_best_are_kept_by_a_metric_even_between_saves(tmp_path: Path) -> None:
    plain = small(tmp_path, epochs=3)
    keep = Retention(last=1, best=3, metric="val/top1", mode="max")
    fit(dataclasses.replace(plain, checkpoint=dataclasses.replace(plain.checkpoint, every=1000, keep=keep)))
    with distckpt.CheckpointManager(tmp_path) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints] == [4, 8, 12]


def test_another_training_in_the_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    fit(small(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match=r"train\.global_batch_size is 7 there and 8 here.*use another"):
        fit(small(tmp_path, global_batch_size=8))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_change_that_is_allowed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(small(tmp_path))
    with caplog.at_level("INFO", logger="distckpt"):
        fit(dataclasses.replace(small(tmp_path, epochs=3), optimizer=OptimizerConfig(lr=0.01)))
    assert "changed since step 8: optimizer.lr 0.05 -> 0.01" in caplog.messages
    last = json.loads((tmp_path / LOG_NAME).read_text().splitlines()[-2])
    assert 0 < last["lr"] < 0.01


def test_a_branch_trains_on_from_an_older_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Unchanged, it does what the run did."""
    plain = small(tmp_path / "run", epochs=3)
    fit(plain)
    before = {path: path.read_bytes() for path in plain_files(tmp_path / "run")}
    branch = dataclasses.replace(plain, checkpoint=dataclasses.replace(plain.checkpoint, at=4, branch="again"))
    with caplog.at_level("INFO", logger="distckpt"):
        assert fit(branch).step == 12
        assert fit(dataclasses.replace(branch, optimizer=OptimizerConfig(lr=0.01))).complete
    assert "changed since step 4: checkpoint.branch None -> again" in caplog.messages
    assert {path: path.read_bytes() for path in before} == before
    own = tmp_path / "run/branches/again"
    assert contents(tmp_path / "run", 12)[0] == contents(own, 12)[0]
    tensors, others = contents(tmp_path / "run", 12)[1], contents(own, 12)[1]
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    lines = [json.loads(line)["step"] for line in (own / LOG_NAME).read_text().splitlines()]
    assert (lines[0], lines[-1]) == (5, 12)


def plain_files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and "lease" not in path.parts]


@pytest.mark.parametrize("name", ["at", "branch"])
def test_branches_that_make_no_sense_are_refused_by_the_key(tmp_path: Path, name: str) -> None:
    config = small(tmp_path)
    wrong: dict[str, Any] = {"at": {"at": 4}, "branch": {"at": 4, "branch": "../up"}}[name]
    with pytest.raises(ConfigError, match=f"{name}"):
        Trainer(dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, **wrong))).fit()
    assert not [*tmp_path.iterdir()]


def test_a_model_is_rebuilt_from_its_checkpoint_alone(tmp_path: Path) -> None:
    fit(small(tmp_path))
    before = torch.get_rng_state()
    newest, first = Trainer.load_model(str(tmp_path)), Trainer.load_model(str(tmp_path), step=4)
    assert torch.equal(before, torch.get_rng_state())
    assert not newest.training
    trees, tensors = contents(tmp_path, 8)
    assert trees["model"]["kind"] == "module"
    assert torch.equal(newest.state_dict()["fc3.bias"], tensors["model.fc3.bias"])
    assert not torch.equal(newest.state_dict()["fc3.bias"], first.state_dict()["fc3.bias"])
    assert newest(torch.zeros(2, 3, 32, 32)).shape == (2, 6)


def test_a_model_that_no_trainer_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        Trainer.load_model(str(tmp_path / "nothing"))
    distckpt.save(tmp_path / "other", {"model": torch.nn.Linear(1, 1)})
    with pytest.raises(ConfigError, match="no Trainer made it"):
        Trainer.load_model(str(tmp_path / "other"))


def test_a_batch_that_batch_norm_cannot_train_on_is_refused_at_the_start(tmp_path: Path) -> None:
    data = dataclasses.replace(SMALL, num_train=22)  # the last batch has one sample
    config = dataclasses.replace(small(tmp_path, data=data), model=ModelConfig(name="resnet18"))
    with pytest.raises(ConfigError, match="leave a rank with a single one at times"):
        fit(config)
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_fails_every_rank(ranks: RankPools, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plain = small(tmp_path / "run", log_dir=str(tmp_path / "file" / "folder"))
    for outcome in ranks(2).outcomes(fit, plain):
        assert isinstance(outcome.error, RankFailedError)
        assert "rank 0" in str(outcome.error)
        assert "--train.log_dir DIR" in str(outcome.error)


def test_workers_survive_a_signal_to_the_whole_process_group(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--checkpoint.directory", str(tmp_path)]
    command += ["--train.workers", "2", "--train.log_every", "1", "--train.epochs", "100"]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as job:
        while job.poll() is None and not (tmp_path / "step-000000000023").exists():
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGTERM)
        _, messages = job.communicate()
    assert job.returncode == 0, messages
    [last] = [line for line in messages.splitlines() if line.endswith("run the same command to go on")]
    step = locate(open_storage(tmp_path))[1].step
    assert last == f"preempted: saved step {step}; run the same command to go on"


def test_train_py_learns_the_digits_on_two_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += ["--nproc_per_node=2", str(ROOT / "train.py"), "--checkpoint.directory", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not {"\r", "\x1b"} & {*run.stderr}  # no terminal, no control characters
    assert "accuracy by class" in run.stdout
    last = json.loads((tmp_path / LOG_NAME).read_text().splitlines()[-1])
    assert last["val/top1"] >= 0.97
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "complete: all 690 steps of 30 epochs are done" in again.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_on_a_gpu_equals_an_undisturbed_one(precision: str, tmp_path: Path) -> None:
    def config(directory: Path) -> TrainConfig:
        made = small(directory, epochs=12, precision=precision, deterministic=True, channels_last=True, workers=1)
        return dataclasses.replace(made, model=ModelConfig(name="squeezenet1_1"))

    fit(config(tmp_path / "whole"))
    assert fit(config(tmp_path / "resumed"), stop_after=6).preempted
    assert fit(config(tmp_path / "resumed")).complete
    assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "resumed", 48)

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distckpt.errors import ConfigError
from distckpt.retention import Retention
from distckpt.trainer import Trainer
from distckpt.trainer.command_line import parse_config
from distckpt.trainer.config import CheckpointConfig, LoopConfig, OptimizerConfig, TrainConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def complaint(arguments: list[str], *, yaml: str | None = None, folder: Path) -> str:
    """Return the error's message, with "FILE" for the path of the file."""
    path = folder / "x.yaml"
    if yaml is not None:
        path.write_text(yaml)
        arguments = ["--config", str(path), *arguments]
    with pytest.raises(ConfigError) as raised:
        parse_config(arguments)
    return str(raised.value).replace(str(path), "FILE")


def fields(kind: type[Any], prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from fields(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("seed: 5\ntrain: {epochs: 7, workers: 2}\noptimizer: {lr: 1e-3, betas: [0.8, 0.9]}\n")
    config = parse_config(["--config", str(file), "--train.epochs", "3", "--checkpoint.keep", "4"])
    assert (config.seed, config.train.epochs, config.train.workers) == (5, 3, 2)
    assert (config.optimizer.lr, config.optimizer.betas) == (0.001, (0.8, 0.9))
    assert config.checkpoint.keep == 4


def test_the_command_of_the_readme_is_understood() -> None:
    arguments = (
        "--seed 1 --train.epochs 3 --checkpoint.directory s3://bucket/run --checkpoint.every 20 "
        "--checkpoint.keep 3 --checkpoint.layout full"
    )
    config = parse_config(["--config", str(ROOT / "configs" / "digits.yaml"), *arguments.split()])
    assert config.checkpoint == CheckpointConfig(directory="s3://bucket/run", every=20, keep=3, layout="full")


@pytest.mark.parametrize(
    ("yaml", "arguments"),
    [
        ("checkpoint: {keep: {last: 2, best: 1, metric: val/top1, mode: max}}", []),
        (None, ["--checkpoint.keep", "{last: 2, best: 1, metric: val/top1, mode: max}"]),
        ("checkpoint: {keep: {last: 2, best: 1, metric: val/top1}}", ["--checkpoint.keep.mode", "max"]),
    ],
)
def test_keep_takes_the_rules_of_a_retention(yaml: str | None, arguments: list[str], tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml or "")
    config = parse_config(["--config", str(file), *arguments])
    assert config.checkpoint.keep == Retention(last=2, best=1, metric="val/top1", mode="max")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("checkpoint: {kep_last: 1}", "FILE: unknown key checkpoint.kep_last; did you mean checkpoint.keep.last?"),
        ("modl: {}", "FILE: unknown key modl; did you mean model?"),
        ("epochs: 3", "FILE: unknown key epochs; did you mean train.epochs?"),
        ("zzz: 3", "FILE: unknown key zzz; --help lists all keys"),
        ("checkpoint: {keep: {bst: 1}}", "FILE: unknown key checkpoint.keep.bst; did you mean checkpoint.keep.best?"),
        ("model: 3", "FILE: model must be a section with keys of its own"),
        ("- 1", "FILE: must hold sections such as model: and train:"),
        ("train: {epochs: x}", "FILE: train.epochs must be a whole number, is 'x'"),
        ("train: {epochs: 1.5}", "FILE: train.epochs must be a whole number, is '1.5'"),
        ("train: {compile: maybe}", "FILE: train.compile must be true or false, is 'maybe'"),
        ("model: {name: 7}", "FILE: model.name must be text, is '7'"),
        ("checkpoint: {layout: flat}", "FILE: checkpoint.layout must be one of 'sharded', 'full', is 'flat'"),
        ("train: {epochs: 0}", "FILE: train.epochs must be at least 1, is 0"),
        ("optimizer: {betas: [0.9, 1]}", "FILE: optimizer.betas must be from 0 to less than 1, is (0.9, 1.0)"),
        ("checkpoint: {keep: 0}", "FILE: checkpoint.keep must be at least 1, is 0"),
        ("checkpoint: {keep: {best: 1}}", "FILE: checkpoint.keep: Retention.best needs the name of a metric"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_it(yaml: str, message: str, tmp_path: Path) -> None:
    assert complaint([], yaml=yaml, folder=tmp_path) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train.epoch 3", "command line: unknown key train.epoch; did you mean train.epochs?"),
        ("--epochs 3", "command line: unknown key epochs; did you mean train.epochs?"),
        ("epochs=3", "command line: unexpected argument epochs=3; settings are given as --section.key value"),
        ("--train.epochs", "command line: train.epochs needs a value"),
        ("--train.epochs x", "command line: train.epochs must be a whole number, is 'x'"),
        ("--train.epochs 0", "command line: train.epochs must be at least 1, is 0"),
        ("--config", "command line: --config needs the path of a YAML file"),
        ("--config a --config b", "command line: --config is given 2 times; one file is read"),
        ("--config nowhere.yaml", "nowhere.yaml: cannot be read: No such file or directory"),
        ("--optimizer.lr .nan", "command line: optimizer.lr must be more than 0, is nan"),
        ("--train.global_batch_size 4 --train.accumulate 5", "accumulate must be from 1 to train.global_batch_size"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: str, message: str, tmp_path: Path) -> None:
    found = complaint(arguments.split(), folder=tmp_path)
    assert message in found
    assert "\n" not in found


def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    assert complaint(["--config", str(tmp_path)], folder=tmp_path).endswith("cannot be read: Is a directory")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert (
        complaint(["--config", str(tmp_path / "x.yaml")], folder=tmp_path) == "FILE: cannot be read: is no UTF-8 text"
    )
    assert complaint([], yaml="a: [", folder=tmp_path).startswith("FILE: is no YAML: ")
    assert "\n" not in complaint([], yaml="a: [", folder=tmp_path)


def test_a_value_out_of_range_names_the_one_who_set_it(tmp_path: Path) -> None:
    yaml = "train: {epochs: 3, log_every: 0}"
    assert complaint(["--train.epochs", "0"], yaml=yaml, folder=tmp_path).startswith("command line: train.epochs")
    assert complaint(["--train.epochs", "1"], yaml=yaml, folder=tmp_path).startswith("FILE: train.log_every")
    with pytest.raises(ConfigError, match=r"^TrainConfig: train\.epochs must be at least 1, is -1$"):
        Trainer(TrainConfig(train=LoopConfig(epochs=-1)))


def test_train_py_prints_one_line_and_exits_with_2() -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--checkpoint.evry", "5"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    line = "train.py: command line: unknown key checkpoint.evry; did you mean checkpoint.every?\n"
    assert (run.stdout, run.stderr) == ("", line)


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_config(["--help"])
    assert raised.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in fields(TrainConfig):
        explained = re.search(rf"--{re.escape(key)} \S+ (.*?)\(type: ", text) or re.search(
            rf"--{re.escape(key)} \{{\S+\}} (.*?)\(type: ", text
        )
        assert explained is not None, key
        assert len(explained[1].split()) >= 3, key


def test_what_is_logged_and_stored_is_json_without_secrets() -> None:
    secret = CheckpointConfig(storage_options={"secret": "hush"}, keep=Retention(last=2))
    config = TrainConfig(checkpoint=secret, optimizer=OptimizerConfig(betas=(0.5, 0.6)))
    text = json.dumps(config.as_json())
    assert "hush" not in text
    assert json.loads(text) == config.as_json()
    assert config.as_json()["optimizer"]["betas"] == [0.5, 0.6]


def test_there_are_configs() -> None:
    names = {path.name for path in CONFIGS}
    assert names >= {"digits.yaml", "cifar10.yaml", "imagefolder.yaml", "synthetic.yaml", "ddp_s3.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_opens_with_the_command_that_runs_it(path: Path) -> None:
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    [command] = [line for line in comment if "train.py" in line and "torchrun" in line]
    words = shlex.split(command.lstrip("# "))
    arguments = words[words.index("train.py") + 1 :]
    assert arguments[:2] == ["--config", f"configs/{path.name}"]
    parse_config(["--config", str(path), *arguments[2:]])
    parse_config(["--config", str(path)])


def test_the_defaults_are_the_digits() -> None:
    assert parse_config(["--config", str(ROOT / "configs" / "digits.yaml")]) == TrainConfig()

"""The README's Python runs as it stands, from top to bottom, and what it lists is what there is."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def blocks() -> list[tuple[int, str]]:
    """Return (line, code) of each Python block."""
    text = README.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in found]


def section(title: str) -> str:
    """Return what stands below a heading."""
    [found] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    return str(found)


class Notebook(ModuleType):
    """Stands in for wandb, which is large: takes what the README hands to it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.logged: list[dict[str, float]] = []

    def init(self, **settings: Any) -> Notebook:
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        pass

    def log(self, figures: dict[str, float]) -> None:
        self.logged.append(figures)


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.chdir(tmp_path)
    notebook = Notebook()
    monkeypatch.setitem(sys.modules, "wandb", notebook)
    namespace: dict[str, Any] = {}
    assert len(blocks()) > 5
    for line, code in blocks():
        exec(compile("\n" * (line - 1) + code, str(README), "exec"), namespace)
    assert (tmp_path / "runs/first/step-000000000200/manifest.json").is_file()
    assert "is not called again" not in caplog.text
    assert {"train/loss", "val/top1", "saved/stall_s", "restored/seconds", "step"} <= set().union(*notebook.logged)
    assert namespace["gauge"].labels("saved/num_bytes")._value.get() > 0


def test_files_that_the_readme_names_are_there():
    links = re.findall(r"\]\(([\w/.-]+)\)", README.read_text())
    assert links
    for name in links:
        assert (ROOT / name).is_file(), name


def test_the_readme_lists_exactly_the_configurations():
    listed = re.findall(r"\| `(\w+\.yaml)` \|", README.read_text())
    assert sorted(listed) == sorted(file.name for file in (ROOT / "configs").glob("*.yaml"))


def test_the_readme_lists_exactly_the_commands():
    from distckpt.cli.application import application

    listed = re.findall(r"`distckpt (\w+)", "".join(re.findall(r"^\|.*?\|", section("Command line"), re.MULTILINE)))
    made = [command.name or getattr(command.callback, "__name__", "") for command in application.registered_commands]
    assert sorted(listed) == sorted(made)


def test_the_readme_lists_exactly_the_exit_codes():
    from distckpt.cli.exits import Exit

    [codes] = re.findall(r"^Exit codes: (.*)\.$", section("Command line"), re.MULTILINE)
    assert [int(code.split()[0]) for code in codes.split("; ")] == sorted(Exit)


def test_the_readmes_floors_are_those_of_the_linter():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [layers] = [c["layers"] for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    rows = [row.split("|") for row in section("How it is built").splitlines() if row.startswith("| ")]
    floor = {room: int(row[1]) for row in rows if row[1].strip().isdigit() for room in re.findall(r"`(\w+)`", row[3])}
    rooms = [re.findall(r"\w+", layer) for layer in layers]
    assert sorted(floor) == sorted(room for layer in rooms for room in layer)
    downwards = [floor[room] for layer in rooms for room in layer]
    assert downwards == sorted(downwards, reverse=True)


def test_the_readmes_figures_stand_between_their_marks():
    figures = section("Speed")
    assert figures.index("<!-- speed:begin -->") < figures.index("| figure |") < figures.index("<!-- speed:end -->")

"""The README's Python runs as it stands, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[tuple[int, str]]:
    """Return (line, code) of each Python block."""
    text = README.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in found]


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    assert len(blocks()) > 5
    for line, code in blocks():
        exec(compile("\n" * (line - 1) + code, str(README), "exec"), namespace)
    assert (tmp_path / "runs/first/step-000000000200/manifest.json").is_file()


def test_files_and_commands_that_the_readme_names_are_there():
    text = README.read_text()
    for name in re.findall(r"\| `(\w+\.yaml)` \|", text):
        assert (README.parent / "configs" / name).is_file(), name
    for name in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (README.parent / name).is_file(), name

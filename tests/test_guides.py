"""The guides in docs/ run as they stand: Python and the commands between it, each page from top to bottom."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = sorted(page.name for page in [*DOCS.glob("from-*.md"), DOCS / "adapters.md"])
TIMEOUT_S = 200

_BLOCK = re.compile(r"(?:^<!-- needs (\w+) -->\n\n)?^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Code on a page: its first line's number, its language, and the package that it needs beyond distckpt's own."""

    line: int
    language: str
    code: str
    needs: str


def blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text()
    return [
        Block(line=text[: found.start(3)].count("\n") + 1, language=found[2], code=found[3], needs=found[1] or "")
        for found in _BLOCK.finditer(text)
    ]


def program(chosen: list[Block], page: str) -> str:
    """Return a program that runs the blocks; what fails names its line on the page."""
    parts = ["import subprocess, sys"]
    for block in chosen:
        if block.language == "python":
            lines = "\n" * (block.line - 1) + block.code
            parts.append(f"exec(compile({lines!r}, {page!r}, 'exec'))")
            continue
        for command in block.code.splitlines():
            verb, *arguments = command.split()
            assert verb == "distckpt", command
            parts.append(f"subprocess.run([sys.executable, '-m', 'distckpt.cli', *{arguments!r}], check=True)")
    return "\n".join(parts)


def run(chosen: list[Block], page: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "page.py").write_text(program(chosen, page))
    return subprocess.run(
        [sys.executable, "page.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        timeout=TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_runs_as_it_stands(page: str, tmp_path: Path):
    chosen = [block for block in blocks(page) if not block.needs]
    assert len(chosen) >= 2
    ran = run(chosen, page, tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    made = "runs/fsdp/step-000000000001" if page == "adapters.md" else "runs/new/step-000000000100"
    assert (tmp_path / made / "manifest.json").is_file()


@pytest.mark.parametrize("page", [page for page in GUIDES if any(block.needs for block in blocks(page))])
def test_a_guide_runs_with_what_it_leaves_too(page: str, tmp_path: Path):
    missing = {block.needs for block in blocks(page) if block.needs and not importlib.util.find_spec(block.needs)}
    if missing:
        pytest.skip(f"needs {', '.join(sorted(missing))}")
    ran = run(blocks(page), page, tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    made = "runs/new/step-000000000100" if page == "adapters.md" else "runs/moved/step-000000000150"
    assert (tmp_path / made / "manifest.json").is_file()


@pytest.mark.parametrize("page", sorted(page.name for page in DOCS.glob("*.md")))
def test_what_a_page_links_to_is_there(page: str):
    for name in re.findall(r"\]\(([\w/.-]+)\)", (DOCS / page).read_text()):
        assert (DOCS / name).is_file(), name


def test_files_that_the_architecture_names_are_there():
    names = set(
        re.findall(r"`((?:distckpt|tests|benchmarks|docs|configs)/[\w/.]+)`", (DOCS / "architecture.md").read_text())
    )
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists(), name

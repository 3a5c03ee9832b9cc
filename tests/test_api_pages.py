"""The API pages: each public name has its entry, and no link between pages leads nowhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distckpt

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("api")
    made = subprocess.run(
        [sys.executable, "docs/api.py", str(target)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return target


def names_on(page: Path) -> set[str]:
    return set(re.findall(r'id="([\w.]+)"', page.read_text()))


def test_every_public_name_has_an_entry(pages: Path):
    assert set(distckpt.__all__) - {"errors", "events"} <= names_on(pages / "distckpt.html")
    assert set(distckpt.errors.__all__) <= names_on(pages / "distckpt/errors.html")
    assert set(distckpt.events.__all__) <= names_on(pages / "distckpt/events.html")
    assert {"TrainConfig", "CheckpointConfig"} & names_on(pages / "distckpt/trainer/config.html")
    assert "Storage" in names_on(pages / "distckpt/storage/contract.html")
    assert "DistckptCallback" in names_on(pages / "distckpt/adapters/lightning.html")
    assert "CheckpointedTrainer" in names_on(pages / "distckpt/adapters/transformers.html")


def test_an_entry_has_its_signature_and_its_sections(pages: Path):
    text = (pages / "distckpt.html").read_text()
    assert all(
        f"CheckpointManager.{verb}" in names_on(pages / "distckpt.html") for verb in ("steps", "restore", "save")
    )
    assert "storage_options" in text
    assert re.search(r"<h6[^>]*>Raises", text)
    assert re.search(r"<h6[^>]*>Arguments", text)


def test_links_between_the_pages_lead_somewhere(pages: Path):
    found = 0
    for page in pages.rglob("*.html"):
        for link, anchor in re.findall(r'href="([^":#]*\.html)?(?:#([\w.]+))?"', page.read_text()):
            target = (page.parent / link) if link else page
            assert target.is_file(), (page.name, link)
            assert not anchor or anchor in names_on(target), (page.name, link, anchor)
            found += bool(link)
    assert found > 5

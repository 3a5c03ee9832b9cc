"""Makes the API pages from the docstrings: `make docs`, or `python docs/api.py DIR`.

The adapters have pages only where their frameworks are installed.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pdoc
import pdoc.render

import distckpt
from distckpt.errors import DependencyError

MODULES = (
    "distckpt",
    "distckpt.errors",
    "distckpt.events",
    "distckpt.shards",
    "distckpt.storage.contract",
    "distckpt.trainer",
    "distckpt.trainer.config",
)
ADAPTERS = ("lightning", "pytorch_lightning", "transformers")


def make(target: Path) -> list[str]:
    """Write a page for each module that users import from, and an index; return the modules' names."""
    for name in distckpt.__all__:  # they are imported when first used, and pdoc only looks
        setattr(distckpt, name, getattr(distckpt, name))
    chosen = [*MODULES]
    for name in ADAPTERS:
        try:
            importlib.import_module(f"distckpt.adapters.{name}")
        except DependencyError as error:
            print(f"no page: {error}", file=sys.stderr)
        else:
            chosen.append(f"distckpt.adapters.{name}")
    packages = ["distckpt.storage", "distckpt.adapters"]  # which only hold what is chosen
    kept = "|".join(re.escape(name) for name in [*chosen, *packages])
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*chosen, rf"!(?!({kept})$).*", output_directory=target)
    for page in target.rglob("*.html"):
        _leave_out_dead_links(page)
    return chosen


def _leave_out_dead_links(page: Path) -> None:
    """Keep the words alone of links to what is inherited from elsewhere, and has no entry."""
    text = page.read_text()
    entries = set(re.findall(r'id="([\w.]+)"', text))
    link = re.compile(r'<a [^>]*?href="#([\w.]+)"[^>]*>(.*?)</a>', re.DOTALL)
    page.write_text(link.sub(lambda found: found[0] if found[1] in entries else found[2], text))


if __name__ == "__main__":
    print(f"{len(make(Path(sys.argv[1])))} pages: {sys.argv[1]}/index.html")

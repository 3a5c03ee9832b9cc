"""What holds for every adapter: it is imported by nobody but who asks for it, and says how to get what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    ("adapter", "package", "advice"),
    [
        ("lightning", "lightning", "pip install 'distckpt[lightning]'"),
        ("pytorch_lightning", "pytorch_lightning", "pip install pytorch-lightning"),
        ("transformers", "transformers", "pip install 'distckpt[transformers]'"),
    ],
)
def test_a_missing_framework_is_named_with_the_line_that_installs_it(adapter: str, package: str, advice: str):
    run = python(f"import sys; sys.modules[{package!r}] = None; import distckpt.adapters.{adapter}")
    assert run.returncode == 1
    assert run.stderr.rstrip().splitlines()[-2:] == [
        f"distckpt.errors.DependencyError: distckpt.adapters.{adapter} needs the package "
        f"{package.replace('_', '-')!r}, which is not installed",
        f"Fix: {advice}",
    ]


def test_distckpt_imports_no_framework():
    run = python(
        "import sys, distckpt, distckpt.adapters\n"
        "[getattr(distckpt, name) for name in distckpt.__all__]\n"
        "print({'lightning', 'pytorch_lightning', 'transformers', 'accelerate', 'torchdata'} & set(sys.modules))"
    )
    assert (run.stdout, run.returncode) == ("set()\n", 0), run.stderr[-2000:]

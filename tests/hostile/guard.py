"""The parent's side of `guarded`: one child for many cases, and a new one where a case has ended it."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0
ACTIONS = ("ls", "show", "show --json", "verify", "diff", "load", "weights", "restore")


class Guard:
    """Opens hostile folders in a child process.

    Attributes:
        ground: A run's folder with the checkpoints 20 and 30, to copy and to spoil.
        contents: What each of the two holds, by step.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._log = (scratch / "stderr.txt").open("ab")
        self._child: subprocess.Popen[str] | None = None
        self.ground = scratch / "ground"
        self.contents: dict[str, str] = {}
        self._start()

    def _start(self) -> None:
        empty = self._scratch / "empty"
        empty.mkdir(exist_ok=True)
        here = Path(__file__)
        # Lightning sets it when it is imported; torch then opens a library of NVIDIA's, which is no file's doing.
        clean = {name: value for name, value in os.environ.items() if name != "PYTORCH_NVML_BASED_CUDA_CHECK"}
        self._child = subprocess.Popen(
            [sys.executable, str(here.with_name("guarded.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=empty,
            text=True,
            env={**clean, "PYTHONPATH": str(here.parents[2]), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        )
        if not self.contents:
            self.contents = self._ask({"prepare": str(self.ground)})
        # What is imported at first use is imported now: later, an import is an event.
        for spoiled in (False, True):
            warm = self._scratch / "warm"
            shutil.copytree(self.ground, warm)
            if spoiled:
                (warm / "step-000000000030" / "manifest.json").write_bytes(b"{}")
            self._ask({"root": str(warm), "actions": ACTIONS})
            shutil.rmtree(warm)
        self._ask({"limit": True})

    def _ask(self, request: dict[str, Any]) -> Any:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        ready, _, _ = select.select([child.stdout], [], [], TIMEOUT_S)
        line = child.stdout.readline() if ready else ""
        if not line:
            child.kill()
            code = self._ended()
            raise TimeoutError(f"no answer within {TIMEOUT_S:g} s" if not ready else f"the child died: {code}")
        return json.loads(line)

    def open(self, root: Path, actions: tuple[str, ...] = ACTIONS) -> dict[str, dict[str, Any]]:
        """Return what each action on `root` led to.

        Raises:
            TimeoutError: The child died of it, or gave no answer.
        """
        if self._child is None:
            self._start()
        answer: dict[str, dict[str, Any]] = self._ask({"root": str(root), "actions": actions})
        return answer

    def warm(self, root: Path, actions: tuple[str, ...]) -> None:
        """Do actions for the sake of what they import."""
        self.open(root, actions)

    def _ended(self) -> int:
        """Return how the child ended, once it has."""
        child, self._child = self._child, None
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.close()
        code = child.wait()
        child.stdout.close()
        return code

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._ended()
        self._log.close()

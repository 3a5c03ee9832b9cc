"""The shell completes commands and options, and help tells the exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from distckpt.cli.exits import Exit

Command = Callable[..., Any]
VERBS = ["ls", "show", "verify", "diff", "prune", "pin", "unpin", "cp", "export", "doctor", "torture", "import"]


def completed(words: str) -> set[str]:
    """Return what bash would be offered for the last of some words."""
    environment = {
        **os.environ,
        "_DISTCKPT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    command = [sys.executable, "-m", "distckpt.cli"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return set(result.stdout.split())


def test_commands_and_options_are_completed() -> None:
    assert set(VERBS) <= completed("distckpt ")
    assert {"prune", "pin"} == completed("distckpt p")
    assert {"--keep", "--tree", "--json"} <= completed("distckpt ls --")


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_json_and_tells_its_exit_codes(command: Command, verb: str) -> None:
    text = command(verb, "--help").stdout
    assert "--json" in text
    told = " ".join(text.split())
    for code in Exit:
        assert f"{code.value} " in told.partition("Exit codes:")[2], code

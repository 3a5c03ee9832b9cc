"""Every command in docs/command-line.md answers as the page says, but for numbers, times and names of machines.

`python tests/test_command_line_page.py` runs them all and writes their answers into the page.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "command-line.md"
HOME = "/home/me"
TRAIN_LIMIT_S = 240

_BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```)", re.MULTILINE | re.DOTALL)
_CHECK = re.compile(
    r"^(software|endpoint|credentials|list|publish|race|write|read|clock|delete|durability|room|sharing) .*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One command on the page, and what stands below it."""

    command: str
    answer: str


def shown(block: str) -> list[Shown]:
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [Shown(command=head, answer=rest) for head, _, rest in (part.partition("\n") for part in parts)]


def answer(command: str, folder: Path, bucket: str) -> str:
    """Run a command of the page in a folder, and return what it prints on both streams, and its exit code if not 0."""
    from distckpt.cli.application import application

    verb, *args = shlex.split(command.replace("s3://bucket", f"s3://{bucket}"), comments=True)
    if verb == "torchrun":
        train(args, folder)
        return ""
    assert verb == "distckpt", command
    with chdir(folder):
        result = CliRunner().invoke(application, args, prog_name="distckpt")
    assert result.exception is None or isinstance(result.exception, SystemExit), command
    text = result.output.replace(str(folder), HOME).replace(f"s3://{bucket}", "s3://bucket")
    text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    return text + (f"[exit code {result.exit_code}]\n" if result.exit_code else "")


def train(args: list[str], folder: Path) -> None:
    script = [str(ROOT / arg) if arg == "train.py" else arg for arg in args]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "train.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            assert process.wait(TRAIN_LIMIT_S) == 0, (folder / "train.log").read_text()[-3000:]
        finally:
            process.terminate()  # which ends its ranks, too
            process.wait()


def essence(text: str) -> list[str]:
    """Return an answer without what differs from time to time and from machine to machine."""
    text = re.sub(r"^configuration\n.*?^$", "", text, flags=re.MULTILINE | re.DOTALL)  # every new setting adds to it
    text = re.sub(r"^(created|timings)[. ].*\n", "", text, flags=re.MULTILINE)  # diff has none where they are the same
    text = text.replace(platform.node(), "HOST").replace("on vm", "on HOST")
    text = re.sub(r"\b[0-9a-f]{16}\b", "#", text)
    text = re.sub(r"\d+([.,:]\d+)*(e-?\d+)?", "#", text)
    text = re.sub(r"# ([kMGT]?B|ms|s|min|h)\b", "# unit", text)
    lines = [" ".join(_CHECK.sub(r"\1", line).split()) for line in text.splitlines()]
    return [re.sub(r"\+cu#|-\d+", "", line) for line in lines if line]


def test_every_command_of_the_page_answers_as_it_says(tmp_path: Path, s3_bucket: str) -> None:
    blocks = _BLOCK.findall(PAGE.read_text())
    assert len(blocks) > 10
    for block in blocks:
        for one in shown(block):
            assert essence(answer(one.command, tmp_path, s3_bucket)) == essence(one.answer), one.command


def test_the_page_shows_every_command_and_every_exit_code() -> None:
    from distckpt.cli.application import application
    from distckpt.cli.exits import Exit

    text = PAGE.read_text()
    made = [command.name or getattr(command.callback, "__name__", "") for command in application.registered_commands]
    assert [name for name in made if f"$ distckpt {name} " not in text] == []
    table = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert sorted(map(int, table)) == sorted(Exit)


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ("step 3: copied 12 kB\n", "step 40:  copied 1.5 MB\n", True),
        ("a  0.1 s", "a  12 ms", True),
        ("keep: newest", "keep: last 1", False),
        ("read  good  by one", "read  warning  by two", True),
        ("[exit code 3]", "", False),
    ],
)
def test_what_counts_in_an_answer(first: str, second: str, is_same: bool) -> None:
    assert (essence(first) == essence(second)) == is_same


def rewrite(folder: Path, bucket: str) -> None:
    """Put what the commands answer now into the page."""

    def answered(found: re.Match[str]) -> str:
        return "".join(f"$ {one.command}\n{answer(one.command, folder, bucket)}" for one in shown(found[0]))

    PAGE.write_text(_BLOCK.sub(answered, PAGE.read_text()))


if __name__ == "__main__":
    from s3_server import point_aws_at, running_s3_server

    place = Path(tempfile.mkdtemp())
    with running_s3_server(place) as server, pytest.MonkeyPatch.context() as patched:
        point_aws_at(server, patched)
        (place / "work").mkdir()
        rewrite(place / "work", server.make_bucket())
    shutil.rmtree(place)

"""The command as its own process: quick, without torch, and with exit codes that mean one thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distckpt

ALL_COMMANDS = """
import sys
from distckpt.cli.application import application
run = sys.argv[1]
for args in (["ls", run], ["ls", run, "--json"], ["prune", run, "--keep", "1"], ["pin", run], ["unpin", run],
             ["cp", run, run + "-copy"], ["doctor", run, "--test-bytes", "1000"], ["show", run], ["verify", run],
             ["diff", run, run]):
    heavy = {"torch"} if args[0] in ("diff", "show", "verify") else {"torch", "numpy", "s3fs", "rich.progress"}
    try:
        application(args)
    except SystemExit as leaving:
        assert not leaving.code, (args, leaving.code)
    assert not heavy & sys.modules.keys(), (args, heavy & sys.modules.keys())
"""


def process(*args: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    how = ["-m", "distckpt.cli"] if code is None else ["-c", code]
    command = [sys.executable, *how, *(str(arg) for arg in args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_no_command_that_needs_no_torch_imports_it(run: Path) -> None:
    result = process(run, code=ALL_COMMANDS)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr


def test_data_is_on_stdout_and_talk_on_stderr(run: Path) -> None:
    result = process("ls", run, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert [one["step"] for one in json.loads(result.stdout)["checkpoints"]] == [10, 20, 30]
    result = process("verify", run / "nowhere", "--json")
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.startswith("error: no checkpoint in ")


def test_lines_are_not_cut_where_nobody_watches(run: Path) -> None:
    deep = run / ("deep" * 40)
    (run / "step-000000000010").rename(deep)
    result = process("show", deep)
    assert str(deep) in result.stdout


def test_version_and_help() -> None:
    assert process("--version").stdout == f"distckpt {distckpt.__version__}\n"
    text = process("--help").stdout
    verbs = ("ls", "show", "verify", "diff", "prune", "pin", "unpin", "cp", "export", "import", "doctor")
    assert all(f" {verb} " in text for verb in verbs)
    assert "Exit codes: 0 fine" in text
    assert process().returncode == 2


def test_a_bug_does_not_read_as_a_difference() -> None:
    broken = "import sys, distckpt.cli.application as a, distckpt.cli; a.application = 0; distckpt.cli.main()"
    result = process(code=broken)
    assert result.returncode == 70
    assert "TypeError" in result.stderr


def test_a_reader_that_leaves_is_no_error(run: Path) -> None:
    command = f"'{sys.executable}' -m distckpt.cli show '{run}' | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.startswith("path ")
    assert "Traceback" not in result.stderr


def test_every_command_works_by_s3_url(command: Callable[..., Any], s3_bucket: str, run: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    fs.put(f"{run}/", f"{s3_bucket}/run-7/", recursive=True)
    url = f"s3://{s3_bucket}/run-7"
    listed = json.loads(command("ls", url, "--json").stdout)["checkpoints"]
    assert [(one["step"], one["state"]) for one in listed] == [(step, "committed") for step in (10, 20, 30)]
    assert listed[0]["path"] == f"{url}/step-000000000010"
    options = json.dumps({"endpoint_url": os.environ["AWS_ENDPOINT_URL"]})
    assert command("show", url, "--storage-options", options).exit_code == 0
    assert command("verify", url).exit_code == 0
    assert command("diff", url, run, "--storage-options", options).exit_code == 0
    assert command("diff", f"{url}/step-000000000020", run).exit_code == 1
    assert command("prune", url, "--keep", 1, "--yes").exit_code == 0
    assert [one["step"] for one in json.loads(command("ls", url, "--json").stdout)["checkpoints"]] == [30]
    assert command("ls", f"s3://{s3_bucket}/elsewhere").exit_code == 3
    assert command("ls", "s3://no-such-bucket-here/run").exit_code in (3, 4)


def test_safetensors_are_exported_without_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys, atexit, distckpt.cli\natexit.register(lambda: print('torch' in sys.modules))\ndistckpt.cli.main()"
    )
    result = process("export", run, tmp_path / "x.safetensors", "--format", "safetensors", code=code)
    assert (result.returncode, result.stdout.split()[-1]) == (0, "False")


def test_a_copy_that_is_killed_is_ended_by_the_next(run: Path, tmp_path: Path) -> None:
    """It is killed by itself, just after its first data file is durable, and its second has begun."""
    code = "\n".join(
        [
            "import os, distckpt.cli",
            "from distckpt.storage.local import LocalStorage",
            "real, done = LocalStorage.put_rest, []",
            "def put_rest(self, name, chunks, *, begin, num_bytes):",
            "    def dying():",
            "        for chunk in chunks:",
            "            yield chunk",
            "            done and os.kill(os.getpid(), 9)",
            "    size = real(self, name, dying(), begin=begin, num_bytes=num_bytes)",
            "    done.append(name)",
            "    return size",
            "LocalStorage.put_rest = put_rest",
            "distckpt.cli.main()",
        ]
    )
    assert process("cp", run, tmp_path / "copy", code=code).returncode == -9
    listed = json.loads(process("ls", tmp_path / "copy", "--json").stdout)["checkpoints"]
    assert [(one["step"], one["state"]) for one in listed] == [(20, "partial"), (30, "committed")]
    answer = json.loads(process("cp", run, tmp_path / "copy", "--json").stdout)
    assert [one["action"] for one in answer["checkpoints"]] == ["present", "copied", "copied"]
    assert process("verify", tmp_path / "copy").returncode == 0
    assert process("diff", run, tmp_path / "copy").returncode == 0

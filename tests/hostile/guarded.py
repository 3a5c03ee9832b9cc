"""A child process that opens what may be hostile, under limits, and tells what came of it.

It reads one JSON object a line: what to do with which folder; and answers with one. After `arm` everything that it
opens, lists, imports, starts or connects to is judged, and what lies outside the folder is reported.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEADROOM_BYTES = 1 << 30  # address space beyond what importing torch has taken

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ON_PATHS = {
    *("os.listdir", "os.scandir", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink"),
    *("os.chmod", "os.chown", "os.truncate", "os.utime", "os.chdir", "os.setxattr", "os.getxattr", "os.listxattr"),
}
_NEVER = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "socket.")
_HARMLESS = ("socket.gethostname",)
_NEVER_EITHER = ("ctypes.", "compile", "exec", "import", "marshal.", "pickle.", "shutil.", "tempfile.", "urllib.")


class Watch:
    """Judges what the process does, once it is armed."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.events: list[str] = []
        self.code = tuple({os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])})
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.root is None:
            return
        if event == "open":
            path, mode, flags = args
            writes = bool(flags & _WRITING) if isinstance(flags, int) else False
            # A new file is durable once the folders above it are synced; they are opened for that, not listed.
            is_above = isinstance(flags, int) and flags & os.O_DIRECTORY and self._is_above(path)
            if not is_above and not self._is_inside(path, writes=writes):
                self.events.append(f"open {path!r:.200} {mode} {flags}")
        elif event in _ON_PATHS:
            paths = args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
            if not all(self._is_inside(path, writes=True) for path in paths):
                self.events.append(f"{event} {args!r:.200}")
        elif event.startswith(_NEVER + _NEVER_EITHER) and event not in _HARMLESS:
            self.events.append(f"{event} {args!r:.200}")

    def _is_above(self, path: Any) -> bool:
        assert self.root is not None
        return isinstance(path, (str, Path)) and (self.root + "/").startswith(str(path).rstrip("/") + "/")

    def _is_inside(self, path: Any, *, writes: bool) -> bool:
        if path is None or isinstance(path, int):
            return True  # what a descriptor belongs to was judged when it was opened
        text = os.fsdecode(path)
        if not text.startswith("/"):
            return "/" not in text and text != ".."  # below a descriptor; the working directory is empty
        assert self.root is not None
        real = os.path.normpath(text)  # no realpath: it would be judged itself
        if (real + "/").startswith(self.root + "/"):
            return True
        return not writes and (real + "/").startswith((*(f"{folder}/" for folder in self.code), "/proc/self/"))


def peak_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def build() -> dict[str, Any]:
    """Return a state with one of each kind, always the same."""
    import numpy as np
    import torch
    from torch import nn

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "table": torch.zeros(64, 96),
        "epoch": 0,
        "extra": {"loss": 0.5, "pair": (1, b"\0"), "array": np.arange(4), "scalar": np.float32(2.5)},
    }


def stamp(state: dict[str, Any], value: int) -> None:
    """Make a state tell what it is of."""
    import torch

    with torch.no_grad():
        for parameter in state["model"].parameters():
            parameter.fill_(value)
    state["table"].copy_(torch.arange(64 * 96).reshape(64, 96) * 0.5 + value)
    state["epoch"] = value


def content(state: dict[str, Any]) -> str:
    """Return a digest of a state's tensors that a save stamps."""
    import numpy as np

    made = hashlib.sha256()
    for tensor in (*state["model"].state_dict().values(), state["table"]):
        made.update(repr((tensor.dtype, tuple(tensor.shape))).encode() + np.asarray(tensor).tobytes())
    return made.hexdigest()


def act(action: str, root: str) -> dict[str, Any]:
    """Do one thing with a folder; return what it led to."""
    import distckpt

    newest = str(Path(root) / "step-000000000030")
    if action == "load":
        state = build()
        distckpt.load(newest, state, timeout_s=20)
        return {"content": content(state)}
    if action == "restore":
        state = build()
        with distckpt.CheckpointManager(root, timeout_s=20, signals=()) as manager:
            step = manager.restore(state)
        return {"content": content(state), "step": step}
    if action == "weights":
        state = build()
        distckpt.load_weights(newest, state["model"])
        return {}
    if action.startswith("file:"):  # weights in a foreign format
        state = build()
        distckpt.load_weights(Path(root) / action.removeprefix("file:"), state["model"])
        return {"content": content(state)}
    if action == "misbehave":
        misbehave()
    return command(action, root, newest)


def misbehave() -> None:
    """Do what hostile files must not bring about, so that a test can see that it is noticed."""
    import socket
    import subprocess

    sys.modules.pop("colorsys", None)
    __import__("colorsys")
    Path("/etc/hostname").read_bytes()
    os.listdir("/etc")  # noqa: PTH208  the event has this name
    subprocess.run(["true"], check=True)
    os.system("true")
    socket.socket().close()
    exec(compile("1 + 1", "x", "exec"))
    raise ValueError(len(bytes(b"x" * (200 << 20))))


@functools.cache
def distckpt_command() -> Any:
    """Return the command line; typer compiles its annotations when it is made."""
    import typer.main

    from distckpt.cli.application import application

    return typer.main.get_command(application)


def command(action: str, root: str, newest: str) -> dict[str, Any]:
    """Run the command line in this process."""
    from click.testing import CliRunner

    arguments = {
        "ls": ["ls", root],
        "show": ["show", newest],
        "show --json": ["show", newest, "--json"],
        "verify": ["verify", newest],
        "diff": ["diff", str(Path(root) / "step-000000000020"), newest],
    }[action]
    result = CliRunner().invoke(distckpt_command(), arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if "\x1b" in result.output:
        raise AssertionError("an escape sequence reached the terminal")
    if result.exit_code not in (0, 1, 3, 4, 5):
        raise AssertionError(f"exit code {result.exit_code}")
    if result.exit_code in (3, 4, 5):
        return {"refused": True}
    return {"refused": action == "verify" and result.exit_code == 1}


def judged(watch: Watch, work: Callable[[], dict[str, Any]], root: str) -> dict[str, Any]:
    """Return what work leads to: an error and whether it is ours, the time, the memory, and what it did outside."""
    from distckpt.errors import DistckptError

    watch.events.clear()
    reset_peak()
    before = peak_bytes()
    found: dict[str, Any] = {"error": None, "typed": True}
    begun = time.perf_counter()
    watch.root = os.path.normpath(root)
    try:
        found.update(work())
    except DistckptError as error:
        found["error"] = f"{type(error).__name__}: {error!s:.300}"
    except BaseException as error:  # noqa: BLE001  told to the parent
        found["error"], found["typed"] = f"{type(error).__name__}: {error!s:.300}", False
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None:
            found["error"] += f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    finally:
        watch.root = None
    found["seconds"] = time.perf_counter() - begun
    found["grown_bytes"] = peak_bytes() - before
    found["events"] = list(watch.events)
    return found


def prepare(root: str) -> dict[str, str]:
    """Write the two checkpoints that cases are made of; return what each holds."""
    from distckpt import CheckpointManager

    contents = {}
    with CheckpointManager(root, keep=10, background=False, signals=()) as manager:
        for step in (20, 30):
            state = build()
            stamp(state, step)
            manager.save(step, state)
            contents[str(step)] = content(state)
    return contents


def main() -> None:
    import rich.cells

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.getLogger("distckpt").addHandler(logging.NullHandler())
    logging.getLogger("distckpt").propagate = False
    watch = Watch()
    left_bytes = 0  # what the last case may have left
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            answer: Any = prepare(request["prepare"])
        elif "limit" in request:
            rich.cells.cell_len("\u2026\u6f22")  # loads its tables of widths
            [size] = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmSize")]
            most = int(size.split()[1]) * 1024 + HEADROOM_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            answer = None
        else:
            root = request["root"]
            if left_bytes > 32 << 20:
                gc.collect()
            answer = {a: judged(watch, functools.partial(act, a, root), root) for a in request["actions"]}
            left_bytes = max(result["grown_bytes"] for result in answer.values())
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

"""The run's log on local disk: `log.jsonl`, one JSON object per line, and TensorBoard files.

TensorBoard also gets what saves cost, at their steps; `events.jsonl`, beside it, is `distckpt.events.EventLog`'s.

Invariant: read as a whole, the log holds each step once, as if the run had never been stopped: what was logged after
the checkpoint that a run resumes from is taken back before anything new is logged.
Lines hold nothing that depends on the clock, so that a resumed run's log equals an undisturbed one's.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from distckpt.errors import StorageError
from distckpt.events import Event, Saved
from distckpt.logfolder import LOG_NAME


class RunLog:
    """The log of a run, as its rank 0 writes it.

    Closing it, or leaving its context, finishes the TensorBoard file.

    Attributes:
        folder: Where it lies.
    """

    def __init__(self, folder: Path, *, done: int) -> None:
        """Open the log to go on after `done` steps.

        Raises:
            StorageError: The folder or a file in it cannot be written.
        """
        self.folder = folder
        path = folder / LOG_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_after(path, done)
            self._lines = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder), purge_step=done + 1)
        except OSError as error:
            raise StorageError(
                path=str(path),
                action="write",
                cause=str(error.strerror),
                errno=error.errno,
                fix="choose a folder that can be written: --checkpoint.directory DIR, or --train.log_dir DIR",
            ) from error

    def write(
        self, kind: str, *, step: int, values: dict[str, Any], board_only: dict[str, float] | None = None
    ) -> None:
        """Log what was measured at a step; it is in the file, though not yet on disk, when this returns.

        Args:
            kind: "train" or "eval".
            step: Optimizer steps completed.
            values: What was measured, in the order of the line.
            board_only: What depends on the clock; goes to TensorBoard alone.

        Ranks: 0.
        """
        line = {"kind": kind, "step": step} | {name: _json_value(value) for name, value in values.items()}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for name, value in {**values, **(board_only or {})}.items():
            tag = name if "/" in name else f"{kind}/{name}"
            self._board.add_scalar(tag, value, step)
        self._board.flush()

    def tell(self, event: Event) -> None:
        """Draw what a save cost, in TensorBoard alone; other events, and what comes after the end, are passed over.

        Ranks: 0.
        """
        if not isinstance(event, Saved) or self._lines.closed:
            return
        figures = {
            "stall_s": event.stall_s,
            "write_s": event.write_s,
            "durable_s": event.durable_s,
            "MB": event.num_bytes / 1e6,
            "MB_per_s": event.num_bytes / 1e6 / max(event.write_s, 1e-9),
        }
        for name, value in figures.items():
            self._board.add_scalar(f"save/{name}", value, event.step)
        self._board.flush()

    def close(self) -> None:
        """Finish the files.

        Ranks: 0.
        """
        self._lines.close()
        self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def find_evaluation(folder: Path, step: int) -> dict[str, float] | None:
    """Return the figures of the evaluation after a step, as a log holds them; None if it does not.

    Ranks: any.
    """
    path = folder / LOG_NAME
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    for line in reversed(lines):
        found = json.loads(line) if _step_of(line) == step else {}
        if found.get("kind") == "eval":
            return {name: value for name, value in found.items() if name.startswith("val/")}
    return None


def _json_value(value: Any) -> Any:
    """Return null for a number that JSON does not know."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, done: int) -> None:
    """Take back the lines of later steps, and half a line at the end; the file is replaced as a whole."""
    if not path.exists():
        return
    kept = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for line in lines:
        step = _step_of(line)
        if step is not None and step <= done:
            kept.append(line)
    if kept == lines:
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(path.stat().st_mode & 0o777)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _step_of(line: str) -> int | None:
    """Return the step of a whole line; None for anything else."""
    if not line.endswith("\n"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else None

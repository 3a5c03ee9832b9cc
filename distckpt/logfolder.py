"""The local folder of a run's logs: where it is, and what the files in it are called.

Logs are local whatever the checkpoints lie on, since an object store cannot append to a file.
"""

from __future__ import annotations

from pathlib import Path

LOG_NAME = "log.jsonl"
EVENTS_NAME = "events.jsonl"
EVALUATION_NAME = "evaluation.json"


def log_folder(log_dir: str | None, directory: str, *, branch: str | None = None) -> Path:
    """Return where a run's logs lie.

    It is `log_dir`, else the checkpoint directory if that is local, else runs/ with the directory's last name.
    A branch has a folder of its own in it, as among the checkpoints: it must not take back what its run has logged.
    """
    inner = "" if branch is None else f"branches/{branch}"
    if log_dir is not None:
        return Path(log_dir) / inner
    protocol, is_url, rest = directory.partition("://")
    if not is_url:
        return Path(directory) / inner
    if protocol.lower() in ("file", "local"):
        return Path(rest) / inner
    return Path("runs") / (rest.rstrip("/").rpartition("/")[2] or "run") / inner

"""The local folder of a run's logs: where it is, and what the files in it are called.

Logs are local whatever the checkpoints lie on, since an object store cannot append to a file.
"""

from __future__ import annotations

from pathlib import Path

LOG_NAME = "log.jsonl"
EVENTS_NAME = "events.jsonl"
EVALUATION_NAME = "evaluation.json"


def log_folder(log_dir: str | None, directory: str) -> Path:
    """Return where a run's logs lie.

    It is `log_dir`, else the checkpoint directory if that is local, else runs/ with the directory's last name.
    """
    if log_dir is not None:
        return Path(log_dir)
    protocol, is_url, rest = directory.partition("://")
    if not is_url:
        return Path(directory)
    if protocol.lower() in ("file", "local"):
        return Path(rest)
    return Path("runs") / (rest.rstrip("/").rpartition("/")[2] or "run")

"""What was measured, and on what: the commit, the machine, the versions, the file system."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
PEERS = (
    *("torchvision", "safetensors", "torchsnapshot", "torch_checkpointing"),
    *("lightning-fabric", "pytorch-lightning", "accelerate", "s3fs"),
)


def commit() -> str:
    """Return the commit that was measured, with "+changes" if the tree differs from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--", "distckpt") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()


COMMIT = commit()  # now, when the code is loaded: the tree may move while it is measured


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0].partition(": ")[2] if models else platform.processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "gpu": _gpu(),
    }


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def file_system(path: Path) -> str:
    """Return the type of the file system that a path lies on."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def versions() -> dict[str, str]:
    """Return the versions of what was measured; a peer that is not installed is not in it."""
    found = {"python": platform.python_version()}
    for name in ("torch", "distckpt", *PEERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

"""Names on storage: what a checkpoint's folders and files are called.

Invariant: a name that `checked` lets through stays inside the folder that it is joined to.
"""

from __future__ import annotations

import re
import secrets

MANIFEST = "manifest.json"
PIN = "pinned.json"
BRANCHES = "branches"
RNG = "_rng"  # the state's key that holds the random-number generators of each rank

_STEP = re.compile(r"step-(\d{12,})")
_ORIGIN = re.compile(r"from-step-(\d{12,})\.json")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OF_RANK = re.compile(r"rank-\d{5,}:")
MAX_NAME_CHARS = 1024


def step_name(step: int) -> str:
    """Return the folder's name of the checkpoint at `step`."""
    return f"step-{step:012d}"


def parse_step(name: str) -> int | None:
    """Return the step that a folder's name states, or None if it is no checkpoint's folder."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def branch_folder(branch: str) -> str:
    """Return the folder, inside a run's directory, of the branch of this name."""
    return f"{BRANCHES}/{branch}"


def origin_name(step: int) -> str:
    """Return the name, inside a branch's folder, of the file that says that it went off after `step`."""
    return f"from-{step_name(step)}.json"


def parse_origin(name: str) -> int | None:
    """Return the step that such a file's name states, or None if it is none."""
    match = _ORIGIN.fullmatch(name)
    return int(match[1]) if match else None


def new_attempt() -> str:
    """Return a name that no other save has: 16 hex digits."""
    return secrets.token_hex(8)


def rank_file(attempt: str, rank: int) -> str:
    """Return the name, inside the checkpoint, of the data file that `rank` writes in `attempt`."""
    return f"{attempt}/rank-{rank:05d}.safetensors"


def of_rank(rank: int, entry: str) -> str:
    """Return the name of an entry that belongs to `rank` alone."""
    return f"rank-{rank:05d}:{entry}"


def is_of_rank(entry: str) -> bool:
    """Say whether an entry's name is that of one rank's own."""
    return _OF_RANK.match(entry) is not None


def quarantine_name(attempt: str) -> str:
    """Return the name, inside the checkpoint, under which a damaged attempt's manifest is put aside."""
    return f"damaged-{attempt}.json"


def is_quarantine(name: str) -> bool:
    """Say whether a name inside a checkpoint is that of a manifest put aside as damaged."""
    return name.startswith("damaged-") and name.endswith(".json")


def checked(name: str) -> str:
    """Return `name` if it is a plain relative path of letters, digits, '.', '_' and '-'.

    Raises:
        ValueError: It is empty, absolute, too long, or could leave the folder that it is joined to.
    """
    parts = name.split("/")
    if len(name) > MAX_NAME_CHARS or not all(_PLAIN.fullmatch(part) for part in parts):
        raise ValueError(f"{name[:80]!r} is not a plain relative name")
    return name


def join(*parts: str) -> str:
    """Return the storage name made of `parts`, empty ones left out."""
    return "/".join(part for part in parts if part)

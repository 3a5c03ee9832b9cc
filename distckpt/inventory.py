"""The inventory: all that lies at a path or URL, whole or not, for whoever wants to look rather than to restore.

Invariant: nothing is left out because it is broken; what is no good checkpoint is listed with what is wrong with it.
"""

from __future__ import annotations

import difflib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from distckpt import names
from distckpt.catalog import Checkpoint, Folder, describe, read_manifest, read_outline, scanned
from distckpt.errors import CheckpointDamagedError, CheckpointNotFoundError, FormatVersionError
from distckpt.manifest import MAX_BYTES
from distckpt.storage import FileInfo, Storage

NUM_READERS = 8  # manifests read at a time: on an object store each is a round trip

State = Literal["committed", "partial", "damaged", "newer format"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one checkpoint folder holds.

    Attributes:
        name: The folder's name below the storage's root; "" if it is the root.
        step: The step, as the manifest or else the folder's name says; None if neither does.
        state: "committed"; "partial": a save that never committed; "damaged": its manifest is not whole, or was put
            aside as damaged; "newer format": committed by a distckpt that this one is too old for.
        files: All its files; names below the directory that it lies in.
        pinned: Whether retention has to keep it.
        checkpoint: Its facts, if it is committed.
        problem: What is wrong with a damaged one.
        problem_file: The file, inside the folder, that `problem` is about.
        folder: The catalog's view of it; None if it is the storage's root.
        branch: The branch that it belongs to, "outer/inner" for a branch of a branch; "" is the run itself.
    """

    name: str
    step: int | None
    state: State
    files: tuple[FileInfo, ...]
    pinned: bool
    checkpoint: Checkpoint | None = None
    problem: str | None = None
    problem_file: str | None = None
    folder: Folder | None = None
    branch: str = ""

    @property
    def num_bytes(self) -> int:
        """The size of a committed one's data files; of everything that lies there if it is not committed."""
        return self.checkpoint.num_bytes if self.checkpoint else sum(file.num_bytes for file in self.files)

    @property
    def modified(self) -> float | None:
        """When the last of its files was written, in seconds since 1970; None if the storage does not say."""
        return max((file.modified for file in self.files), default=0.0) or None


def take(storage: Storage, *, brief: bool = False, branches: bool = False) -> list[Found]:
    """Return every checkpoint folder, oldest step first; or the one that the storage's root is.

    Data files are not read; a folder that vanishes meanwhile is left out.

    Args:
        storage: A run's directory, or one checkpoint's folder.
        brief: Whether a manifest whose digest is right counts as good, without a look at all that is in it: many times
            as fast, for a list.
        branches: Whether to look into the run's branches, too; they are in the same listing.

    Raises:
        CheckpointNotFoundError: There is none at all.
        StorageError: The storage could not be read.
    """
    root = _take_root(storage, brief=brief)
    if root is not None:
        return [root]
    files = storage.list()
    folders = [
        (branch, folder) for branch, inner in _lines(files).items() if branches or not branch for folder in inner
    ]

    def look(branch: str, folder: Folder) -> Found | None:
        name = names.join(*(names.branch_folder(part) for part in branch.split("/") if part), folder.name)
        return _take(storage, name, folder.step, folder.files, folder, brief=brief, branch=branch)

    with ThreadPoolExecutor(NUM_READERS) as pool:
        found = [one for one in pool.map(look, *zip(*folders, strict=True)) if one is not None] if folders else []
    if not found:
        reason = f"its {len(files)} files are none of a checkpoint's" if files else "it is empty, or not there"
        near = _near(storage.url)
        usual = "give a run's directory, which holds folders named step-..., or one such folder"
        raise CheckpointNotFoundError(
            path=storage.url, reason=reason, fix=usual if near is None else f"did you mean {near!r}?"
        )
    return found


def _near(url: str) -> str | None:
    """Return what somebody may have meant who gave a local path that is not there."""
    slip = re.fullmatch(r".*/(s3|s3a|gs|gcs|az|abfs|https?)/{1,2}([^/].*)", url)
    path = Path(url)
    if "://" in url or path.exists():
        return None
    if slip is not None and not Path(url[: slip.start(1)], slip[1]).exists():
        return f"{slip[1]}://{slip[2]}"
    try:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.75)
    return str(path.with_name(near[0])) if near else None


def _lines(files: list[FileInfo]) -> dict[str, list[Folder]]:
    """Return the checkpoint folders of a run and of each of its branches, by the branch."""
    by_branch: dict[str, list[FileInfo]] = {"": []}
    for file in files:
        parts, branch = file.name.split("/"), []
        while len(parts) > 2 and parts[0] == names.BRANCHES:
            branch.append(parts[1])
            parts = parts[2:]
            outer = "/".join(branch[:-1])
            by_branch.setdefault(outer, [])
            if names.parse_origin(parts[0]) is not None:
                mark = f"{names.branch_folder(branch[-1])}/{parts[0]}"
                by_branch[outer].append(replace(file, name=mark))
        by_branch.setdefault("/".join(branch), []).append(replace(file, name="/".join(parts)))
    return {branch: scanned(inner) for branch, inner in sorted(by_branch.items())}


def is_unchanged(storage: Storage, folder: Folder) -> bool:
    """Say whether a folder holds just the files that it held when it was listed.

    Raises:
        StorageError: It could not be listed.
    """
    return tuple(storage.list(folder.name)) == folder.files


def _take_root(storage: Storage, *, brief: bool) -> Found | None:
    """Return the checkpoint that the storage's root is, or None if it is none."""
    step = names.parse_step(storage.url.rstrip("/").rpartition("/")[2])
    if step is None and not _exists(storage, names.MANIFEST):
        return None
    files = tuple(storage.list())
    return _take(storage, "", step, files, None, brief=brief) if files else None


def _exists(storage: Storage, name: str) -> bool:
    try:
        storage.read(name, 0, memoryview(bytearray(1)))
    except FileNotFoundError:
        return False
    except EOFError:  # it is empty
        return True
    return True


def _take(
    storage: Storage,
    name: str,
    step: int | None,
    files: tuple[FileInfo, ...],
    folder: Folder | None,
    *,
    brief: bool,
    branch: str = "",
) -> Found | None:
    """Return what a folder holds; None if it was committed and has vanished since it was listed."""
    prefix = f"{name}/" if folder is None else f"{folder.name}/"
    inner = {file.name.removeprefix(prefix) for file in files}
    is_pinned = names.PIN in inner
    found = Found(name=name, step=step, state="partial", files=files, pinned=is_pinned, folder=folder, branch=branch)
    if names.MANIFEST not in inner:
        put_aside = sorted(filter(names.is_quarantine, inner))
        if not put_aside:
            return found
        reason = _reason(storage, names.join(name, put_aside[-1]))
        return replace(found, state="damaged", problem=f"was put aside: {reason}", problem_file=put_aside[-1])
    try:
        if brief:
            checkpoint = read_outline(storage, name, pinned=found.pinned)
        else:
            checkpoint = describe(storage, read_manifest(storage, name), folder=name, pinned=found.pinned)
    except CheckpointNotFoundError:
        return None
    except CheckpointDamagedError as error:
        return replace(found, state="damaged", problem=error.problem, problem_file=error.file)
    except FormatVersionError as error:
        problem = f"has format version {error.found}, this distckpt reads up to {error.supported}"
        return replace(found, state="newer format", problem=problem, problem_file=names.MANIFEST)
    return replace(found, state="committed", step=checkpoint.step, checkpoint=checkpoint)


def _reason(storage: Storage, name: str) -> str:
    """Return why a manifest was put aside, as the record of it says."""
    try:
        reason = json.loads(storage.read_all(name, limit_bytes=MAX_BYTES))["reason"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return "nobody knows why"
    return str(reason).partition("\nFix:")[0]

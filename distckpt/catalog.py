"""The catalog: which checkpoints a directory holds, and the one place that deletes.

Invariant: a checkpoint exists if, and only if, its manifest does; so a manifest is deleted first and everything else
after it, and what has no manifest is a partial, invisible to restore.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable, MutableMapping
from dataclasses import dataclass, field, replace

from distckpt import names
from distckpt.checksum import digest
from distckpt.errors import CheckpointDamagedError, CheckpointNotFoundError, DistckptError, FormatVersionError
from distckpt.manifest import MAX_BYTES, Layout, Manifest, parse
from distckpt.outline import Outline, outline
from distckpt.storage import FileInfo, Storage, holds, withdraw
from distckpt.values import Json

_ATTEMPT = re.compile(r"[0-9a-f]{16}")
_TEMPORARY = re.compile(rf"{re.escape(names.MANIFEST)}\.[0-9a-f]+\.tmp")
LOCATE_TRIES = 20  # a reader loses this race once for each checkpoint that is committed while it looks


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The facts of one committed checkpoint.

    Attributes:
        step: Optimizer steps completed.
        path: Its folder, as a path or URL.
        num_bytes: The size of its data files, in bytes.
        world_size: The number of ranks that saved it.
        layout: "full" or "sharded".
        created: When it was committed, in seconds since 1970.
        metrics: What was measured at this step.
        attempt: The name of the save that made it.
        run: The name of the run that it belongs to.
        config: The run's configuration; None if none was given.
        pinned: Whether retention has to keep it.
        parent: {"step": ..., "attempt": ...} of the checkpoint before it in its run, or None.
        timings: Seconds that the save's parts took on the slowest rank: "stage_s", "write_s".
        versions: Of distckpt, torch and Python.
        writer: Who committed it: {"host": ..., "pid": ...}.
    """

    step: int
    path: str
    num_bytes: int
    world_size: int
    layout: Layout
    created: float
    metrics: dict[str, float] = field(default_factory=dict)
    attempt: str = ""
    run: str = ""
    config: dict[str, Json] | None = None
    pinned: bool = False
    parent: dict[str, Json] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    writer: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What one `step-...` folder holds, by its listing alone.

    Attributes:
        step: The step in its name.
        files: All its files; names below the directory.
        committed: Whether there is a manifest.
        damaged: Whether a manifest was put aside as damaged.
        pinned: Whether it is pinned.
        branches: The names of the branches that went off from it.
    """

    step: int
    files: tuple[FileInfo, ...]
    committed: bool
    damaged: bool
    pinned: bool
    branches: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name."""
        return names.step_name(self.step)

    @property
    def manifest_bytes(self) -> int:
        """The size of its manifest; 0 if there is none."""
        wanted = names.join(self.name, names.MANIFEST)
        return sum(file.num_bytes for file in self.files if file.name == wanted)

    @property
    def num_bytes(self) -> int:
        """The size of everything in it."""
        return sum(file.num_bytes for file in self.files)


def scan(storage: Storage) -> list[Folder]:
    """Return what each checkpoint folder of a directory holds, oldest step first; one listing, no file is read.

    Raises:
        StorageError: The directory could not be listed.
    """
    return scanned(storage.list())


def scanned(files: Iterable[FileInfo]) -> list[Folder]:
    """Return what each checkpoint folder holds, as `scan` does, by a directory's listing."""
    grouped: dict[int, list[FileInfo]] = {}
    branches: dict[int, list[str]] = {}
    for file in files:
        top, _, rest = file.name.partition("/")
        step = names.parse_step(top)
        if step is not None and rest:
            grouped.setdefault(step, []).append(file)
        elif top == names.BRANCHES and rest.count("/") == 1:
            branch, _, inner = rest.partition("/")
            origin = names.parse_origin(inner)
            if origin is not None:
                branches.setdefault(origin, []).append(branch)
    return [_folder(step, found, branches.get(step, ())) for step, found in sorted(grouped.items())]


def _folder(step: int, files: list[FileInfo], branches: Iterable[str]) -> Folder:
    inner = {file.name.partition("/")[2] for file in files}
    return Folder(
        step=step,
        files=tuple(files),
        committed=names.MANIFEST in inner,
        damaged=any(names.is_quarantine(name) for name in inner),
        pinned=names.PIN in inner,
        branches=tuple(branches),
    )


def branched(folders: Iterable[Folder]) -> dict[int, tuple[str, ...]]:
    """Return by step the branches that went off there."""
    return {folder.step: folder.branches for folder in folders if folder.branches}


def read_manifest(storage: Storage, folder: str = "") -> Manifest:
    """Return the manifest in `folder` of a storage, checked.

    Raises:
        CheckpointNotFoundError: There is none.
        CheckpointDamagedError: It is not whole, or is of another step than its folder's name says.
        FormatVersionError: It is of a newer format.
        StorageError: It could not be read.
    """
    return parsed_manifest(storage, folder, manifest_data(storage, folder))


def parsed_manifest(storage: Storage, folder: str, data: bytes) -> Manifest:
    """Return the manifest that `manifest_data` has read in `folder`, checked.

    Raises:
        As `read_manifest` does, but for what reading raises.
    """
    path = names.join(storage.url, folder)
    manifest = parse(data, path=path)
    _check_step(manifest.step, folder, path)
    return manifest


def read_outline(storage: Storage, folder: str, *, pinned: bool = False) -> Checkpoint:
    """Return the facts of the checkpoint in `folder`: as `describe` on `read_manifest`, but many times as fast.

    The manifest's digest is checked; whether its parts contradict each other is not.

    Raises:
        As `read_manifest` does.
    """
    path = names.join(storage.url, folder)
    found = outline(manifest_data(storage, folder), path=path)
    _check_step(found.step, folder, path)
    return describe(storage, found, folder=folder, pinned=pinned)


def manifest_data(storage: Storage, folder: str) -> bytes:
    """Return the bytes of the manifest in `folder`, whatever they are.

    Raises:
        CheckpointNotFoundError: There is none.
        StorageError: It could not be read, or is larger than any manifest.
    """
    try:
        return storage.read_all(names.join(folder, names.MANIFEST), limit_bytes=MAX_BYTES)
    except FileNotFoundError as error:
        path = names.join(storage.url, folder)
        raise CheckpointNotFoundError(path=path, reason=f"it has no {names.MANIFEST}") from error


def _check_step(step: int, folder: str, path: str) -> None:
    named = names.parse_step(folder.rpartition("/")[2])
    if named is not None and named != step:
        raise CheckpointDamagedError(
            path=path, file=names.MANIFEST, problem=f"is of step {step}, its folder of step {named}"
        )


def describe(storage: Storage, manifest: Manifest | Outline, *, folder: str, pinned: bool = False) -> Checkpoint:
    """Return a checkpoint's facts."""
    return Checkpoint(
        step=manifest.step,
        path=names.join(storage.url, folder),
        num_bytes=manifest.num_bytes,
        world_size=manifest.world_size,
        layout=manifest.layout,
        created=manifest.created,
        metrics=dict(manifest.metrics),
        attempt=manifest.attempt,
        run=manifest.run,
        config=manifest.config,
        pinned=pinned,
        parent=manifest.parent,
        timings=dict(manifest.timings),
        versions=dict(manifest.versions),
        writer=dict(manifest.writer),
    )


def committed(
    storage: Storage, folders: Iterable[Folder], *, known: MutableMapping[tuple[int, int], Checkpoint] | None = None
) -> list[Checkpoint]:
    """Return the facts of every committed checkpoint among `folders` whose manifest is whole, oldest first.

    Args:
        storage: The directory.
        folders: What `scan` found in it.
        known: Facts from before, by step and the manifest's size in bytes: these manifests are not read again. New
            ones are added.

    Raises:
        StorageError: A manifest could not be read. One that vanishes meanwhile is left out.
    """
    found = []
    facts = {} if known is None else known
    for folder in folders:
        if not folder.committed:
            continue
        key = folder.step, folder.manifest_bytes
        if key not in facts:
            try:
                manifest = read_manifest(storage, folder.name)
            except (CheckpointDamagedError, CheckpointNotFoundError):
                continue
            facts[key] = describe(storage, manifest, folder=folder.name)
        found.append(replace(facts[key], pinned=folder.pinned))
    return found


def quarantine(storage: Storage, folder: str, *, data: bytes, reason: str) -> bool:
    """Put a damaged checkpoint's manifest aside, so that it is none any more; its files stay until they are pruned.

    Args:
        storage: The directory.
        folder: The checkpoint's folder in it.
        data: The manifest that was found wanting, as `manifest_data` has read it. If another one is there by now, for
            the step was saved again, it stays.
        reason: What is wrong.

    Returns:
        Whether that manifest was still there.

    Raises:
        StorageError: The storage refuses; the checkpoint is as it was.
    """
    name = names.join(folder, names.MANIFEST)
    if not holds(storage, name, data):
        return False
    record = {"manifest": data.decode(errors="replace"), "reason": reason}
    with contextlib.suppress(FileExistsError):  # put aside before, for another reason
        storage.publish(names.join(folder, names.quarantine_name(digest(data)[:16])), json.dumps(record).encode())
    withdraw(storage, name, data)
    return True


def remove(storage: Storage, folder: Folder) -> None:
    """Delete a checkpoint's folder: the manifest first, then everything else.

    Raises:
        StorageError: A file could not be deleted; if it was not the manifest, a partial is left.
    """
    last = len(folder.files)
    rank = {names.join(folder.name, names.MANIFEST): 0, names.join(folder.name, names.PIN): last + 1}
    storage.delete(sorted((file.name for file in folder.files), key=lambda name: (rank.get(name, 1), name)))


def strays(storage: Storage, folder: Folder) -> list[str]:
    """Return the files that other saves have left in a committed folder; of one that makes no sense, nothing.

    Raises:
        StorageError: The manifest could not be read.
    """
    inner = {file.name: file.name.split("/")[1:] for file in folder.files}
    temporary = [name for name, parts in inner.items() if len(parts) == 1 and _TEMPORARY.fullmatch(parts[0])]
    attempts = {parts[0] for parts in inner.values() if len(parts) == 2 and _ATTEMPT.fullmatch(parts[0])}
    if len(attempts) < 2:  # as nearly always: the manifest need not be read
        return temporary
    try:
        manifest = read_manifest(storage, folder.name)
    except (CheckpointDamagedError, CheckpointNotFoundError, FormatVersionError):
        return []
    dead = attempts - {file.name.partition("/")[0] for file in manifest.files}
    return temporary + [name for name, parts in inner.items() if len(parts) == 2 and parts[0] in dead]


def remove_attempt(storage: Storage, folder: str, attempt: str) -> None:
    """Delete what an attempt that never committed left behind, as far as that works; raises nothing.

    Never call it for an attempt whose manifest may have been published.
    """
    try:
        storage.delete([file.name for file in storage.list(names.join(folder, attempt))])
    except DistckptError:
        return


def locate(storage: Storage, *, step: int | None = None) -> tuple[str, Manifest]:
    """Return the folder and the manifest of the checkpoint that a path means.

    Args:
        storage: One checkpoint's folder, or a run's directory.
        step: The checkpoint of this step; by default the newest one whose manifest is whole.

    Returns:
        The checkpoint's folder, "" if it is the storage's root, and its manifest.

    Raises:
        CheckpointNotFoundError: There is none.
        CheckpointDamagedError: The manifest of the one that is named, or of all there are, is not whole.
        StorageError: The storage could not be read.
    """
    try:
        manifest = read_manifest(storage)
    except CheckpointNotFoundError:
        pass
    else:
        if step is not None and manifest.step != step:
            raise CheckpointNotFoundError(path=storage.url, reason=f"it is of step {manifest.step}, not {step}")
        return "", manifest
    if step is not None:
        return names.step_name(step), manifest_of(storage, step)
    for tries_left in reversed(range(LOCATE_TRIES)):
        folders = scan(storage)
        try:
            return _newest_whole(storage, folders)
        except CheckpointNotFoundError:
            # If it was deleted since it was listed, then because there is a newer one.
            if tries_left == 0 or not any(folder.committed for folder in folders):
                raise
    raise AssertionError("unreachable")


def manifest_of(storage: Storage, step: int) -> Manifest:
    """Return the manifest of the checkpoint of a step of a run.

    Raises:
        CheckpointNotFoundError: There is none; names those that are there.
        CheckpointDamagedError: It is not whole.
        StorageError: The storage could not be read.
    """
    try:
        return read_manifest(storage, names.step_name(step))
    except CheckpointNotFoundError as error:
        folders = scan(storage)
        steps = ", ".join(f"{folder.step}" for folder in folders if folder.committed)
        reason = f"of step {step} there is none; " + (f"committed are {steps}" if steps else absence(folders))
        raise CheckpointNotFoundError(path=storage.url, reason=reason, fix="name one that is there") from error


def _newest_whole(storage: Storage, folders: Collection[Folder]) -> tuple[str, Manifest]:
    """Return the folder and the manifest of the newest checkpoint whose manifest is whole."""
    damaged: CheckpointDamagedError | None = None
    for folder in reversed([folder for folder in folders if folder.committed]):
        try:
            return folder.name, read_manifest(storage, folder.name)
        except CheckpointDamagedError as error:
            damaged = damaged or error
    if damaged is not None:
        raise damaged
    raise CheckpointNotFoundError(path=storage.url, reason=absence(folders))


def absence(folders: Collection[Folder]) -> str:
    """Return in words why there is no committed checkpoint among `folders`."""
    if not folders:
        return "it is empty, or not there"
    num_damaged = sum(folder.damaged for folder in folders)
    if num_damaged:
        return f"it holds {num_damaged} damaged and {len(folders) - num_damaged} partial ones"
    return f"it holds only partial ones ({len(folders)}), which never committed"


def find_newest(storage: Storage, *, before: int | None = None, leave_out: Collection[int] = ()) -> Folder | None:
    """Return the newest committed checkpoint's folder, or None.

    Args:
        storage: The directory.
        before: Only steps below this one.
        leave_out: Steps to pass over.

    Raises:
        StorageError: The directory could not be listed.
    """
    for folder in reversed(scan(storage)):
        if folder.committed and folder.step not in leave_out and (before is None or folder.step < before):
            return folder
    return None

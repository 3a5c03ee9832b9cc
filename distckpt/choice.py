"""The choice: which checkpoint a restore takes, and which it puts aside as damaged; all of it on rank 0.

Invariant: a checkpoint is called damaged only by what was seen of it after its manifest had been read, and put aside
only by that manifest's bytes: others may delete it, or save its step anew, at any moment.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from distckpt import catalog, names, verification
from distckpt.branches import Origin
from distckpt.errors import CheckpointDamagedError, CheckpointNotFoundError, DistckptError
from distckpt.events import Quarantined
from distckpt.loading import RestoreRequest
from distckpt.manifest import Manifest
from distckpt.storage import FileInfo, Storage, holds
from distckpt.values import Json

logger = logging.getLogger("distckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What rank 0 has seen of a directory.

    Attributes:
        folder: The checkpoint that a look will most likely choose; None if nothing can be said.
        folders: What the directory holds, if it was listed.
    """

    folder: str | None
    folders: list[catalog.Folder] | None = None


def sight(storage: Storage, request: RestoreRequest, origin: Origin | None) -> Sight:
    """Look for the checkpoint that a restore will most likely take; no file is read.

    Raises:
        StorageError: The directory could not be listed.

    Ranks: 0; blocks on the storage.
    """
    if origin is not None and request.step == origin.step:
        return Sight(folder=None)  # it lies elsewhere
    if request.step is not None:
        return Sight(folder=names.step_name(request.step))
    if not request.heal:
        return Sight(folder="")
    folders = catalog.scan(storage)
    return Sight(folder=next((each.name for each in reversed(folders) if each.committed), None), folders=folders)


def choose(
    storage: Storage,
    request: RestoreRequest,
    left_out: set[str],
    known: dict[str, Manifest],
    origin: Origin | None,
    *,
    folders: list[catalog.Folder] | None = None,
) -> Json:
    """Return which checkpoint to load: its "folder", its "attempt", and whether it "is_origin".

    Args:
        storage: The run's directory, or one checkpoint's folder.
        request: What is asked for.
        left_out: The folders of checkpoints that are not to be taken; those that are found damaged are added.
        known: By folder, the manifest of what is chosen is added.
        origin: What the directory's branch went off from.
        folders: What the directory holds, if it was listed just now.

    Returns:
        The choice; None if the directory holds no checkpoint, and never had one.

    Raises:
        CheckpointDamagedError: All there are, or the one that was asked for, are damaged.
        CheckpointNotFoundError: The one that was asked for is not there.
        StorageError: The storage could not be read.

    Ranks: 0; blocks on the storage.
    """
    if origin is not None and request.step == origin.step:
        return _chosen(origin.folder, origin.read_manifest(), known, is_origin=True)
    if request.step is not None or not request.heal:
        folder, manifest = catalog.locate(storage, step=request.step)
        return _chosen(folder, manifest, known)
    folders, found = _newest_good(storage, request, left_out, folders)
    if found is not None:
        return _chosen(*found, known)
    if origin is not None:
        return _chosen(origin.folder, origin.read_manifest(), known, is_origin=True)
    if left_out or any(folder.damaged for folder in folders):
        raise CheckpointDamagedError(
            path=storage.url,
            problem=f"has no good checkpoint left: {catalog.absence(catalog.scan(storage))}",
            fix=f"look at them with: distckpt ls {storage.url}  (or start afresh in another directory)",
        )
    if folders:
        logger.warning("%s: %s; starting from step 0", storage.url, catalog.absence(folders))
    return None


def _chosen(folder: str, manifest: Manifest, known: dict[str, Manifest], *, is_origin: bool = False) -> Json:
    known[folder] = manifest
    return {"folder": folder, "attempt": manifest.attempt, "is_origin": is_origin}


def _newest_good(
    storage: Storage, request: RestoreRequest, left_out: set[str], listed: list[catalog.Folder] | None
) -> tuple[list[catalog.Folder], tuple[str, Manifest] | None]:
    """Return what a directory holds, and of that the newest checkpoint that is good as far as its sizes tell.

    Damaged ones are put aside and left out. Of one that is deleted, or saved anew, while it is looked at, there is a
    newer one: so the directory is looked at again.
    """
    for tries_left in reversed(range(catalog.LOCATE_TRIES)):
        folders, has_changed = catalog.scan(storage) if listed is None else listed, False
        listed = None
        for candidate in reversed(folders):
            if not candidate.committed or candidate.name in left_out:
                continue
            try:
                return folders, (candidate.name, _good_manifest(storage, candidate, request))
            except CheckpointDamagedError:
                left_out.add(candidate.name)
            except CheckpointNotFoundError:
                has_changed = True
                if tries_left:
                    break
        if not has_changed:
            break
    return folders, None


def _good_manifest(storage: Storage, folder: catalog.Folder, request: RestoreRequest) -> Manifest:
    """Return a checkpoint's manifest, unless its bytes or its files' sizes show that it is damaged.

    Raises:
        CheckpointDamagedError: It is damaged; it is put aside.
        CheckpointNotFoundError: It was deleted, or another one has come in its place.
        StorageError: It could not be read.
    """
    data = catalog.manifest_data(storage, folder.name)
    try:
        manifest = catalog.parsed_manifest(storage, folder.name, data)
        _check_sizes(storage, folder, manifest)
    except CheckpointDamagedError as error:
        if not _put_aside(storage, folder.name, data, str(error), request):
            path = names.join(storage.url, folder.name)
            raise CheckpointNotFoundError(path=path, reason="it changed while it was looked at") from error
        raise
    return manifest


def _check_sizes(storage: Storage, folder: catalog.Folder, manifest: Manifest) -> None:
    """Refuse a checkpoint of which a listing alone shows that it is not whole.

    Since the directory was listed the step may have been saved anew, and this manifest be of that save: so a file
    counts as missing only where a listing that is younger than the manifest lacks it, too.
    """
    files = folder.files
    if any(_wrong_sizes(files, manifest, folder.name)):
        files = tuple(storage.list(folder.name))
    for problem in _wrong_sizes(files, manifest, folder.name):
        raise CheckpointDamagedError(
            path=names.join(storage.url, folder.name), step=manifest.step, file=problem.file, problem=problem.problem
        )


def _wrong_sizes(files: Iterable[FileInfo], manifest: Manifest, folder: str) -> Iterator[verification.Problem]:
    return verification.wrong_sizes({file.name: file.num_bytes for file in files}, manifest, folder=folder)


def _put_aside(storage: Storage, folder: str, data: bytes, reason: str, request: RestoreRequest) -> bool:
    """Put a damaged checkpoint aside, by its manifest's bytes, loudly; say whether they still were what is there."""
    first_line = reason.partition("\n")[0]
    try:
        if not catalog.quarantine(storage, folder, data=data, reason=first_line):
            return False
        done = "it is put aside"
    except DistckptError as error:
        done = f"it could not be put aside ({error})"
    logger.warning("damaged checkpoint: %s; %s, and the next older one is taken", first_line, done)
    request.tell(Quarantined(step=names.parse_step(folder), reason=f"{first_line}; {done}"))
    return True


def examine(storage: Storage, request: RestoreRequest, folder: str, fact: Json) -> Json:
    """Look at a checkpoint that a rank could not read; put it aside if it is damaged, and may be.

    Args:
        storage: The directory.
        request: What was asked for.
        folder: The checkpoint's folder.
        fact: The "file" that it could not read, and the "problem".

    Returns:
        What is wrong, as in `fact`; whether it has "vanished"; and whether that it is damaged is "confirmed".

    Raises:
        StorageError: The storage could not be read.

    Ranks: 0; blocks until every byte of it has been read.
    """
    found = {**fact, "vanished": False, "confirmed": True}
    try:
        data = catalog.manifest_data(storage, folder)
    except CheckpointNotFoundError:
        return {**found, "vanished": True}
    try:
        manifest = catalog.parsed_manifest(storage, folder, data)
        problem = next(verification.verify(storage, manifest, folder=folder), None)
    except CheckpointDamagedError as error:
        problem = verification.Problem(file=names.MANIFEST, problem=error.problem)
    if problem is None:
        return {**found, "confirmed": False}
    if request.heal:
        reason = f"{names.join(storage.url, folder)}: {problem.file!r} {problem.problem}"
        is_same = _put_aside(storage, folder, data, reason, request)
    else:
        is_same = holds(storage, names.join(folder, names.MANIFEST), data)
    if not is_same:  # what was read of it may be of another one, or of one that is being deleted
        return {**found, "confirmed": False}
    return {**found, "file": problem.file, "problem": problem.problem}

"""One load: from a checkpoint into the user's objects, in place, all of it or nothing.

Every byte is checked, and all ranks agree that it is good, before the first one of the state is changed; only where the
state is worth nothing yet, after a restart, it is read into at once.
Which checkpoint is loaded is one decision, made by rank 0, the same on every rank.
Invariant: what is loaded is what was saved; nothing is cast, and nothing that a digest does not vouch for is used.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from distckpt import catalog, names, nodecopy, verification
from distckpt.branches import Home, Origin
from distckpt.errors import CheckpointDamagedError, CheckpointNotFoundError, DistckptError
from distckpt.events import Quarantined
from distckpt.garbage import kept_off
from distckpt.loading import Loading, RestoreRequest
from distckpt.manifest import Manifest
from distckpt.ranks import Ranks
from distckpt.storage import FileInfo, Storage
from distckpt.values import Json

__all__ = ["Loaded", "RestoreRequest", "restore"]

logger = logging.getLogger("distckpt")

_TORN = "The state now holds parts of what was read: load another checkpoint, or build it anew, before going on."


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What was loaded.

    Attributes:
        path: Its path or URL.
        manifest: Its manifest.
        memory_bytes: What all ranks together have read of its data files from their nodes' memory.
        storage_bytes: And from the storage.
    """

    path: str
    manifest: Manifest
    memory_bytes: int = 0
    storage_bytes: int = 0


@kept_off()
def restore(
    state: Mapping[str, Any], request: RestoreRequest, *, storage: Storage, ranks: Ranks, origin: Origin | None = None
) -> Loaded | None:
    """Load a checkpoint into `state`, on every rank the same.

    Args:
        state: As it was saved; objects are changed in place, plain values replaced in their dict.
        request: Which checkpoint, and which of its entries.
        storage: A run's directory, or one checkpoint's folder.
        ranks: All ranks.
        origin: What the directory's branch went off from: older than all that is there, and never put aside.

    Returns:
        What was loaded; None if the directory holds no checkpoint, and never had one.

    Raises:
        StateMismatchError: The checkpoint does not fit; the state is as it was.
        CheckpointDamagedError: All there are, or the one that was asked for, are damaged; the state is as it was.
        CheckpointNotFoundError: The one that was asked for is not there.
        RankFailedError: A rank failed; unless it did so while loading the objects, the state is as it was.
        RankTimeoutError: A rank did not come.
        StorageError: As the only rank, the storage could not be read.

    Ranks: all (collective); blocks until every rank has loaded.
    """
    changed: list[bool] = []
    try:
        return _restore(state, request, changed, storage=storage, ranks=ranks, origin=origin)
    except BaseException as error:
        if any(changed):
            error.add_note(_TORN)
        raise


def branch_off(home: Home, *, own: Callable[[], None] | None, ranks: Ranks) -> Origin | None:
    """Return what the directory's branch went off from, once the branch is there; None if it is none.

    Args:
        home: The directory.
        own: Takes the directory, on all ranks; None if this job only reads.
        ranks: All ranks.

    Raises:
        As `Home.begin` and `own` do.

    Ranks: all (collective); blocks until rank 0 has looked, and as `own` does.
    """
    if home.run is None:
        if own is not None:
            own()
        return None

    def facts(find: Callable[[], Origin | None]) -> Json:
        return ranks.agree(
            "looking for the branch's origin",
            lambda: None,
            lambda _: None if (found := find()) is None else {"step": found.step, "attempt": found.attempt},
        )

    found = facts(home.origin)  # before a directory is made for what makes no sense
    if own is not None:
        own()
        found = facts(home.begin)
    return None if found is None else Origin(storage=home.run, **found)


def warn_of_newer(step: int, *, storage: Storage, ranks: Ranks) -> None:
    """Warn a job that goes on from an older checkpoint of its own directory that the newer ones are in its way.

    Raises:
        StorageError: The directory could not be listed.

    Ranks: all (collective); blocks until rank 0 has looked.
    """

    def look(_: list[None]) -> None:
        newest = catalog.find_newest(storage)
        if newest is not None and newest.step > step:
            logger.warning(
                "restored step %d, while %s goes up to step %d: a restart takes that one, and a step that is there "
                'cannot be saved again\nFix: go on in a branch: CheckpointManager(%r, at=%d, branch="NAME")',
                *(step, storage.url, newest.step, storage.url, step),
            )

    ranks.agree("looking for newer checkpoints", lambda: None, look)


def is_torn(error: BaseException) -> bool:
    """Say whether a restore that failed with `error` has left parts of a checkpoint in the state.

    Ranks: any.
    """
    return _TORN in getattr(error, "__notes__", ())


def _restore(
    state: Mapping[str, Any],
    request: RestoreRequest,
    changed: list[bool],
    *,
    storage: Storage,
    ranks: Ranks,
    origin: Origin | None,
) -> Loaded | None:
    """Restore, and note in `changed` whether a try has changed the state."""
    left_out: set[str] = set()
    again: set[str] = set()
    known: dict[str, Manifest] = {}  # what rank 0 has read to choose, it need not read again
    while True:
        chosen = ranks.agree(
            "restore: choosing a checkpoint",
            lambda: None,
            lambda _: _choose(storage, request, left_out, known, origin),
        )
        if chosen is None:
            return None
        folder, place, asked = chosen["folder"], storage, request
        if origin is not None and chosen["is_origin"]:
            place, asked = origin.storage, replace(request, heal=False)  # it is not this job's to put aside
        found = _load(state, asked, chosen, known.pop(folder, None), changed, storage=place, ranks=ranks)
        if isinstance(found, Loaded):
            return found
        if found["vanished"]:
            continue
        if not found["confirmed"] and folder not in again:
            again.add(folder)  # a second reading found nothing wrong: try once more
            continue
        if not asked.heal:
            raise _damaged(place, folder, found)
        left_out.add(folder)


def _choose(
    storage: Storage, request: RestoreRequest, left_out: set[str], known: dict[str, Manifest], origin: Origin | None
) -> Json:
    """Rank 0: return the folder of the checkpoint to load and its attempt, or None on a fresh directory.

    Its manifest is added to `known`.
    """
    if origin is not None and request.step == origin.step:
        return _chosen(origin.folder, origin.read_manifest(), known, is_origin=True)
    if request.step is not None or not request.heal:
        folder, manifest = catalog.locate(storage, step=request.step)
        return _chosen(folder, manifest, known)
    folders, found = _newest_good(storage, request, left_out)
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
    storage: Storage, request: RestoreRequest, left_out: set[str]
) -> tuple[list[catalog.Folder], tuple[str, Manifest] | None]:
    """Rank 0: return what a directory holds, and of that the newest checkpoint that is good as far as its sizes tell.

    Damaged ones are put aside and left out. Of one that is deleted, or saved anew, while it is looked at, there is a
    newer one: so the directory is looked at again.
    """
    for tries_left in reversed(range(catalog.LOCATE_TRIES)):
        folders, has_changed = catalog.scan(storage), False
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


def _damaged(storage: Storage, folder: str, found: Json) -> CheckpointDamagedError:
    path = names.join(storage.url, folder)
    return CheckpointDamagedError(
        path=path,
        step=names.parse_step(folder),
        file=found["file"],
        problem=found["problem"],
        fix=f"see what is wrong with it: distckpt verify {path}",
    )


def _load(
    state: Mapping[str, Any],
    request: RestoreRequest,
    chosen: Json,
    manifest: Manifest | None,
    changed: list[bool],
    *,
    storage: Storage,
    ranks: Ranks,
) -> Loaded | Json:
    """Load the chosen checkpoint; return what was loaded, or what rank 0 found out about its damage."""
    folder = chosen["folder"]
    shown = folder or names.MANIFEST
    loading = Loading(
        state,
        request,
        storage=storage,
        folder=folder,
        attempt=chosen["attempt"],
        manifest=manifest,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )

    def judge(facts: list[Json]) -> Json:
        bad = [(rank, fact["damage"]) for rank, fact in enumerate(facts) if fact["damage"] is not None]
        return {
            "found": _examine(storage, request, folder, *bad[0]) if bad else None,
            "teams": None if bad else nodecopy.teams([fact["told"] for fact in facts]),
        }

    with contextlib.closing(loading), _noting(loading, changed):
        verdict = ranks.agree(f"restore: checking {shown}", partial(_told, loading.prepare), judge)
        work: list[tuple[str, Callable[[], Json]]] = [("reading", loading.read)]
        if verdict["teams"] is not None:
            part = nodecopy.part_of(verdict["teams"], ranks.rank)
            work.insert(0, ("fetching", partial(loading.fetch, part) if part is not None else lambda: None))
        for action, step in work:
            if verdict["found"] is None:
                verdict = ranks.agree(f"restore: {action} {shown}", partial(_told, step), judge)
        if verdict["found"] is not None:
            return verdict["found"]
        memory_bytes, storage_bytes = ranks.agree(f"restore: loading {shown}", loading.apply, _added_up)
    loading.warn()
    assert loading.manifest is not None
    path = names.join(storage.url, folder)
    return Loaded(path=path, manifest=loading.manifest, memory_bytes=memory_bytes, storage_bytes=storage_bytes)


def _added_up(facts: list[Json]) -> Json:
    """Rank 0: return what all ranks have read from their nodes' memory, and from the storage; tell what was bad."""
    bad = [fact[2] for fact in facts if fact[2] is not None]
    if bad:
        logger.warning(
            "%s: %r in the memory tier %s; it was read from the storage instead%s",
            *bad[0][:3],
            "" if len(bad) == 1 and bad[0][3] == 1 else f", and so were others, on {len(bad)} ranks",
        )
    return [sum(fact[0] for fact in facts), sum(fact[1] for fact in facts)]


@contextlib.contextmanager
def _noting(loading: Loading, changed: list[bool]) -> Iterator[None]:
    try:
        yield
    finally:
        changed.append(loading.changes_state)


def _told(work: Callable[[], Json]) -> Json:
    """Do `work`; damage that it meets is no failure of this rank, but a fact for all."""
    try:
        return {"told": work(), "damage": None}
    except (CheckpointDamagedError, CheckpointNotFoundError) as error:
        problem = getattr(error, "problem", str(error))
        return {"told": None, "damage": {"file": getattr(error, "file", None), "problem": problem}}


def _examine(storage: Storage, request: RestoreRequest, folder: str, rank: int, fact: Json) -> Json:
    """Rank 0: look at a checkpoint that a rank could not read; put it aside if it is damaged, and may be."""
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
        if not _put_aside(storage, folder, data, reason, request):
            return {**found, "confirmed": False}  # it is another one by now
    return {**found, "file": problem.file, "problem": problem.problem}

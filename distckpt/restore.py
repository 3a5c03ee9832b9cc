"""One load: from a checkpoint into the user's objects, in place, all of it or nothing.

Every byte is checked, and all ranks agree that it is good, before the first one of the state is changed; only where the
state is worth nothing yet, after a restart, it is read into at once.
Which checkpoint is loaded is one decision, made by rank 0, the same on every rank.
Invariant: what is loaded is what was saved; nothing is cast, and nothing that a digest does not vouch for is used.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from distckpt import catalog, names, nodecopy
from distckpt.branches import Home, Origin
from distckpt.choice import choose, examine, sight
from distckpt.devicecopy import hold_up
from distckpt.errors import CheckpointDamagedError, CheckpointNotFoundError, DistckptError
from distckpt.garbage import kept_off
from distckpt.loading import Loading, RestoreRequest
from distckpt.manifest import Manifest
from distckpt.ranks import Ranks
from distckpt.storage import Storage
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
    hold_up()  # what is being copied for a save is not to be read into before
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
    new_loading = partial(Loading, state, rank=ranks.rank, world_size=ranks.world_size)
    left_out: set[str] = set()
    again: set[str] = set()
    while True:
        trial = _Trial(new_loading, request, left_out, storage=storage, ranks=ranks, origin=origin)
        verdict = trial.agree()
        chosen = verdict["chosen"]
        if chosen is None:
            return None
        folder, place, asked = chosen["folder"], storage, request
        if origin is not None and chosen["is_origin"]:
            place, asked = origin.storage, replace(request, heal=False)  # it is not this job's to put aside
        loading = trial.loading if verdict["prepared"] else None
        if loading is None:
            attempt, manifest = chosen["attempt"], trial.manifest_of(chosen)
            loading = new_loading(asked, storage=place, folder=folder, attempt=attempt, manifest=manifest)
        found = _load(loading, asked, folder, verdict["prepared"], changed, storage=place, ranks=ranks)
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


class _Trial:
    """One choice of a checkpoint, during which every rank prepares the one that rank 0 will most likely choose.

    Its manifest has megabytes if there are many ranks; one after the other, rank 0 and then the others would read it.

    Args:
        new_loading: Makes a `Loading` into the user's state.
        request: What the restore was told.
        left_out: The folders of checkpoints that are not to be taken.
        storage: The directory.
        ranks: All ranks.
        origin: What the directory's branch went off from.

    Attributes:
        loading: What this rank has prepared.
    """

    def __init__(
        self,
        new_loading: Callable[..., Loading],
        request: RestoreRequest,
        left_out: set[str],
        *,
        storage: Storage,
        ranks: Ranks,
        origin: Origin | None,
    ) -> None:
        self.loading: Loading | None = None
        self._new_loading = new_loading
        self._request = request
        self._left_out = left_out
        self._storage = storage
        self._ranks = ranks
        self._origin = origin
        self._known: dict[str, Manifest] = {}
        self._listed: list[catalog.Folder] | None = None
        self._likely: str | None = None
        self._chosen: Json = None
        self._failure: Exception | None = None

    def agree(self) -> Json:
        """Return what rank 0 has "chosen", and, if every rank has "prepared" that, with whom each may share reads.

        Ranks: all (collective); blocks until rank 0 has chosen, and all have prepared.
        """
        action = "restore: choosing a checkpoint"
        if self._ranks.world_size > 1:
            self._likely = self._ranks.agree(action, lambda: None, lambda _: self._look())
        return self._ranks.agree(action, self._prepare, self._judge)

    def manifest_of(self, chosen: Json) -> Manifest | None:
        """Return the manifest of what was chosen, if this rank has read it; it may have been saved anew since."""
        found = self._known.get(chosen["folder"])
        if chosen["is_origin"] and self._ranks.rank:  # another directory's, which may have a namesake here
            return None
        return found if found is not None and found.attempt == chosen["attempt"] else None

    def _look(self) -> str | None:
        """Rank 0: return what it will most likely choose."""
        seen = sight(self._storage, self._request, self._origin)
        self._listed = seen.folders
        return seen.folder if seen.folder not in self._left_out else None

    def _prepare(self) -> Json:
        """Rank 0: choose; then all: prepare what it has most likely chosen, and return what came of it, or None."""
        if self._ranks.rank == 0:
            try:
                self._chosen = choose(
                    self._storage, self._request, self._left_out, self._known, self._origin, folders=self._listed
                )
            except Exception as error:  # noqa: BLE001  it is raised once the others have come
                self._failure = error
            if self._chosen is None or self._chosen["is_origin"] or self._chosen["folder"] != self._likely:
                return None
        if self._likely is None:
            return None
        with contextlib.suppress(DistckptError):  # who prepares what was chosen meets it again
            manifest = self._known.get(self._likely) or catalog.read_manifest(self._storage, self._likely)
            self._known[self._likely] = manifest
            loading = self._new_loading(
                self._request,
                storage=self._storage,
                folder=self._likely,
                attempt=manifest.attempt,
                manifest=manifest,
            )
            told = loading.prepare()
            self.loading = loading
            return {"attempt": manifest.attempt, "told": told}
        return None

    def _judge(self, facts: list[Json]) -> Json:
        """Rank 0: return what it has chosen, and whether all have prepared that."""
        if self._failure is not None:
            raise self._failure
        ready = all(fact is not None and fact["attempt"] == self._chosen["attempt"] for fact in facts)
        prepared = {"teams": nodecopy.teams([fact["told"] for fact in facts])} if ready else None
        return {"chosen": self._chosen, "prepared": prepared}


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
    loading: Loading,
    request: RestoreRequest,
    folder: str,
    prepared: Json | None,
    changed: list[bool],
    *,
    storage: Storage,
    ranks: Ranks,
) -> Loaded | Json:
    """Load the chosen checkpoint; return what was loaded, or what rank 0 found out about its damage."""
    shown = folder or names.MANIFEST

    def judge(facts: list[Json]) -> Json:
        bad = [fact["damage"] for fact in facts if fact["damage"] is not None]
        return {
            "found": examine(storage, request, folder, bad[0]) if bad else None,
            "teams": None if bad else nodecopy.teams([fact["told"] for fact in facts]),
        }

    with contextlib.closing(loading), _noting(loading, changed):
        if prepared is not None:
            verdict = {"found": None, **prepared}
        else:
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

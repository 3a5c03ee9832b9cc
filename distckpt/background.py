"""What goes on beside the training: the writing of one save, and the pruning after it, each on a thread of its own.

Invariant: at most one save and one pruning are under way; and pruning touches nothing in the folder of a save that was
in flight at any time since it looked at the directory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from distckpt import catalog
from distckpt.catalog import Checkpoint, Folder
from distckpt.errors import StorageError
from distckpt.events import Callback, Pruned
from distckpt.retention import Retention, decide
from distckpt.storage import FileInfo, KeepsUploads, Storage
from distckpt.threads import KeptThreads

logger = logging.getLogger("distckpt")


class Writing:
    """The save in flight, and its failure until somebody has been told.

    Its thread is kept from save to save: to start one takes 0.4 ms of the training's time, to hand work over 0.05 ms.
    """

    def __init__(self) -> None:
        self._threads = KeptThreads(1, "distckpt-write")
        self._work: Future[None] | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._work is not None and not self._work.done()

    def start(self, work: Callable[[], None], *, tell: bool) -> None:
        """Do `work` on a thread, which the interpreter waits for at its end; the save before has to be over.

        Args:
            work: Writes and commits.
            tell: Whether to log a failure at once.

        Ranks: any; returns at once.
        """
        self._work = self._threads.pool.submit(self._work_quietly, work, tell)

    def prewarm(self) -> None:
        """Start the thread, unless it is there; no save is in flight.

        Ranks: any; blocks until it runs.
        """
        self._threads.pool.submit(lambda: None).result()

    def join(self) -> None:
        """Return once no save is in flight; a failure is kept.

        Ranks: any; blocks until the save in flight is committed.
        """
        if self._work is not None:
            self._work.result()
            self._work = None

    def close(self) -> None:
        """End the thread, once no save is in flight.

        Ranks: any.
        """
        self._threads.close()

    def wait(self) -> None:
        """Return once no save is in flight.

        Raises:
            DistckptError: The last save's failure, once.

        Ranks: any; blocks until the save in flight is committed.
        """
        self.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _work_quietly(self, work: Callable[[], None], tell: bool) -> None:
        """A failure waits for the next call, but is in the log at once."""
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised again by wait()
            self._failure = error
            if tell:
                logger.error("background save failed: %s", error)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneRequest:
    """What a pruning is told.

    Attributes:
        newest: The step that was committed last: of partials only older ones are known to be dead.
        resumed_from: The step that the run resumed from.
    """

    newest: int
    resumed_from: int | None


class Pruner:
    """Deletes what retention does not keep, and what dead saves have left; a failure is a warning.

    A request that comes while a pruning runs is carried out after it, with the directory as it is then.

    Args:
        retention: What to keep.
        insist: Called before each pruning and each deletion; raises if nothing may be deleted any more.
        tell: Is told of the checkpoints that were deleted.

    Attributes:
        known: Facts of checkpoints whose manifests need not be read again; see `catalog.committed`.
    """

    def __init__(
        self,
        retention: Retention,
        *,
        insist: Callable[[], None] = lambda: None,
        tell: Callback = lambda event: None,
    ) -> None:
        self.known: dict[tuple[int, int], Checkpoint] = {}
        self._retention = retention
        self._insist = insist
        self._tell = tell
        self._turn = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wanted: tuple[Storage, PruneRequest | None] | None = None
        self._in_flight: int | None = None
        self._spared: set[int] = set()
        self._deleting: int | None = None
        self._spares_youngest = False

    def start(self, storage: Storage, request: PruneRequest) -> None:
        """Prune on a thread.

        Ranks: 0; returns at once.
        """
        self._want(storage, request)

    def sweep(self, storage: Storage, *, spares_youngest: bool) -> None:
        """Delete on a thread what saves before this job have left; whoever calls owns the directory.

        Args:
            storage: The directory.
            spares_youngest: Whether the youngest of them may still publish its manifest, for who wrote it may have
                stood still; where requests come late it is always spared.

        Ranks: 0; returns at once.
        """
        self._spares_youngest = spares_youngest
        self._want(storage, None)

    def _want(self, storage: Storage, request: PruneRequest | None) -> None:
        with self._turn:
            self._wanted = storage, request
            if self._thread is not None:
                return
            self._thread = thread = threading.Thread(target=self._work, name="distckpt-prune", daemon=False)
        self._launch(thread)

    def wait(self) -> None:
        """Return once nothing is left to prune.

        Ranks: any; blocks until all that was asked for has been deleted, or has failed to be.
        """
        with self._turn:
            self._turn.wait_for(lambda: self._thread is None)

    def spare(self, step: int) -> None:
        """Keep away from the folder of `step`, in which a save begins, until `release` and one look at the directory.

        Ranks: any, before the first rank writes; blocks while just this folder is being deleted.
        """
        with self._turn:
            self._in_flight = step
            self._spared.add(step)
            self._turn.wait_for(lambda: self._deleting != step)

    def release(self) -> None:
        """Take note that the save is over, committed or not.

        Ranks: any.
        """
        with self._turn:
            self._in_flight = None

    def _launch(self, thread: threading.Thread) -> None:
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads, or the interpreter is about to end
            self._work()

    def _work(self) -> None:
        """Carry out what was asked for, and what is asked for meanwhile."""
        while True:
            with self._turn:
                job, self._wanted = self._wanted, None
                if job is None:
                    self._thread = None
                    self._turn.notify_all()
                    return
                # What is over was over before the look at the directory that comes now, which so sees all of it.
                self._spared = set() if self._in_flight is None else {self._in_flight}
            storage, request = job
            try:
                self._insist()
                if request is None:
                    self._sweep(storage)
                else:
                    self._prune(storage, request)
            except Exception as error:  # noqa: BLE001  no reason to stop a training
                logger.warning("could not prune %s: %s", storage.url, error)

    def _prune(self, storage: Storage, request: PruneRequest) -> None:
        folders = catalog.scan(storage)
        committed = catalog.committed(storage, folders, known=self.known)
        plan = decide(
            committed,
            self._retention,
            now=time.time(),
            resumed_from=request.resumed_from,
            pinned=[folder.step for folder in folders if folder.pinned],
            branches=catalog.branched(folders),
        )
        gone = {decision.step for decision in plan if not decision.kept}
        deleted: list[int] = []
        try:
            for folder in folders:
                is_dead = not folder.committed and not folder.damaged and folder.step <= request.newest
                if folder.step in gone or is_dead:
                    is_deleted = self._away_from_saves(folder, partial(catalog.remove, storage, folder))
                    deleted += [folder.step] if is_deleted and folder.committed else []
                elif folder.committed and folder.step <= request.newest:
                    self._remove_strays(storage, folder)
        finally:
            if deleted:
                num_bytes = sum(checkpoint.num_bytes for checkpoint in committed if checkpoint.step in deleted)
                self._tell(Pruned(step=request.newest, steps=tuple(deleted), num_bytes=num_bytes))

    def _sweep(self, storage: Storage) -> None:
        """Delete what dead saves have left, but for the youngest one where its manifest may still be on its way."""
        folders = catalog.scan(storage)
        dead = [folder for folder in folders if not (folder.committed or folder.damaged or folder.pinned)]
        spares = self._spares_youngest or storage.capabilities.late_requests
        spared = _youngest(dead) if spares else []
        for folder in dead:
            left = [file.name for file in folder.files if file not in spared]
            if left:
                self._away_from_saves(folder, partial(storage.delete, left))
        for folder in folders:
            if folder.committed:
                self._remove_strays(storage, folder)
        if isinstance(storage, KeepsUploads):
            try:
                abandoned = storage.uploads()
                if abandoned:
                    self._insist()
                    storage.abort_uploads(abandoned)
            except StorageError as error:  # it may be nobody's right to see them
                logger.info("unfinished uploads are left where they are: %s", error)

    def _remove_strays(self, storage: Storage, folder: Folder) -> None:
        found = catalog.strays(storage, folder)
        if found:
            self._away_from_saves(folder, partial(storage.delete, found))

    def _away_from_saves(self, folder: Folder, delete: Callable[[], None]) -> bool:
        """Delete in a folder, unless a save may be there; say whether that was done."""
        with self._turn:
            if folder.step in self._spared:
                return False
            self._deleting = folder.step
        try:
            self._insist()  # since the last deletion the job may have stood still, and another taken its place
            delete()
        finally:
            with self._turn:
                self._deleting = None
                self._turn.notify_all()
        return True


def _youngest(folders: Iterable[Folder]) -> list[FileInfo]:
    """Return the files of the attempt that was written to last, and a manifest that was about to get its name there."""
    files = [(folder.step, file) for folder in folders for file in folder.files]
    times = [(file.modified, step, _attempt_of(file)) for step, file in files if not _is_beside(file)]
    _, *youngest = max(times, default=(0.0, -1, ""))
    attempts = ([step, None if _is_beside(file) else _attempt_of(file)] for step, file in files)
    spared = (youngest, [youngest[0], None])
    return [file for attempt, (_, file) in zip(attempts, files, strict=True) if attempt in spared]


def _is_beside(file: FileInfo) -> bool:
    """Say whether a file lies beside the attempts of its folder, as a manifest does."""
    return file.name.count("/") < 2


def _attempt_of(file: FileInfo) -> str:
    return file.name.split("/")[1]

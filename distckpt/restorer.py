"""The restorer: brings a run's state back, and knows what the state in memory is worth.

Invariant: a state that holds parts of a checkpoint which failed to load is never saved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distckpt.bulletin import Bulletin
from distckpt.errors import UsageError
from distckpt.events import Restored
from distckpt.manifest import Manifest
from distckpt.pace import Pace, past_uptimes
from distckpt.ranks import Ranks
from distckpt.restore import RestoreRequest, is_torn, restore
from distckpt.saver import Saver
from distckpt.storage import Storage

logger = logging.getLogger("distckpt")


class Restorer:
    """Restores a run's state.

    Args:
        saver: Makes the run's saves, which go on from what is restored.
        pace: Is told from which step on the run goes on.
        bulletin: Is told of what is restored, and of what is found damaged.
    """

    def __init__(self, *, saver: Saver, pace: Pace, bulletin: Bulletin) -> None:
        self._saver = saver
        self._pace = pace
        self._bulletin = bulletin
        self._is_unused = True  # nothing has been restored, and no step done: the state is worth nothing yet
        self._is_torn = False

    def state_is_used(self) -> None:
        """Take note that the state is worth something: from now on a restore is all or nothing.

        Ranks: any.
        """
        self._is_unused = False

    def insist_whole(self) -> None:
        """Make sure that the state may be saved.

        Raises:
            UsageError: It holds parts of a checkpoint that failed to load.

        Ranks: any.
        """
        if self._is_torn:
            raise UsageError(
                problem="the state holds parts of a checkpoint that failed to load, and is not saved",
                fix="restore a whole one, or build the state anew and make a new CheckpointManager",
            )

    def restore(
        self, state: Mapping[str, Any], request: RestoreRequest, *, storage: Storage, ranks: Ranks, owns: bool
    ) -> int:
        """Restore, and return the step that the run goes on from; 0 on a fresh directory.

        Args:
            state: What to load into.
            request: Which checkpoint, and which of its entries.
            storage: The run's directory.
            ranks: The channel of the training's thread.
            owns: Whether this job is to own the directory.

        Raises:
            As `restore.restore` and `Saver.own` do.

        Ranks: all (collective); blocks until every rank has loaded.
        """
        self._saver.settle()
        if owns:
            self._saver.own(ranks)
        manifest = self._load(state, request, storage=storage, ranks=ranks)
        if owns:
            self._saver.sweep()
        self._pace.restart(0 if manifest is None else manifest.step)
        if manifest is None:
            return 0
        self._saver.resume(manifest)
        self._pace.recall(manifest.timings)
        if ranks.rank == 0 and self._pace.is_auto:
            self._pace.ended_s = past_uptimes(storage)
        return manifest.step

    def _load(
        self, state: Mapping[str, Any], request: RestoreRequest, *, storage: Storage, ranks: Ranks
    ) -> Manifest | None:
        """Load, tell of it, and return the manifest of what was loaded; None on a fresh directory."""
        fresh = request.step is None and self._is_unused
        request = replace(request, fresh=fresh, tell=self._bulletin.post)
        self._is_unused = False
        begun = time.monotonic()
        try:
            loaded = restore(state, request, storage=storage, ranks=ranks)
        except BaseException as error:
            self._is_torn = self._is_torn or is_torn(error)
            raise
        self._is_torn = self._is_torn and loaded is None
        seconds = round(time.monotonic() - begun, 6)
        if loaded is None:
            self._bulletin.post(Restored(step=0, seconds=seconds, num_bytes=0))
            return None
        _, manifest = loaded
        self._bulletin.post(Restored(step=manifest.step, seconds=seconds, num_bytes=manifest.num_bytes))
        if ranks.rank == 0:
            logger.info(
                "restored step %d from %s: %.1f MB in %.2f s",
                *(manifest.step, storage.url, manifest.num_bytes / 1e6, seconds),
            )
        return manifest

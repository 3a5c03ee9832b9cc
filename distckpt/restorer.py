"""The restorer: brings a run's state back, and knows what the state in memory is worth.

Invariant: a state that holds parts of a checkpoint which failed to load is never saved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distckpt.branches import Origin
from distckpt.bulletin import Bulletin
from distckpt.errors import UsageError
from distckpt.events import Restored
from distckpt.manifest import Manifest
from distckpt.ranks import Ranks
from distckpt.restore import RestoreRequest, is_torn, restore
from distckpt.storage import Storage

logger = logging.getLogger("distckpt")


class Restorer:
    """Restores a run's state.

    Args:
        bulletin: Is told of what is restored, and of what is found damaged.
        is_branch: Whether nothing may be saved before something was restored.
    """

    def __init__(self, *, bulletin: Bulletin, is_branch: bool = False) -> None:
        self._bulletin = bulletin
        self._has_begun = not is_branch
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
            UsageError: It holds parts of a checkpoint that failed to load, or was never restored and has to be.

        Ranks: any.
        """
        if self._is_torn:
            raise UsageError(
                problem="the state holds parts of a checkpoint that failed to load, and is not saved",
                fix="restore a whole one, or build the state anew and make a new CheckpointManager",
            )
        if not self._has_begun:
            problem = "a branch goes on from a checkpoint, and nothing was restored"
            raise UsageError(problem=problem, fix="done = ckpt.restore(state) before the first save")

    def restore(
        self,
        state: Mapping[str, Any],
        request: RestoreRequest,
        *,
        storage: Storage,
        ranks: Ranks,
        origin: Origin | None = None,
    ) -> Manifest | None:
        """Restore, and return the manifest of what was loaded; None on a fresh directory.

        Args:
            state: What to load into.
            request: What to load.
            storage: The run's directory, or its branch's.
            ranks: All ranks.
            origin: What the branch went off from.

        Raises:
            As `restore.restore` does.

        Ranks: all (collective); blocks until every rank has loaded.
        """
        fresh = request.step is None and self._is_unused
        request = replace(request, fresh=fresh, tell=self._bulletin.post)
        self._is_unused, self._has_begun = False, True
        begun = time.monotonic()
        try:
            loaded = restore(state, request, storage=storage, ranks=ranks, origin=origin)
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

"""The restorer: brings a run's state back, and knows what the state in memory is worth.

Invariant: a state that holds parts of a checkpoint which failed to load is never saved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from distckpt.branches import Home, Origin
from distckpt.bulletin import Bulletin
from distckpt.errors import UsageError
from distckpt.events import Restored
from distckpt.garbage import kept_off
from distckpt.manifest import Manifest
from distckpt.pace import Pace, past_uptimes
from distckpt.ranks import Ranks
from distckpt.restore import Loaded, RestoreRequest, branch_off, is_torn, restore, warn_of_newer
from distckpt.saver import Saver

logger = logging.getLogger("distckpt")


class Restorer:
    """Restores a run's state.

    Args:
        home: The run's directory, or that of its branch: there nothing may be saved before something was restored.
        saver: Makes the run's saves, which go on from what is restored.
        pace: Is told from which step on the run goes on.
        bulletin: Is told of what is restored, and of what is found damaged.
    """

    def __init__(self, home: Home, *, saver: Saver, pace: Pace, bulletin: Bulletin) -> None:
        self._home = home
        self._saver = saver
        self._pace = pace
        self._bulletin = bulletin
        self._has_begun = not home.is_named
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

    @kept_off()  # until what a manifest made is gone: of 20,000 tensors, a walk over it takes 7 ms
    def restore(self, state: Mapping[str, Any], request: RestoreRequest, *, ranks: Ranks, owns: bool) -> int:
        """Restore, and return the step that the run goes on from; 0 on a fresh directory.

        Args:
            state: What to load into.
            request: Which checkpoint, and which of its entries.
            ranks: The channel of the training's thread.
            owns: Whether this job is to own the directory.

        Raises:
            As `restore.branch_off`, `restore.restore` and `Saver.own` do.

        Ranks: all (collective); blocks until every rank has loaded.
        """
        self._saver.settle()
        own = partial(self._saver.own, ranks) if owns else None
        origin = branch_off(self._home, own=own, ranks=ranks)
        manifest = self._load(state, request, ranks=ranks, origin=origin)
        if not owns and request.step is None:
            self._saver.follow(0 if manifest is None else manifest.step)
        if owns:
            self._saver.sweep()
            self._saver.sweep_tier(manifest)
            if request.step is not None:
                warn_of_newer(request.step, storage=self._home.storage, ranks=ranks)
        self._pace.restart(0 if manifest is None else manifest.step)
        if manifest is None:
            return 0
        self._saver.resume(manifest)
        self._pace.recall(manifest.timings)
        if ranks.rank == 0 and self._pace.is_auto:
            self._pace.ended_s = past_uptimes(self._home.storage)
        return manifest.step

    def _load(
        self, state: Mapping[str, Any], request: RestoreRequest, *, ranks: Ranks, origin: Origin | None
    ) -> Manifest | None:
        """Load, tell of it, and return the manifest of what was loaded; None on a fresh directory."""
        fresh = request.step is None and self._is_unused
        request = replace(request, fresh=fresh, memory_tier=self._saver.uses_tier, tell=self._bulletin.post)
        self._is_unused, self._has_begun = False, True
        begun = time.monotonic()
        try:
            loaded = restore(state, request, storage=self._home.storage, ranks=ranks, origin=origin)
        except BaseException as error:
            self._is_torn = self._is_torn or is_torn(error)
            raise
        self._is_torn = self._is_torn and loaded is None
        seconds = round(time.monotonic() - begun, 6)
        if loaded is None:
            self._bulletin.post(Restored(step=0, seconds=seconds, num_bytes=0))
            return None
        manifest = loaded.manifest
        self._bulletin.post(
            Restored(
                step=manifest.step,
                seconds=seconds,
                num_bytes=manifest.num_bytes,
                memory_bytes=loaded.memory_bytes,
                storage_bytes=loaded.storage_bytes,
            )
        )
        if ranks.rank == 0:
            logger.info(
                "restored step %d from %s: %.1f MB in %.2f s%s",
                *(manifest.step, self._home.storage.url, manifest.num_bytes / 1e6, seconds),
                _sources(loaded) if request.memory_tier else "",
            )
        return manifest


def _sources(loaded: Loaded) -> str:
    """Return where the bytes came from, in words."""
    read = f"{loaded.memory_bytes / 1e6:.1f} MB from the memory tier"
    return f"; read {read}, {loaded.storage_bytes / 1e6:.1f} MB from the storage"

"""One checkpoint, no policy: `save` to a path, `load` from it."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

from distckpt import names, onedirectory
from distckpt.catalog import Checkpoint, describe, locate
from distckpt.commit import commit
from distckpt.manifest import Layout
from distckpt.preparation import SaveRequest, prepare
from distckpt.ranks import Ranks
from distckpt.restore import RestoreRequest, restore
from distckpt.storage import open_storage
from distckpt.values import Json
from distckpt.workspace import Workspace

TIMEOUT_S = 1800.0


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    step: int | None = None,
    layout: Layout = "sharded",
    metrics: Mapping[str, float] | None = None,
    config: Mapping[str, Json] | None = None,
    rng: bool = True,
    timeout_s: float = TIMEOUT_S,
    storage_options: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Save `state` as one checkpoint, and return its facts once it is committed.

    Args:
        path: The checkpoint's own folder, new or empty: a path or URL.
        state: A dict of objects with `state_dict` and `load_state_dict`, tensors and plain values.
        step: Optimizer steps completed; by default what a path like "step-000000001000" says, else 0.
        layout: Who writes: all ranks their share ("sharded"), or rank 0 alone ("full").
        metrics: What was measured at this step.
        config: Settings to keep with it; plain JSON values.
        rng: Whether to save each rank's random-number generators.
        timeout_s: How long to wait for another rank at most, in seconds.
        storage_options: For the URL's file system, as fsspec takes them.

    Raises:
        CheckpointExistsError: There is a checkpoint at `path`.
        ConfigError: The ranks of different hosts see different places at `path`.
        UnsupportedStateError: The state holds something that cannot be saved; names the key.
        RankFailedError: A rank failed; there is no checkpoint.
        RankTimeoutError: A rank did not come; there is no checkpoint.
        StorageFullError: There is not enough room for it; nothing was written.
        StorageError: As the only rank, it could not be written.

    Ranks: all (collective); blocks until the checkpoint is committed.
    """
    storage = open_storage(path, storage_options=storage_options)
    ranks = Ranks(timeout_s=timeout_s)

    def name(views: list[Json]) -> Json:
        return [names.new_attempt(), onedirectory.marked(storage, views)]

    run, mark = ranks.agree("naming the run", partial(onedirectory.viewpoint, storage), name)
    onedirectory.insist(storage, ranks, mark)
    named = names.parse_step(storage.url.rstrip("/").rpartition("/")[2])
    request = SaveRequest(
        step=step if step is not None else (named or 0),
        folder="",
        run=run,
        layout=layout,
        rng=rng,
        metrics=dict(metrics or {}),
        config=None if config is None else dict(config),
    )
    prepared = prepare(state, request, ranks=ranks, storage=storage, workspace=Workspace(), copy="while writing")
    commit(prepared, ranks=ranks, storage=storage)
    folder, manifest = locate(storage)
    return describe(storage, manifest, folder=folder)


def load(
    path: str | os.PathLike[str],
    state: MutableMapping[str, Any],
    *,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    rng: bool = True,
    timeout_s: float = TIMEOUT_S,
    storage_options: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Load one checkpoint into `state`, in place, and return its facts.

    Args:
        path: The checkpoint's folder, or a run's directory, whose newest checkpoint is then meant; a path or URL.
        state: What to load into; objects in place, plain values are replaced in the dict.
        skip: Shell patterns of entries to leave as they are: ["model.head.*", "optimizer"].
        only: Shell patterns of the only entries to load.
        rng: Whether to set each rank's random-number generators, if the checkpoint has them.
        timeout_s: How long to wait for another rank at most, in seconds.
        storage_options: For the URL's file system, as fsspec takes them.

    Raises:
        CheckpointNotFoundError: There is no checkpoint at `path`.
        CheckpointDamagedError: Its bytes are not the ones that were written; the state is as it was.
        StateMismatchError: It does not fit; the state is as it was.
        RankFailedError: A rank failed.
        RankTimeoutError: A rank did not come.
        StorageError: As the only rank, it could not be read.

    Ranks: all (collective); blocks until every rank has loaded.
    """
    storage = open_storage(path, storage_options=storage_options)
    request = RestoreRequest(skip=skip, only=only, rng=rng)
    loaded = restore(state, request, storage=storage, ranks=Ranks(timeout_s=timeout_s))
    if loaded is None:
        raise AssertionError("a load without healing either loads or raises")
    return describe(storage, loaded.manifest, folder=loaded.path)

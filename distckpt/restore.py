"""One load: from a checkpoint into the user's objects, in place, all of it or nothing.

Everything is read to host memory and checked there first, and all ranks agree that they have it, before the first byte
of the state is changed. Which checkpoint is loaded is one decision, made by rank 0, the same on every rank.
Invariant: what is loaded is what was saved; nothing is cast, and nothing that a digest does not vouch for is used.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distckpt import catalog, names
from distckpt.checksum import digest
from distckpt.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    DistckptError,
    StateMismatchError,
    UsageError,
)
from distckpt.garbage import kept_off
from distckpt.manifest import MAX_BYTES, Manifest, parse
from distckpt.matching import Match, Part, Reference, Selection, match
from distckpt.ranks import Ranks
from distckpt.shards import read_boxes
from distckpt.state import PerRank, kind_of, plain_names, unwrap
from distckpt.storage import Storage
from distckpt.tensors import DTYPES, Box, local, local_box
from distckpt.values import Json

logger = logging.getLogger("distckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreRequest:
    """What a restore is told.

    Attributes:
        step: The checkpoint of this step; None is the newest good one.
        skip: Patterns of entries to leave as they are in the state.
        only: Patterns of the entries to load; empty is all.
        rng: Whether to set the random-number generators, too.
        heal: Whether to put damaged checkpoints aside, as their owner may, and go on with the next older one.
    """

    step: int | None = None
    skip: Sequence[str] = ()
    only: Sequence[str] = ()
    rng: bool = True
    heal: bool = False

    @property
    def selection(self) -> Selection:
        """Which entries to load."""
        for name, patterns in (("skip", self.skip), ("only", self.only)):
            if isinstance(patterns, str):
                raise UsageError(problem=f"{name} is a string", fix=f"{name}=[{patterns!r}]")
        return Selection(skip=tuple(self.skip), only=tuple(self.only))


@kept_off()
def restore(
    state: Mapping[str, Any], request: RestoreRequest, *, storage: Storage, ranks: Ranks
) -> tuple[str, Manifest] | None:
    """Load a checkpoint into `state`, on every rank the same.

    Args:
        state: As it was saved; objects are changed in place, plain values replaced in their dict.
        request: Which checkpoint, and which of its entries.
        storage: A run's directory, or one checkpoint's folder.
        ranks: All ranks.

    Returns:
        The folder and manifest of what was loaded; None if the directory holds no checkpoint, and never had one.

    Raises:
        StateMismatchError: The checkpoint does not fit; the state is as it was.
        CheckpointDamagedError: All there are, or the one that was asked for, are damaged; the state is as it was.
        CheckpointNotFoundError: The one that was asked for is not there.
        RankFailedError: A rank failed; unless it did so while loading the objects, the state is as it was.
        RankTimeoutError: A rank did not come.
        StorageError: As the only rank, the storage could not be read.

    Ranks: all (collective); blocks until every rank has loaded.
    """
    left_out: set[str] = set()
    again: set[str] = set()
    while True:
        chosen = ranks.agree(
            "restore: choosing a checkpoint",
            lambda: None,
            lambda _: _choose(storage, request, left_out),
        )
        if chosen is None:
            return None
        folder = chosen["folder"]
        found = _load(state, request, chosen, storage=storage, ranks=ranks)
        if isinstance(found, Manifest):
            return folder, found
        if found["vanished"]:
            continue
        if not found["confirmed"] and folder not in again:
            again.add(folder)  # a second reading found nothing wrong: try once more
            continue
        if not request.heal:
            raise _damaged(storage, folder, found)
        left_out.add(folder)


def _choose(storage: Storage, request: RestoreRequest, left_out: set[str]) -> Json:
    """Rank 0: return the folder of the checkpoint to load and its manifest's digest, or None on a fresh directory."""
    if request.step is not None or not request.heal:
        return _locate(storage, request.step)
    folders = catalog.scan(storage)
    for candidate in reversed(folders):
        if not candidate.committed or candidate.name in left_out:
            continue
        try:
            data = _manifest_bytes(storage, candidate.name)
            _check_sizes(candidate, parse(data, path=names.join(storage.url, candidate.name)), storage.url)
        except CheckpointNotFoundError:
            continue  # it was deleted just now
        except CheckpointDamagedError as error:
            left_out.add(candidate.name)
            _put_aside(storage, candidate.name, str(error))
            continue
        return {"folder": candidate.name, "digest": digest(data)}
    if left_out or any(folder.damaged for folder in folders):
        raise CheckpointDamagedError(
            path=storage.url,
            problem=f"has no good checkpoint left: {catalog.absence(catalog.scan(storage))}",
            fix=f"look at them with: distckpt ls {storage.url}  (or start afresh in another directory)",
        )
    if folders:
        logger.warning("%s: %s; starting from step 0", storage.url, catalog.absence(folders))
    return None


def _locate(storage: Storage, step: int | None) -> Json:
    """Return what `_choose` does, where nothing is put aside; its owner may delete it meanwhile."""
    for tries_left in reversed(range(catalog.LOCATE_TRIES)):
        folder, _ = catalog.locate(storage, step=step)
        try:
            return {"folder": folder, "digest": digest(_manifest_bytes(storage, folder))}
        except CheckpointNotFoundError:
            if step is not None or tries_left == 0:
                raise
    raise AssertionError("unreachable")


def _check_sizes(folder: catalog.Folder, manifest: Manifest, url: str) -> None:
    """Refuse a checkpoint of which the listing alone shows that it is not whole."""
    sizes = {file.name: file.num_bytes for file in folder.files}
    for problem in catalog.wrong_sizes(sizes, manifest, folder=folder.name):
        raise CheckpointDamagedError(
            path=names.join(url, folder.name), step=manifest.step, file=problem.file, problem=problem.problem
        )


def _manifest_bytes(storage: Storage, folder: str) -> bytes:
    try:
        return storage.read_all(names.join(folder, names.MANIFEST), limit_bytes=MAX_BYTES)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            path=names.join(storage.url, folder), reason=f"it has no {names.MANIFEST}"
        ) from error


def _put_aside(storage: Storage, folder: str, reason: str) -> None:
    """Put a damaged checkpoint aside, loudly."""
    first_line = reason.partition("\n")[0]
    try:
        catalog.quarantine(storage, folder, reason=first_line)
        done = "it is put aside"
    except DistckptError as error:
        done = f"it could not be put aside ({error})"
    logger.warning("damaged checkpoint: %s; %s, and the next older one is taken", first_line, done)


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
    state: Mapping[str, Any], request: RestoreRequest, chosen: Json, *, storage: Storage, ranks: Ranks
) -> Manifest | Json:
    """Load the chosen checkpoint; return its manifest, or what rank 0 found out about its damage."""
    folder = chosen["folder"]
    path = names.join(storage.url, folder)
    staged: dict[str, torch.Tensor] = {}
    prepared: list[tuple[Manifest, Match]] = []

    def read() -> Json:
        staged.clear()
        try:
            data = _manifest_bytes(storage, folder)
            if digest(data) != chosen["digest"]:
                raise CheckpointDamagedError(path=path, file=names.MANIFEST, problem="is not the one that rank 0 read")
            manifest = parse(data, path=path)
            matched = match(state, manifest, rank=ranks.rank, selection=request.selection, rng=request.rng)
            if matched.problems:
                raise StateMismatchError(path=path, step=manifest.step, problems=matched.problems, fix=_advice(matched))
            prepared.append((manifest, matched))
            # Somebody checks every byte, also those that no rank asks for: a checkpoint is whole, or it is not loaded.
            num_files = 0 if request.skip or request.only else len(manifest.files)
            check = range(ranks.rank, num_files, ranks.world_size)
            staged.update(read_tensors(storage, folder, manifest, matched, check=check))
        except (CheckpointDamagedError, CheckpointNotFoundError) as error:
            return {"file": getattr(error, "file", None), "problem": getattr(error, "problem", str(error))}
        return None

    def judge(facts: list[Json]) -> Json:
        bad = [(rank, fact) for rank, fact in enumerate(facts) if fact is not None]
        return _examine(storage, request, folder, *bad[0]) if bad else None

    found = ranks.agree(f"restore: reading {folder or names.MANIFEST}", read, judge)
    if found is not None:
        return found
    manifest, matched = prepared[-1]
    ranks.agree(f"restore: loading {folder or names.MANIFEST}", lambda: apply(matched, staged), lambda _: None)
    for keys, does in ((matched.kept, "keeps its own"), (matched.borrowed, "takes rank 0's")):
        if keys:
            logger.warning(
                "%s was saved by %d ranks; rank %d %s %s", path, manifest.world_size, ranks.rank, does, ", ".join(keys)
            )
    return manifest


def _advice(matched: Match) -> str:
    """Return what to do about a mismatch: the way out for its first problem."""
    first = matched.problems[0]
    key = first.removeprefix("missing in the checkpoint: ").removeprefix("not in the state: ").split(" ")[0]
    return f"build the state as it was when it was saved, or leave the entry out: skip=[{key.rstrip(':')!r}]"


def _examine(storage: Storage, request: RestoreRequest, folder: str, rank: int, fact: Json) -> Json:
    """Rank 0: look at a checkpoint that a rank could not read; put it aside if it is damaged, and may be."""
    found = {**fact, "vanished": False, "confirmed": True}
    try:
        manifest = catalog.read_manifest(storage, folder)
        problem = next(catalog.verify(storage, manifest, folder=folder), None)
    except CheckpointNotFoundError:
        return {**found, "vanished": True}
    except CheckpointDamagedError as error:
        problem = catalog.Problem(file=names.MANIFEST, problem=error.problem)
    if problem is None:
        return {**found, "confirmed": False}
    if request.heal:
        _put_aside(storage, folder, f"{names.join(storage.url, folder)}: {problem.file!r} {problem.problem}")
    return {**found, "file": problem.file, "problem": problem.problem}


def read_tensors(
    storage: Storage, folder: str, manifest: Manifest, matched: Match, *, check: Collection[int] = ()
) -> dict[str, torch.Tensor]:
    """Return this rank's part of every tensor that is wanted, on the CPU.

    Args:
        storage: The storage.
        folder: The checkpoint's folder in it.
        manifest: The checkpoint's manifest.
        matched: What is wanted.
        check: Indices of data files of which every byte is to be checked.

    Raises:
        CheckpointDamagedError: Bytes are missing or wrong.
        StorageError: A file could not be read.

    Ranks: any.
    """
    boxes: dict[str, Box] = {}
    empty: dict[str, torch.Tensor] = {}
    for name in matched.wanted():
        entry = manifest.tensors[name]
        like = matched.likes.get(name)
        box = local_box(like) if like is not None else Box(start=(0,) * len(entry.shape), shape=entry.shape)
        if box is not None:
            boxes[name] = box
        else:  # this rank holds nothing of it
            empty[name] = torch.empty(cast(DTensor, like).to_local().shape, dtype=DTYPES[entry.dtype])
    tensors = read_boxes(storage, folder, manifest, list(boxes.items()), check=check)
    return {**dict(zip(boxes, tensors, strict=True)), **empty}


def apply(matched: Match, staged: Mapping[str, torch.Tensor]) -> None:
    """Change the state; every byte is known to be good by now.

    Ranks: any.
    """
    for part in matched.parts:

        def tensor(reference: Reference) -> Any:
            value = staged[reference.name]
            like = matched.likes.get(reference.name)
            if reference.array:
                return value.numpy()
            if isinstance(like, DTensor):
                return _like(value, like)
            return value

        content = _filled(part.content, tensor)
        match kind_of(part.slot.value):
            case "module":
                _apply_module(part, content)
            case "optimizer":
                _apply_optimizer(part.slot.value, content)
            case "stateful":
                part.slot.value.load_state_dict(content)
            case _:
                _apply_value(part, content)


def _filled(content: Any, tensor: Any) -> Any:
    """Return `content` with a tensor for each reference."""
    if isinstance(content, Reference):
        return tensor(content)
    if isinstance(content, dict):
        made = {name: _filled(item, tensor) for name, item in content.items()}
        return made if type(content) is dict else type(content)(made)
    if isinstance(content, list):
        return [_filled(item, tensor) for item in content]
    if isinstance(content, tuple):
        return tuple(_filled(item, tensor) for item in content)
    return content


def _like(value: torch.Tensor, like: DTensor) -> DTensor:
    """Return `value`, this rank's part, as a DTensor that lies as `like` does."""
    return DTensor.from_local(
        value.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _apply_module(part: Part, content: dict[str, Any]) -> None:
    module = unwrap(cast(nn.Module, part.slot.value))
    plain = plain_names(module)
    here = module.state_dict()
    chosen = OrderedDict((name, content[plain(name)]) for name in here if plain(name) in content)
    metadata = getattr(here, "_metadata", None)
    if metadata is not None:
        chosen._metadata = metadata  # type: ignore[attr-defined]  # versions of modules, for their own load hooks
    module.load_state_dict(chosen, strict=part.whole)


def _apply_optimizer(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Load an optimizer; its own method casts some states to the parameter's dtype, which is undone."""
    optimizer.load_state_dict(content)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [index for group in content["param_groups"] for index in group["params"]]
    for index, parameter in zip(order, parameters, strict=True):
        for name, saved in content["state"].get(index, {}).items():
            loaded = optimizer.state[parameter].get(name)
            if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor) and loaded.dtype != saved.dtype:
                optimizer.state[parameter][name] = saved.to(loaded.device)


def _apply_value(part: Part, content: Any) -> None:
    slot = part.slot
    if not part.whole:
        for name, item in content.items():
            slot.value[name] = _merged(slot.value.get(name), item)
        return
    merged = _merged(slot.value, content)
    if merged is slot.value:
        return
    if isinstance(slot.parent, tuple):
        raise UsageError(problem=f"{slot.key} stands in a tuple and cannot be replaced", fix="use a list")
    holder = slot.parent[slot.place]
    if isinstance(holder, PerRank):
        holder.value = merged
    else:
        slot.parent[slot.place] = merged


def _merged(old: Any, new: Any) -> Any:
    """Return `new`, in the memory and containers of `old` where they fit."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.shape == new.shape:
        with torch.no_grad():
            local(old).copy_(local(new))
        return old
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray) and (old.shape, old.dtype) == (new.shape, new.dtype):
        np.copyto(old, new)
        return old
    if type(old) is dict and type(new) is dict:
        made = {name: _merged(old.get(name), item) for name, item in new.items()}
        old.clear()
        old.update(made)
        return old
    if type(old) is list and type(new) is list:
        old[:] = [_merged(old[index] if index < len(old) else None, item) for index, item in enumerate(new)]
        return old
    return new

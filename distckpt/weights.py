"""Weights for inference: the parameters and buffers of a model, from whatever file or checkpoint holds them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from distckpt import catalog, names
from distckpt.applying import apply
from distckpt.dcp_folders import is_dcp, read_dcp
from distckpt.devicecopy import hold_up
from distckpt.errors import CheckpointDamagedError, StateMismatchError
from distckpt.foreign import find_weights, is_foreign_file, read_file
from distckpt.loading import read_tensors
from distckpt.manifest import Manifest
from distckpt.matching import Selection, match
from distckpt.modules import module_state, plain_names, unwrap
from distckpt.storage import Storage, open_storage
from distckpt.values import references

logger = logging.getLogger("distckpt")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def load_weights(
    path: str | os.PathLike[str],
    model: ModuleT,
    *,
    key: str | None = None,
    step: int | None = None,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> ModuleT:
    """Load a model's weights, in place, and return the model.

        model = load_weights("runs/digits", resnet18(num_classes=10)).eval()

    Args:
        path: A distckpt checkpoint, a run's directory (its newest whole checkpoint is taken), a `.safetensors` file, a
            `.pt`, `.pth`, `.tar`, `.bin` or `.ckpt` file of torch.save, or a local directory of DCP; a path or URL.
        model: The model, with or without DDP or torch.compile around it.
        key: Where the weights stand in the checkpoint or file; by default "model", the only module, or what fits.
        step: In a run's directory, the checkpoint of this step.
        skip: Shell patterns of the model's names to leave as they are: ["head.*"].
        only: Shell patterns of the model's only names to load.
        storage_options: For the URL's file system, as fsspec takes them.

    Raises:
        StateMismatchError: Names, shapes or dtypes differ; nothing was loaded.
        CheckpointNotFoundError: There is nothing at `path`.
        CheckpointDamagedError: Its bytes are not the ones that were written.
        UnsafeFileError: A pickle holds more than tensors and plain values; nothing of it was run.
        StorageError: It could not be read.

    Ranks: any; each rank reads by itself.
    """
    text = os.fspath(path)
    hold_up()  # the model may be being copied for a save
    if is_foreign_file(text) or is_dcp(text):
        content = read_file(text, storage_options=storage_options) if is_foreign_file(text) else read_dcp(text)
        _load_foreign(text, content, model, key=key, selection=Selection(skip=tuple(skip), only=tuple(only)))
        return model
    storage = open_storage(path, storage_options=storage_options)
    _load_newest(storage, model, key=key, step=step, skip=skip, only=only)
    return model


def _load_newest(
    storage: Storage, model: nn.Module, *, key: str | None, step: int | None, skip: Sequence[str], only: Sequence[str]
) -> None:
    """Load from the newest whole checkpoint; one that is damaged is passed over with a warning."""
    while True:
        folder, manifest = catalog.locate(storage, step=step)
        try:
            _load_checkpoint(storage, folder, manifest, model, key=key, skip=skip, only=only)
        except CheckpointDamagedError as error:
            older = catalog.find_newest(storage, before=manifest.step) if folder and step is None else None
            if older is None:
                raise
            logger.warning("%s; step %d is taken instead", str(error).partition("\n")[0], older.step)
            step = older.step
        else:
            return


def _load_checkpoint(
    storage: Storage,
    folder: str,
    manifest: Manifest,
    model: nn.Module,
    *,
    key: str | None,
    skip: Sequence[str],
    only: Sequence[str],
) -> None:
    path = names.join(storage.url, folder)
    key = _find_key(manifest, key, path)
    chosen = Selection(
        skip=tuple(f"{key}.{pattern}" for pattern in skip),
        only=tuple(f"{key}.{pattern}" for pattern in only) or (key,),
    )
    nested: Any = model
    for part in reversed(key.split(".")):
        nested = {part: nested}
    matched = match(nested, manifest, rank=0, selection=chosen, rng=False)
    if matched.problems:
        raise StateMismatchError(
            path=path,
            step=manifest.step,
            problems=matched.problems,
            fix='build the model as it was, or leave names out: load_weights(path, model, skip=["head.*"])',
        )
    apply(matched, read_tensors(storage, folder, manifest, matched))


def _find_key(manifest: Manifest, key: str | None, path: str) -> str:
    """Return the state's key under which the weights stand."""
    modules = [name for name, entry in manifest.objects.items() if entry.kind == "module"]
    holders = [name for name, entry in manifest.objects.items() if next(references(entry.trees[0]), None) is not None]
    known = modules or [name for name in holders if name != names.RNG]
    if key is not None and key in manifest.objects:
        return key
    if key is None and "model" in manifest.objects:
        return "model"
    if key is None and len(known) == 1:
        return known[0]
    problem = f"it has no key {key!r}" if key is not None else "it has several models, or none"
    raise StateMismatchError(
        path=path,
        step=manifest.step,
        problems=[f"{problem}; its keys are {sorted(manifest.objects)}"],
        fix=f"load_weights(path, model, key={(known or ['model'])[0]!r})",
    )


def _load_foreign(
    path: str, content: Mapping[str, Any], model: nn.Module, *, key: str | None, selection: Selection
) -> None:
    expected = module_state(model).content
    found = find_weights(content, set(expected), key=key, path=path)
    selection.check([*expected, *found])
    problems = []
    for name, target in expected.items():
        if not selection.takes(name):
            continue
        stored = found.get(name)
        if stored is None:
            problems.append(f"missing in the file: {name}")
        elif stored.layout != torch.strided or stored.is_quantized or stored.is_meta:
            problems.append(f"{name}: the file holds no plain dense tensor, but one with layout {stored.layout}")
        elif isinstance(target, torch.Tensor) and (stored.shape, stored.dtype) != (target.shape, target.dtype):
            problems.append(
                f"{name}: the file holds {tuple(stored.shape)} {stored.dtype}, "
                f"the model expects {tuple(target.shape)} {target.dtype}"
            )
    problems += [f"not in the model: {n}" for n in found if n not in expected and selection.takes(n)]
    if problems:
        raise StateMismatchError(
            path=path,
            step=0,
            problems=problems,
            fix='build the model as it was, or leave names out: load_weights(path, model, skip=["head.*"])',
        )
    inner = unwrap(model)
    plain = plain_names(inner)
    chosen = {name: found[plain(name)] for name in inner.state_dict() if selection.takes(plain(name))}
    inner.load_state_dict(chosen, strict=not (selection.skip or selection.only))

"""Branches: runs that went on from an older checkpoint of another run, beside what came after it there.

A branch has a directory of its own below that run's, `branches/<name>/`, with everything that a run's directory has.
A small file there says from which checkpoint it went off, and its name says the step; so the run's retention sees by
its listing alone what it must keep, for as long as that file is there.
Invariant: nothing of the run that a branch goes off from is changed by it, and a branch's origin never changes.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distckpt import catalog, names
from distckpt.catalog import Checkpoint
from distckpt.errors import CheckpointDamagedError, CheckpointNotFoundError, ConfigError
from distckpt.manifest import Manifest
from distckpt.storage import Storage, open_storage

MAX_BYTES = 1 << 16
MOST_CHARS = 100

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PLACE = re.compile(rf"(?P<run>.+[^/])/{names.BRANCHES}/[A-Za-z0-9][A-Za-z0-9._-]*/*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The checkpoint that a branch went off from.

    Attributes:
        storage: The directory of its run.
        step: Its step.
        attempt: The name of the save that made it.
    """

    storage: Storage
    step: int
    attempt: str

    @property
    def folder(self) -> str:
        """Its folder in the storage."""
        return names.step_name(self.step)

    @property
    def path(self) -> str:
        """Its folder, as a path or URL."""
        return names.join(self.storage.url, self.folder)

    def read_manifest(self) -> Manifest:
        """Return its manifest.

        Raises:
            CheckpointNotFoundError: It is gone, or another one has taken its place.
            CheckpointDamagedError: Its manifest is not whole.
            StorageError: It could not be read.
        """
        fix = "give the branch another beginning: at=STEP, and a new name"
        try:
            manifest = catalog.read_manifest(self.storage, self.folder)
        except CheckpointNotFoundError as error:
            reason = "a branch went off from it, and it is gone"
            raise CheckpointNotFoundError(path=self.path, reason=reason, fix=fix) from error
        if manifest.attempt != self.attempt:
            reason = f"the branch went off from attempt {self.attempt}; there is {manifest.attempt}"
            raise CheckpointNotFoundError(path=self.path, reason=reason, fix=fix)
        return manifest


class Home:
    """The directory that a job goes on in: a run's own, or that of a branch of it. Asks the storage nothing when made.

    Args:
        directory: The run's directory, a path or URL; also that of a branch.
        at: The step of the checkpoint that a new branch begins with.
        branch: The branch's name; None is the run itself.
        storage_options: For the URL's file system, as fsspec takes them.

    Attributes:
        storage: Where it saves.
        run: The directory that this one may be a branch of; None if it lies in no place for branches.

    Raises:
        ConfigError: A setting is out of range, or the URL is malformed.
        DependencyError: A package that the URL needs is not installed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        at: int | None = None,
        branch: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        _check(at, branch)
        self._at = at
        self._name = branch
        self.storage: Storage = open_storage(directory, storage_options=storage_options)
        self.run: Storage | None = None
        if branch is not None:
            self.run = self.storage
            own = names.join(self.run.url, names.branch_folder(branch))
            self.storage = open_storage(own, storage_options=storage_options)
        elif (place := _PLACE.fullmatch(self.storage.url)) is not None:
            self.run = open_storage(place["run"], storage_options=storage_options)

    def origin(self) -> Origin | None:
        """Return what this branch went off from, or would; None of a run.

        Raises:
            ConfigError: There is no such branch yet, and no `at`; or it went off from another step.
            CheckpointNotFoundError: There is no checkpoint to go off from; names those that are there.
            CheckpointDamagedError: The file that says so is damaged, or the checkpoint's manifest is.
            StorageError: The storage could not be read.
        """
        if self.run is None:
            return None
        found = find(self.storage, self.run)
        if found is not None:
            if self._at not in (None, found.step):
                problem = f"branch {self._name!r} of {self.run.url!r} went off from step {found.step}, not {self._at}"
                fix = "leave at=... out, or give a new branch a name of its own"
                raise ConfigError(source="at", problem=problem, fix=fix)
            return found
        if self._at is not None:
            manifest = catalog.manifest_of(self.run, self._at)
            return Origin(storage=self.run, step=manifest.step, attempt=manifest.attempt)
        if self._name is None:
            return None  # a directory that only looks like that of a branch
        raise ConfigError(
            source="branch",
            problem=f"{self.run.url!r} has no branch {self._name!r}; it has {_listed(branch_names(self.run))}",
            fix=f'say where it begins: at=STEP, branch="{self._name}"; committed are {_steps_text(self.run)}',
        )

    def begin(self) -> Origin | None:
        """Return what this branch went off from, and make the branch if it is new; whoever calls owns its directory.

        Raises:
            As `origin` does; StorageError also if the branch could not be made.
        """
        found = self.origin()
        if found is not None and self._at is not None:
            name = names.origin_name(found.step)
            facts = {"format": 1, "step": found.step, "attempt": found.attempt, "created": time.time()}
            if not any(file.name == name for file in self.storage.list()):
                self.storage.publish(name, json.dumps(facts, sort_keys=True).encode())
                try:
                    found.read_manifest()  # a job that was just deleting it may have won
                except CheckpointNotFoundError:
                    self.storage.delete([name])
                    raise
        return found

    @property
    def is_named(self) -> bool:
        """Whether a branch was asked for by its name."""
        return self._name is not None

    def newest(self) -> Checkpoint | None:
        """Return the newest committed checkpoint whose manifest is whole, else what the branch went off from, or None.

        Raises:
            As `origin` does.
        """
        for folder in reversed(catalog.scan(self.storage)):
            found = catalog.committed(self.storage, [folder])
            if found:
                return found[0]
        origin = self.origin()
        if origin is None:
            return None
        return catalog.describe(origin.storage, origin.read_manifest(), folder=origin.folder)


def find(storage: Storage, run: Storage) -> Origin | None:
    """Return what the branch in a directory went off from; None if it says nothing of that.

    Args:
        storage: The branch's directory.
        run: The directory of the run that it went off from.

    Raises:
        CheckpointDamagedError: It says two things, or none that makes sense.
        StorageError: It could not be read.
    """
    marks = [file.name for file in storage.list() if names.parse_origin(file.name) is not None]
    if not marks:
        return None
    try:
        facts = json.loads(storage.read_all(marks[0], limit_bytes=MAX_BYTES))
        attempt = names.checked(facts["attempt"])
        if len(marks) > 1 or facts["format"] != 1 or facts["step"] != names.parse_origin(marks[0]):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FileNotFoundError) as error:
        raise CheckpointDamagedError(
            path=storage.url, file=marks[0], problem="does not say from which checkpoint the branch went off"
        ) from error
    return Origin(storage=run, step=facts["step"], attempt=attempt)


def branch_names(storage: Storage) -> list[str]:
    """Return the names of a run's branches.

    Raises:
        StorageError: The directory could not be listed.
    """
    parts = [file.name.split("/") for file in storage.list(names.BRANCHES)]
    return sorted({part[1] for part in parts if len(part) == 3 and names.parse_origin(part[2]) is not None})


def _check(at: int | None, branch: str | None) -> None:
    if at is not None and (type(at) is not int or at < 0):
        raise ConfigError(source="at", problem=f"must be a step, from 0 on, is {at!r}")
    if at is not None and branch is None:
        raise ConfigError(
            source="at",
            problem=f"what came after step {at} stays; what goes on from it needs a name of its own",
            fix=f'at={at}, branch="NAME"',
        )
    if branch is None:
        return
    is_name = isinstance(branch, str) and len(branch) <= MOST_CHARS and _NAME.fullmatch(branch)
    if not is_name or names.parse_step(branch) is not None:
        problem = (
            f"must be letters, digits, '.', '_' and '-', at most {MOST_CHARS}, and no step-..., is {branch!r:.120}"
        )
        raise ConfigError(source="branch", problem=problem)


def _steps_text(run: Storage) -> str:
    return _listed([f"{folder.step}" for folder in catalog.scan(run) if folder.committed])


def _listed(words: list[str]) -> str:
    return ", ".join(words) or "none"

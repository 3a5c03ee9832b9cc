"""Faults of the protocol, planted into the library's own code one at a time: the crash tests have to find each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import disk
import pytest

from distckpt import CheckpointManager, background, catalog, choice, commit, datafiles, manager, names, saver
from distckpt.errors import CheckpointDamagedError, CheckpointNotFoundError
from distckpt.lease import Lease
from distckpt.leasefiles import Seen
from distckpt.manifest import Manifest
from distckpt.restore import RestoreRequest, _Trial
from distckpt.retention import Retention
from distckpt.saver import Saver
from distckpt.shards import RankShare, write_share
from distckpt.storage import Storage, local
from distckpt.storage.local import LocalStorage
from distckpt.storage.objects import ObjectStorage
from distckpt.storage.s3 import S3Client
from distckpt.tenure import Tenure

Patch = pytest.MonkeyPatch
Place = tuple[str, str] | tuple[str, str, str]
PLANTED: dict[str, tuple[Callable[[Patch], None], Collection[Place]]] = {}


def planted(*places: Place) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Register a fault, with the scenarios and models in which it has to be found.

    Of two writers, also an order in which it was found, for others are many: it is tried first, then all.
    """

    def register(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        PLANTED[plant.__name__] = plant, places
        return plant

    return register


@planted(("first-save", "disk-power"), ("retention", "disk-power"))
def no_fsync_of_files(patch: Patch) -> None:
    real = disk.Disk.fsync

    def fsync(self: disk.Disk, number: int) -> None:
        if self._handles[number].inode in self.contents.folders:
            real(self, number)

    patch.setattr(disk.Disk, "fsync", fsync)


@planted(("later-save", "disk-power"), ("clean-up", "disk-power"))
def no_fsync_of_folders(patch: Patch) -> None:
    patch.setattr(local, "_sync_folder", lambda _folder_fd: None)


@planted(("later-save", "disk-power"))
def no_fsync_of_folders_above(patch: Patch) -> None:
    def sync(self: LocalStorage, wanted: Iterable[str]) -> None:
        for name in wanted:
            with self._folder(name.rpartition("/")[0]) as folder_fd:
                local._sync_folder(folder_fd)

    patch.setattr(LocalStorage, "sync", sync)


@planted(("first-save", "disk-power"))
def no_fsync_above_the_root(patch: Patch) -> None:
    patch.setattr(LocalStorage, "_sync_above_root", lambda _self: None)


@planted(("later-save", "disk-power"))
def no_fsync_of_a_share_before_it_is_reported(patch: Patch) -> None:
    def write(storage: Storage, *args: Any, **options: Any) -> RankShare:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(storage, "sync", lambda _names: None)
            return write_share(storage, *args, **options)

    patch.setattr(commit, "write_share", write)


@planted(("first-save", "disk-kill"), ("later-save", "bucket-kill"))
def manifest_before_the_other_ranks_have_written(patch: Patch) -> None:
    waiting: list[Callable[[], RankShare]] = []
    real = commit.commit

    def write(storage: Storage, *args: Any, rank: int, **options: Any) -> RankShare:
        if rank == 0:
            return write_share(storage, *args, rank=rank, **options)
        waiting.append(lambda: write_share(storage, *args, rank=rank, **options))
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(storage, "put", lambda _name, chunks, **_: list(chunks) and None)
            inner.setattr(storage, "sync", lambda _names: None)
            return write_share(storage, *args, rank=rank, **options)

    def commit_first(save: Any, *, ranks: Any, **options: Any) -> Any:
        done = real(save, ranks=ranks, **options)
        while ranks.rank and waiting:
            waiting.pop()()
        return done

    patch.setattr(commit, "write_share", write)
    patch.setattr(saver, "commit", commit_first)


@planted(("later-save", "disk-kill"), ("later-save", "bucket-kill"))
def acknowledged_before_it_is_committed(patch: Patch) -> None:
    waiting: dict[int, list[Any]] = {}
    real_write, real_wait = Saver._write, CheckpointManager.wait

    def write(self: Saver, *args: Any) -> None:
        self._pruner.release()
        waiting.setdefault(id(self), []).append(args)

    def wait(self: CheckpointManager) -> None:
        real_wait(self)
        for args in waiting.pop(id(self._saver), []):
            real_write(self._saver, *args)

    patch.setattr(Saver, "_write", write)
    patch.setattr(CheckpointManager, "wait", wait)


@planted(("retention", "disk-kill"), ("later-save", "bucket-kill"))
def old_ones_deleted_before_the_new_one_is_committed(patch: Patch) -> None:
    real = Saver._write

    def write(self: Saver, prepared: Any, ranks: Any, *args: Any) -> None:
        if ranks.rank == 0:
            for folder in catalog.scan(self.storage):
                catalog.remove(self.storage, folder)
        real(self, prepared, ranks, *args)

    patch.setattr(Saver, "_write", write)


@planted(("retention", "disk-kill"), ("retention", "bucket-kill"))
def retention_forgets_the_newest(patch: Patch) -> None:
    real = background.decide  # type: ignore[attr-defined]

    def decide(*args: Any, **options: Any) -> Any:
        return [*real(*args, **options)[:-1], replace(real(*args, **options)[-1], reasons=())]

    patch.setattr(background, "decide", decide)


@planted(("retention", "disk-kill"), ("retention", "bucket-kill"))
def data_deleted_before_the_manifest(patch: Patch) -> None:
    def remove(storage: Storage, folder: catalog.Folder) -> None:
        storage.delete(sorted((file.name for file in folder.files), key=lambda name: name.endswith(names.MANIFEST)))

    patch.setattr(catalog, "remove", remove)


@planted(("clean-up", "disk-kill"), ("clean-up", "bucket-kill"))
def digests_not_checked(patch: Patch) -> None:
    patch.setattr(datafiles.Reader, "_compare", lambda *_: None)


@planted(("clean-up", "disk-kill"), ("clean-up", "bucket-kill"))
def newest_taken_though_it_is_not_whole(patch: Patch) -> None:
    patch.setattr(manager, "RestoreRequest", lambda **facts: RestoreRequest(**{**facts, "heal": False}))


@planted(("reader", "disk-kill"), ("reader", "bucket-kill"))
def each_rank_picks_by_itself(patch: Patch) -> None:
    def agree(self: Any) -> Any:
        chosen = choice.choose(self._storage, self._request, self._left_out, self._known, self._origin)
        return {"chosen": chosen, "prepared": None}

    patch.setattr(_Trial, "agree", agree)


@planted(("first-save", "disk-kill"), ("first-save", "disk-power"))
def manifest_written_in_place(patch: Patch) -> None:
    def publish(self: LocalStorage, name: str, data: bytes) -> None:
        self.put(name, [data])
        self.sync([name])

    patch.setattr(LocalStorage, "publish", publish)


@planted(("first-save", "bucket-late"), ("later-save", "bucket-late"))
def publish_replaces(patch: Patch) -> None:
    def publish(self: ObjectStorage, name: str, data: bytes) -> None:
        self._client._filesystem().pipe_file(self._path(name), data, chunksize=len(data) + 1)

    patch.setattr(ObjectStorage, "publish", publish)


@planted(("first-save", "s3-late"), ("later-save", "s3-late"))
def publish_replaces_on_s3(patch: Patch) -> None:
    patch.setattr(S3Client, "create", S3Client._put)


@planted(("clean-up", "s3-late"))
def put_aside_by_a_deletion_of_whatever_is_there(patch: Patch) -> None:
    patch.setattr(S3Client, "withdraw", lambda self, path, _data: self.remove([path]))


@planted(("first-save", "s3-late"), ("later-save", "bucket-late"), ("clean-up", "disk-kill"))
def names_of_attempts_are_used_again(patch: Patch) -> None:
    patch.setattr(names, "new_attempt", lambda: "attempt")


@planted(("both-save", "disk", "stands, 3 4 140, 312"), ("both-start", "s3", "stands, 25 43 3 -1, 122"))
def lease_not_checked_before_the_manifest(patch: Patch) -> None:
    def commit_unasked(save: Any, *, ranks: Any, storage: Storage, **_: Any) -> Any:
        return commit.commit(save, ranks=ranks, storage=storage)

    patch.setattr(saver, "commit", commit_unasked)


@planted(("both-save", "disk", "stands, 138, 650"))
def lease_not_checked_after_the_manifest(patch: Patch) -> None:
    patch.setattr(Tenure, "confirm", lambda _self: None)


@planted(("both-start", "disk", "stands, 39 72, 0"))
def lease_not_checked_before_deletions(patch: Patch) -> None:
    real = background.Pruner.__init__

    def begin(self: background.Pruner, retention: Retention, **_: Any) -> None:
        real(self, retention)

    patch.setattr(background.Pruner, "__init__", begin)


@planted(("both-start", "disk", "stands, 92 126 130 -1, 301"))
def swept_although_its_owner_may_only_stand_still(patch: Patch) -> None:
    patch.setattr(Tenure, "is_after_silence", False)


@planted(("both-save", "disk", "stands, 3 4 140, 312"), ("both-start", "s3", "stands, 15 12 61 15, 31"))
def living_owner_taken_for_dead_at_once(patch: Patch) -> None:
    patch.setattr(Lease, "_patience_s", lambda *_: 0.0)


@planted(("both-save", "disk", "stands, 4 262 -1, 680"), ("both-save", "s3", "stands, 10 4 68, 77"))
def taken_over_without_a_new_number(patch: Patch) -> None:
    real = Lease._claim

    def claim(self: Lease, seen: Seen) -> bool:
        if seen.number == 0 or seen.record is None or seen.record.released:
            return real(self, seen)
        self._number, self._valid_until, self._is_owner = seen.number, self._machine.now() + self._duration_s, True
        return True

    patch.setattr(Lease, "_claim", claim)


@planted(("both-start", "disk"), ("both-start", "bucket", "stands, 2 4 4, 38"), ("both-start", "s3", "runs, 2 15, 11"))
def two_may_take_one_number(patch: Patch) -> None:
    real = Lease._claim

    def claim(self: Lease, seen: Seen) -> bool:
        real(self, seen)
        self._number, self._valid_until, self._is_owner = seen.number + 1, self._machine.now() + self._duration_s, True
        return True

    patch.setattr(Lease, "_claim", claim)


@planted(("both-clean-up", "disk", "stands, 211 -1, 0"), ("both-clean-up", "s3", "stands, 33 -1, 0"))
def put_aside_whatever_is_there(patch: Patch) -> None:
    real = catalog.quarantine

    def quarantine(storage: Storage, folder: str, *, data: bytes, reason: str) -> bool:
        with contextlib.suppress(CheckpointNotFoundError):
            real(storage, folder, data=catalog.manifest_data(storage, folder), reason=reason)
        return True

    patch.setattr(catalog, "quarantine", quarantine)


@planted(("both-clean-up", "disk", "stands, 188 -1, 0"), ("both-clean-up", "s3", "stands, 30 -1, 0"))
def judged_by_a_listing_that_is_older_than_the_manifest(patch: Patch) -> None:
    def check_sizes(_storage: Storage, folder: catalog.Folder, manifest: Manifest) -> None:
        for problem in choice._wrong_sizes(folder.files, manifest, folder.name):
            raise CheckpointDamagedError(path=folder.name, file=problem.file, problem=problem.problem)

    patch.setattr(choice, "_check_sizes", check_sizes)


@planted(("both-clean-up", "disk", "stands, 213 -1, 0"))
def put_aside_without_a_look_at_what_is_deleted(patch: Patch) -> None:
    patch.setattr(LocalStorage, "withdraw", lambda self, name, _data: self.delete([name]))


@planted(("both-read-first", "disk"), ("both-read-first", "bucket"))
def newer_checkpoints_of_another_job_are_not_noticed(patch: Patch) -> None:
    patch.setattr(Saver, "follow", lambda *_: None)


@planted(("clean-up", "disk-kill"), ("clean-up", "bucket-kill"))
def damaged_ones_are_not_put_aside(patch: Patch) -> None:
    patch.setattr(catalog, "quarantine", lambda *_, **__: True)

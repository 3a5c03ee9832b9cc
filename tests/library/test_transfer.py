"""A copy is whole or not there, whatever dies; and what was done is not done again."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from failing_storage import FailingStorage

from distckpt import catalog, verification
from distckpt.checksum import digest
from distckpt.errors import CheckpointDamagedError, CheckpointExistsError, CheckpointNotFoundError, StorageError
from distckpt.manifest import DataFile, Manifest, Segment, serialize
from distckpt.storage import CountingStorage, LocalStorage, Storage
from distckpt.transfer import Place, copy

FOLDER = "step-000000000007"


class DyingStorage(FailingStorage):
    """A storage on which from one change on every change fails, as for a process that is killed there."""

    def _change(self, what: str) -> None:
        super()._change(what)
        if self.fail_at is not None and len(self.changes) > self.fail_at:
            self.fail()


def made(storage: Storage, *, num_files: int = 3, created: float = 1.0) -> Manifest:
    """Make a checkpoint of files of 3,500 bytes, in segments of at most 1,000."""
    attempt = secrets.token_hex(8)
    files = []
    for rank in range(num_files):
        name = f"{attempt}/rank-{rank:05d}.safetensors"
        pieces = [os.urandom(size) for size in (1000, 1000, 1000, 500)]
        storage.put(f"{FOLDER}/{name}", pieces)
        segments = tuple(Segment(num_bytes=len(piece), digest=digest(piece)) for piece in pieces)
        files.append(DataFile(name=name, rank=rank, num_bytes=3500, segments=segments))
    manifest = Manifest(
        step=7,
        run="run",
        attempt=attempt,
        layout="sharded",
        world_size=num_files,
        created=created,
        writer={"host": "here", "pid": 1},
        files=tuple(files),
        tensors={},
        objects={},
        metrics={"val/loss": float("nan")},
    )
    storage.publish(f"{FOLDER}/manifest.json", serialize(manifest))
    return manifest


@pytest.fixture
def source(tmp_path: Path) -> Place:
    storage = LocalStorage(tmp_path / "source")
    made(storage)
    return Place(storage=storage, folder=FOLDER)


@pytest.fixture
def target(tmp_path: Path) -> Place:
    return Place(storage=LocalStorage(tmp_path / "target"), folder=FOLDER)


def through(place: Place, storage: Storage) -> Place:
    return Place(storage=storage, folder=place.folder)


def contents(place: Place) -> dict[str, bytes]:
    return {name: place.storage.read_all(place.inside(name), limit_bytes=1 << 20) for name in place.sizes()}


def is_whole(place: Place) -> bool:
    manifest = catalog.read_manifest(place.storage, place.folder)
    return not list(verification.verify(place.storage, manifest, folder=place.folder))


def test_a_copy_is_the_same_byte_for_byte(source: Place, target: Place) -> None:
    done = []
    copied = copy(source, target, advance=done.append)
    assert (copied.action, copied.num_bytes, copied.reused_bytes) == ("copied", 10_500, 0)
    assert contents(target) == contents(source)
    assert sum(done) == 10_500


def test_a_copy_that_is_there_is_not_made_again(source: Place, target: Place) -> None:
    copy(source, target)
    counting = CountingStorage(target.storage)
    again = copy(source, through(target, counting))
    assert (again.action, again.num_bytes) == ("present", 0)
    assert counting.counted("put").num_calls == counting.counted("publish").num_calls == 0


def test_another_checkpoint_of_the_step_is_never_replaced(source: Place, target: Place) -> None:
    made(target.storage, created=2.0)
    before = contents(target)
    with pytest.raises(CheckpointExistsError, match="not attempt"):
        copy(source, target)
    assert contents(target) == before


def test_wherever_a_copy_is_killed_no_half_of_it_is_visible_and_the_next_try_ends_it(
    source: Place, tmp_path: Path
) -> None:
    whole = FailingStorage(LocalStorage(tmp_path / "counted"))
    copy(source, Place(storage=whole, folder=FOLDER))
    assert len(whole.changes) > 20
    for fail_at in range(len(whole.changes)):
        target = Place(storage=LocalStorage(tmp_path / f"{fail_at}"), folder=FOLDER)
        failing = DyingStorage(target.storage, fail_at=fail_at)
        with suppress(OSError):
            copy(source, through(target, failing))
        assert len(failing.changes) > fail_at, "it was made to fail"
        with suppress(CheckpointNotFoundError):
            assert is_whole(target)
        copy(source, target)
        assert is_whole(target), failing.changes[fail_at]
        assert len(target.sizes()) == len(source.sizes()), "and nothing is left over"


def test_files_that_were_finished_are_not_copied_again(source: Place, tmp_path: Path) -> None:
    reused = Counter()
    for fail_at in range(25):
        target = Place(storage=LocalStorage(tmp_path / f"{fail_at}"), folder=FOLDER)
        with suppress(OSError):
            copy(source, through(target, DyingStorage(target.storage, fail_at=fail_at)))
        num_done = sum(name.endswith(".copied") for name in target.sizes())
        if (target.storage.root / FOLDER / "manifest.json").exists():
            continue
        counting = CountingStorage(target.storage)
        again = copy(source, through(target, counting))
        assert again.reused_bytes == 3500 * num_done
        assert counting.counted("put").num_bytes == 3500 * (3 - num_done)
        reused[num_done] += 1
    assert {0, 1, 2} <= reused.keys()


def test_what_has_no_marker_is_not_trusted_and_not_touched_before_the_copy_is_whole(
    source: Place, target: Place
) -> None:
    """It has the right name and size, as a file has for which room was reserved before its writer was killed."""
    manifest = catalog.read_manifest(source.storage, FOLDER)
    target.storage.put(target.inside(manifest.files[0].name), [bytes(3500)])
    copied = copy(source, target)
    assert is_whole(target)
    assert copied.manifest.files[0].name.startswith("copy-")
    assert target.sizes().keys() == {"manifest.json", *(file.name for file in copied.manifest.files)}
    assert copy(source, target).action == "present", "other names of data files are no other checkpoint"


def test_a_copy_of_such_a_copy_is_one_of_the_first(source: Place, target: Place, tmp_path: Path) -> None:
    manifest = catalog.read_manifest(source.storage, FOLDER)
    target.storage.put(target.inside(manifest.files[0].name), [b"left"])
    copy(source, target)
    third = Place(storage=LocalStorage(tmp_path / "third"), folder=FOLDER)
    copy(target, third)
    assert is_whole(third)
    assert copy(source, third).action == "present"


def test_a_marker_of_another_checkpoint_is_not_believed(source: Place, target: Place, tmp_path: Path) -> None:
    other = Place(storage=LocalStorage(tmp_path / "other"), folder=FOLDER)
    made(other.storage)
    failing = FailingStorage(target.storage, fail_at=20)
    with pytest.raises(OSError, match="made by a test"):
        copy(other, through(target, failing))
    copied = copy(source, target)
    assert copied.reused_bytes == 0
    assert is_whole(target)


@pytest.mark.parametrize("harm", ["flip", "cut", "missing"])
def test_damaged_bytes_are_not_copied(source: Place, target: Place, harm: str) -> None:
    manifest = catalog.read_manifest(source.storage, FOLDER)
    assert isinstance(source.storage, LocalStorage)
    file = source.storage.root / FOLDER / manifest.files[1].name
    data = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    else:
        data[3400] ^= 1
        file.write_bytes(data if harm == "flip" else data[:-1])
    with pytest.raises(CheckpointDamagedError, match="rank-00001"):
        copy(source, target)
    with pytest.raises(CheckpointNotFoundError):
        catalog.read_manifest(target.storage, FOLDER)


def test_a_damaged_copy_is_told_and_not_taken_for_the_checkpoint(source: Place, target: Place) -> None:
    copied = copy(source, target)
    target.storage.delete([target.inside(copied.manifest.files[2].name)])
    with pytest.raises(CheckpointDamagedError, match="is missing"):
        copy(source, target)


def test_a_pin_goes_along(source: Place, target: Place) -> None:
    copy(source, target, pinned=True)
    (folder,) = catalog.scan(target.storage)
    assert folder.pinned
    assert folder.committed


def test_files_that_somebody_deletes_meanwhile_are_never_committed(source: Place, target: Place) -> None:
    class Deleting(CountingStorage):
        def publish(self, name: str, data: bytes) -> None:
            if name.endswith("manifest.json"):
                left = [file.name for file in self.inner.list() if file.name.endswith("rank-00000.safetensors")]
                self.inner.delete(left)
            super().publish(name, data)

    with pytest.raises(StorageError, match="another job deletes"):
        copy(source, through(target, Deleting(target.storage)))
    (folder,) = catalog.scan(target.storage)
    assert not folder.committed


def test_a_copy_whose_files_were_deleted_is_not_even_tried_to_be_committed(source: Place, target: Place) -> None:
    published = []

    class Deleting(CountingStorage):
        def publish(self, name: str, data: bytes) -> None:
            published.append(name)
            super().publish(name, data)
            if name.endswith(".copied"):
                self.inner.delete([name.removesuffix(".copied")])

    with pytest.raises(StorageError, match="another job deletes"):
        copy(source, through(target, Deleting(target.storage)))
    assert len(published) == 3
    assert not any(name.endswith("manifest.json") for name in published)

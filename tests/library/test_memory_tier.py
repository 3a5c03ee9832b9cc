"""The memory tier by itself: what it keeps, what it gives, what it refuses, and what is left of it."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from distckpt import names
from distckpt.datafiles import SEGMENT_BYTES, Reader, write
from distckpt.manifest import DataFile
from distckpt.memorytier import DEAD_S, MemoryTier
from distckpt.readtasks import Range
from distckpt.sharedmemory import has_room
from distckpt.storage import CountingStorage, LocalStorage

URL = "s3://bucket/run"
DATA = bytes(range(256)) * 40_000  # three segments, the last one not full
ATTEMPT = "a" * 16


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder in the place of the shared memory."""
    (tmp_path / "shm").mkdir(mode=0o700)
    return tmp_path / "shm"


def tier_in(shared: Path, *, url: str = URL, room: bool = True) -> MemoryTier:
    return MemoryTier(url, within=shared, has_room=lambda _: room)


def parts(data: bytes) -> Iterator[memoryview]:
    for begin in range(0, len(data), SEGMENT_BYTES):
        yield memoryview(data)[begin : begin + SEGMENT_BYTES]


def saved(tier: MemoryTier, storage: LocalStorage, attempt: str = ATTEMPT, *, data: bytes = DATA) -> DataFile:
    """Write a data file as a save does, and commit it."""
    with tier.copying(attempt, rank=0, num_bytes=len(data)) as copy:
        name = names.rank_file(attempt, 0)
        return write(storage, "one", name, rank=0, parts=parts(data), num_bytes=len(data), look=copy)


def lying(shared: Path) -> list[str]:
    """Return every file in the shared memory, below the run's folder."""
    return sorted("/".join(file.relative_to(shared).parts[2:]) for file in shared.rglob("*") if file.is_file())


def read_back(storage: CountingStorage, file: DataFile, tier: MemoryTier, *, data: bytes = DATA) -> Reader:
    """Read a file, nearest first, and see that it is what was written."""
    into = memoryview(bytearray(file.num_bytes))
    reader = Reader(storage, "one", [file], path="one", step=1, kept=tier.files([file]))
    reader.fill({0: [Range(begin=0, into=into)]})
    assert bytes(into) == data
    assert reader.num_kept_bytes + reader.num_stored_bytes == len(data)
    assert reader.num_stored_bytes == storage.counted("read").num_bytes
    return reader


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "run")


def test_what_was_written_is_read_from_the_tier_alone(shared: Path, storage: LocalStorage) -> None:
    tier, counted = tier_in(shared), CountingStorage(storage)
    file = saved(tier, storage)
    assert read_back(counted, file, tier).num_kept_bytes == len(DATA)
    assert counted.counted("read").num_calls == 0
    assert {path.stat().st_mode & 0o777 for path in shared.rglob("*")} == {0o700, 0o600}


@pytest.mark.parametrize("at", [0, SEGMENT_BYTES + 5, len(DATA) - 1])
def test_a_flipped_bit_falls_back_to_the_storage(shared: Path, storage: LocalStorage, at: int) -> None:
    tier = tier_in(shared)
    file = saved(tier, storage)
    damaged = tier.path / file.name
    damaged.write_bytes(DATA[:at] + bytes([DATA[at] ^ 4]) + DATA[at + 1 :])
    reader = read_back(CountingStorage(storage), file, tier)
    assert "has wrong bytes between" in reader._kept.refused[0]
    assert reader.num_stored_bytes > 0


def test_a_file_of_another_size_is_not_used(shared: Path, storage: LocalStorage) -> None:
    tier = tier_in(shared)
    file = saved(tier, storage)
    with (tier.path / file.name).open("ab") as longer:
        longer.write(b"x")
    assert read_back(CountingStorage(storage), file, tier).num_stored_bytes == len(DATA)
    assert tier.files([file]).refused == {0: f"has {len(DATA) + 1:,} bytes, the manifest says {len(DATA):,}"}


@pytest.mark.parametrize("left", [None, 0, SEGMENT_BYTES + 1])
def test_a_file_that_is_cut_or_goes_while_it_is_to_be_read_falls_back(
    shared: Path, storage: LocalStorage, left: int | None
) -> None:
    tier = tier_in(shared)
    file = saved(tier, storage)
    kept = tier.files([file])
    if left is None:
        (tier.path / file.name).unlink()
    else:
        os.truncate(tier.path / file.name, left)
    into = memoryview(bytearray(len(DATA)))
    reader = Reader(storage, "one", [file], path="one", step=1, kept=kept)
    reader.fill({0: [Range(begin=0, into=into)]})
    assert bytes(into) == DATA
    assert 0 in kept.refused


def test_a_file_of_another_save_under_this_ones_name_is_refused(shared: Path, storage: LocalStorage) -> None:
    tier = tier_in(shared)
    file = saved(tier, storage)
    saved(tier, storage, "b" * 16, data=DATA[::-1])
    (tier.path / ("b" * 16)).rename(tier.path / ATTEMPT)
    assert read_back(CountingStorage(storage), file, tier).num_stored_bytes == len(DATA)


def test_a_committed_save_removes_those_before_it(shared: Path, storage: LocalStorage) -> None:
    tier = tier_in(shared)
    saved(tier, storage)
    saved(tier, storage, "b" * 16)
    assert lying(shared) == [f"{'b' * 16}/rank-00000.safetensors"]


def test_a_failed_save_leaves_the_one_before_it(shared: Path, storage: LocalStorage) -> None:
    tier = tier_in(shared)
    file = saved(tier, storage)
    for num_bytes in (0, 100, len(DATA)):
        with suppress(KeyboardInterrupt), tier.copying("b" * 16, rank=0, num_bytes=len(DATA)) as copy:
            copy(0, memoryview(DATA)[:num_bytes])
            raise KeyboardInterrupt
        assert lying(shared) == [file.name]
    assert read_back(CountingStorage(storage), file, tier).num_stored_bytes == 0


def test_without_room_a_save_succeeds_and_says_so_once(
    shared: Path, storage: LocalStorage, caplog: pytest.LogCaptureFixture
) -> None:
    tier = tier_in(shared, room=False)
    for attempt in (ATTEMPT, "b" * 16):
        file = saved(tier, storage, attempt)
        assert read_back(CountingStorage(storage), file, tier).num_stored_bytes == len(DATA)
    assert lying(shared) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "saves go on without: no room" in caplog.text


def test_what_is_older_makes_room(shared: Path, storage: LocalStorage) -> None:
    tier = MemoryTier(URL, within=shared, has_room=lambda _: not any("aaa" in name for name in lying(shared)))
    saved(tier, storage)
    file = saved(tier, storage, "b" * 16)
    assert lying(shared) == [file.name]


def test_a_memory_that_fills_up_in_the_midst_is_left_as_it_was(
    shared: Path, storage: LocalStorage, caplog: pytest.LogCaptureFixture
) -> None:
    tier = tier_in(shared)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tier.copying(ATTEMPT, rank=0, num_bytes=len(DATA)) as copy:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SEGMENT_BYTES + 1000, before[1]))
        try:
            for begin in range(0, len(DATA), SEGMENT_BYTES):
                copy(begin, memoryview(DATA)[begin : begin + SEGMENT_BYTES])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert lying(shared) == []
    assert "File too large" in caplog.text


KILLED = """
import os, sys
from pathlib import Path
from distckpt.memorytier import MemoryTier
tier = MemoryTier(sys.argv[1], within=Path(sys.argv[2]), has_room=lambda _: True)
with tier.copying("b" * 16, rank=0, num_bytes=10_000_000) as copy:
    copy(0, memoryview(bytes(5_000_000)))
    os.kill(os.getpid(), 9)
"""


def test_a_kill_in_the_midst_leaves_nothing_that_is_used_and_a_little_that_is_swept(
    shared: Path, storage: LocalStorage
) -> None:
    tier = tier_in(shared)
    file = saved(tier, storage)
    done = subprocess.run([sys.executable, "-c", KILLED, URL, str(shared)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert lying(shared) == [file.name, f"{'b' * 16}/rank-00000.safetensors.tmp"]
    halved = DataFile(name=f"{'b' * 16}/rank-00000.safetensors", rank=0, num_bytes=10_000_000, segments=())
    assert list(tier.files([file, halved])) == [0]
    tier.sweep(ATTEMPT)
    assert lying(shared) == [file.name]
    tier.sweep(None)
    assert lying(shared) == []


# What others have put there.


def a_link(user: Path, elsewhere: Path) -> None:
    user.symlink_to(elsewhere)


def open_to_others(user: Path, elsewhere: Path) -> None:
    (user / "something").mkdir(parents=True)
    user.chmod(0o755)


def of_another_user(user: Path, elsewhere: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    user.mkdir(mode=0o700)
    os.chown(user, 12345, 12345)


def replaceable(user: Path, elsewhere: Path) -> None:
    user.parent.chmod(0o777)


def a_file(user: Path, elsewhere: Path) -> None:
    user.write_bytes(b"")


@pytest.mark.parametrize("planted", [a_link, open_to_others, of_another_user, replaceable, a_file])
def test_a_folder_that_is_not_this_users_alone_is_not_written_to(
    shared: Path, storage: LocalStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture, planted
) -> None:
    tier, elsewhere = tier_in(shared), tmp_path / "elsewhere"
    elsewhere.mkdir()
    planted(tier.path.parent, elsewhere)
    before = sorted(shared.rglob("*"))
    file = saved(tier, storage)
    tier.sweep(None)
    tier.leave(in_good_order=True)
    assert read_back(CountingStorage(storage), file, tier).num_stored_bytes == len(DATA)
    assert sorted(shared.rglob("*")) == before
    assert not list(elsewhere.iterdir())
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_in_the_place_of_one_is_not_read(
    shared: Path, storage: LocalStorage, tmp_path: Path, kind: str
) -> None:
    tier = tier_in(shared)
    file = saved(tier, storage)
    place = tier.path / file.name
    place.unlink()
    if kind == "link":
        place.symlink_to(tmp_path / "run" / "one" / file.name)
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    assert read_back(CountingStorage(storage), file, tier).num_stored_bytes == len(DATA)


# What is left.


def test_two_runs_do_not_meet(shared: Path, storage: LocalStorage) -> None:
    one, other = tier_in(shared), tier_in(shared, url="s3://bucket/other")
    file = saved(one, storage)
    assert not list(other.files([file]))
    other.sweep(None)
    other.leave(in_good_order=True)
    assert list(one.files([file])) == [0]


def test_a_job_that_leaves_in_good_order_leaves_nothing(shared: Path, storage: LocalStorage) -> None:
    tier = tier_in(shared)
    saved(tier, storage)
    tier.leave(in_good_order=False)
    assert lying(shared)
    tier.leave(in_good_order=True)
    assert list(shared.iterdir()) == []


@contextmanager
def aged(folder: Path) -> Iterator[None]:
    """Let a folder be as old as one of a run that nobody has missed."""
    then = time.time() - DEAD_S - 1
    os.utime(folder, (then, then))
    yield


def test_what_a_run_left_that_is_long_dead_goes_with_the_next_job(shared: Path, storage: LocalStorage) -> None:
    dead, young, alive = (tier_in(shared, url=f"s3://bucket/{name}") for name in ("dead", "young", "alive"))
    for tier in (dead, young, alive):
        saved(tier, storage)
        if tier is not alive:
            tier.leave(in_good_order=False)
        storage.delete([f"one/{names.rank_file(ATTEMPT, 0)}"])
    with aged(dead.path), aged(alive.path):
        tier_in(shared).sweep(None)
    assert [tier.path.exists() for tier in (dead, young, alive)] == [False, True, True]


def test_what_is_restored_from_shows_that_its_run_lives(shared: Path, storage: LocalStorage) -> None:
    tier = tier_in(shared)
    saved(tier, storage)
    tier.leave(in_good_order=False)
    again = tier_in(shared)
    again.sweep(ATTEMPT)
    with aged(tier.path):
        tier_in(shared, url="s3://bucket/other").sweep(None)
        assert lying(shared)
        again.leave(in_good_order=False)
        os.utime(tier.path, (0, 0))
        tier_in(shared, url="s3://bucket/other").sweep(None)
    assert not lying(shared)


def test_room_is_bounded_by_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert has_room(1)
    assert not has_room(1 << 60)
    assert not has_room(1, folder=tmp_path / "missing")

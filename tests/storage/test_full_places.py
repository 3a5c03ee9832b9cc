"""A save that meets a full disk in its middle removes what it wrote, folders included."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from distckpt import CheckpointManager
from distckpt.errors import StorageError
from distckpt.storage import LocalStorage


class Full(LocalStorage):
    """A disk that is full at some verb."""

    verb = ""

    def _give_name(self, temporary: str, final: str, folder_fd: int) -> bool:
        if self.verb == "publish" and final == "manifest.json":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return super()._give_name(temporary, final, folder_fd)


def content(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if "lease" not in path.parts)


def test_a_manifest_that_a_quota_refuses_takes_its_data_files_with_it(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, background=False) as ckpt:
        ckpt._home.storage = ckpt._saver.storage = storage = Full(tmp_path)
        ckpt.save(1, {"x": 1})
        before = content(tmp_path)
        storage.verb = "publish"
        with pytest.raises(StorageError, match=r"Disk quota exceeded; [\d,]+ bytes are free"):
            ckpt.save(2, {"x": 2})
        assert content(tmp_path) == before
        storage.verb = ""
        ckpt.save(3, {"x": 3})
        assert [one.step for one in ckpt.checkpoints] == [1, 3]


def test_a_put_that_fails_leaves_no_empty_folders(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"some"
        raise OSError(errno.EIO, "made by a test")

    storage = LocalStorage(tmp_path)
    storage.put("kept/file", [b"x"])
    before = content(tmp_path)
    with pytest.raises(OSError, match="made by a test"):
        storage.put("step/attempt/file", chunks())
    assert content(tmp_path) == before

"""Data files: every part has its digest, however a storage takes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from distckpt import datafiles
from distckpt.checksum import digest
from distckpt.storage import LocalStorage
from distckpt.storage.contract import Buffer


class AsksNoMoreThanItNeeds(LocalStorage):
    """A storage that stops taking when it has as many bytes as it was told."""

    def put(self, name: str, chunks: Iterable[Buffer], *, num_bytes: int | None = None) -> int:
        left, taken, asked = num_bytes or 0, [], iter(chunks)
        while left:
            taken.append(next(asked))
            left -= memoryview(taken[-1]).nbytes
        return super().put(name, taken, num_bytes=num_bytes)


def test_the_last_part_has_its_digest_where_nobody_asks_for_the_end(tmp_path: Path):
    parts = [memoryview(b"header"), memoryview(b"data"), memoryview(b"the last")]
    num_bytes = sum(map(len, parts))
    storage = AsksNoMoreThanItNeeds(tmp_path)
    file = datafiles.write(storage, "", "file", rank=0, parts=parts, num_bytes=num_bytes)
    assert [segment.digest for segment in file.segments] == [digest(part) for part in parts]
    assert (tmp_path / "file").read_bytes() == b"".join(parts)

"""Verification: whether a checkpoint's data files are the ones that were written, all of their bytes or a sample.

Invariant: nothing is changed, and what could not be read for another reason than its bytes is not called damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distckpt import names
from distckpt.checksum import digest
from distckpt.manifest import DataFile, Manifest
from distckpt.storage import Storage

READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong with a checkpoint: the file's name inside it, and what is wrong."""

    file: str
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A part of a checkpoint's segments: the `turn`-th of `turns`, from 1 on; all turns together are all of them."""

    turn: int
    turns: int

    def takes(self, index: int) -> bool:
        """Say whether the segment of this number, counted over all data files, is in it."""
        return index % self.turns == self.turn - 1

    def num_bytes(self, manifest: Manifest) -> int:
        """Return how many bytes of a checkpoint are in it."""
        segments = [segment for file in manifest.files for segment in file.segments]
        return sum(segment.num_bytes for index, segment in enumerate(segments) if self.takes(index))


EVERYTHING = Sample(turn=1, turns=1)


def verify(storage: Storage, manifest: Manifest, *, folder: str = "", sample: Sample = EVERYTHING) -> Iterator[Problem]:
    """Yield everything that is wrong with a checkpoint's data files, reading every byte, or a sample.

    Raises:
        StorageError: A file could not be read for a reason that says nothing of its bytes.
    """
    sizes = {file.name: file.num_bytes for file in storage.list(folder)}
    wrong = {problem.file: problem for problem in wrong_sizes(sizes, manifest, folder=folder)}
    first = 0
    for file in manifest.files:
        if file.name in wrong:
            yield wrong[file.name]
        else:
            yield from _verify_file(storage, names.join(folder, file.name), file, sample, first=first)
        first += len(file.segments)


def wrong_sizes(sizes: Mapping[str, int], manifest: Manifest, *, folder: str = "") -> Iterator[Problem]:
    """Yield a problem for each data file that is missing or of the wrong size.

    Args:
        sizes: The size of each file, by its name in the storage.
        manifest: The checkpoint's manifest.
        folder: The checkpoint's folder in the storage.
    """
    for file in manifest.files:
        found = sizes.get(names.join(folder, file.name))
        if found is None:
            yield Problem(file=file.name, problem="is missing")
        elif found != file.num_bytes:
            yield Problem(file=file.name, problem=f"has {found:,} bytes, the manifest says {file.num_bytes:,}")


def _verify_file(storage: Storage, name: str, file: DataFile, sample: Sample, *, first: int) -> Iterator[Problem]:
    """Yield one problem for the first segment of a file that is not what was written; its first one's number counts."""
    buffer = bytearray(min(READ_BYTES, file.num_bytes) if file.segments else 0)
    offset = 0
    for index, segment in enumerate(file.segments, start=first):
        if not sample.takes(index):
            offset += segment.num_bytes
            continue
        if segment.num_bytes > len(buffer):
            buffer = bytearray(segment.num_bytes)
        view = memoryview(buffer)[: segment.num_bytes]
        try:
            storage.read(name, offset, view)
        except (FileNotFoundError, EOFError) as error:
            yield Problem(file=file.name, problem=f"could not be read whole: {error}")
            return
        if digest(view) != segment.digest:
            yield Problem(
                file=file.name, problem=f"has wrong bytes between {offset:,} and {offset + segment.num_bytes:,}"
            )
            return
        offset += segment.num_bytes

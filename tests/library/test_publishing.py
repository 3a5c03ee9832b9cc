"""What is published can be read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from distckpt.errors import UsageError
from distckpt.manifest import DataFile, Segment, parse
from distckpt.plan import Block
from distckpt.shards import Header, RankShare, assemble, publish
from distckpt.storage import LocalStorage


def manifest_of_two_ranks():
    shares = []
    for rank in range(2):
        block = Block(name="w", dtype="F32", whole=(4,), start=(2 * rank,), shape=(2,))
        file = DataFile(name=f"a/{rank}", rank=rank, num_bytes=8, segments=(Segment(num_bytes=8, digest="0" * 32),))
        shares.append(RankShare(file=file, blocks=(block,), offsets=(0,)))
    header = Header(step=7, run="r", attempt="a", layout="sharded", world_size=2, objects={})
    return assemble(header, shares)


def test_a_manifest_that_nobody_could_read_back_is_not_published(tmp_path: Path):
    storage, manifest = LocalStorage(tmp_path), manifest_of_two_ranks()
    size = publish(storage, "good", manifest, limit_bytes=1 << 20)
    with pytest.raises(UsageError) as caught:
        publish(storage, "bad", manifest, limit_bytes=size - 1)
    assert "step 7" in str(caught.value)
    assert "for 2 pieces" in str(caught.value)
    assert [file.name for file in storage.list()] == ["good/manifest.json"]
    publish(storage, "just", manifest, limit_bytes=size)
    assert parse(storage.read_all("just/manifest.json", limit_bytes=size), path="just").tensors == manifest.tensors

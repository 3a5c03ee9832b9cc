"""What benchmarks count in a library from outside of it: copies, digests, meetings of ranks."""

from __future__ import annotations

import pytest
import torch
import xxhash

from benchmarks import collectives, ddp_bytes, digests, hashed
from benchmarks.contenders.background import BACKGROUND_SAVERS
from benchmarks.staged import CopiedBytes
from distckpt import checksum
from distckpt.ranks import Ranks


def test_every_way_to_copy_a_tensor_is_counted() -> None:
    source, target = torch.ones(10), torch.zeros(10)
    with CopiedBytes() as copied:
        target.copy_(source)
        torch._foreach_copy_([target, target], [source, source])
        source.clone()
        source.to(torch.float64)
        target.untyped_storage().copy_(source.untyped_storage())
        source.add_(1)
    assert copied.num_bytes == 40 + 80 + 40 + 80 + 40


def test_what_xxh3_is_given_is_counted_at_once_and_in_parts() -> None:
    with hashed.counted() as sizes:
        whole = checksum.digest(bytes(10))
        hasher = xxhash.xxh3_128(bytes(4))
        hasher.update(bytes(6))
        assert hasher.hexdigest() == whole
    assert sum(sizes) == 20
    checksum.digest(bytes(10))
    assert sum(sizes) == 20


def test_without_digests_every_module_of_distckpt_has_one_that_looks_at_nothing() -> None:
    from distckpt import datafiles, manifest

    real = checksum.digest
    with hashed.without_digests() as num_places, hashed.counted() as sizes:
        assert num_places >= 3
        assert checksum.digest(b"a") == datafiles.digest(b"b") == manifest.digest(b"c") == "0" * 32
    assert sizes == []
    assert checksum.digest is datafiles.digest is manifest.digest is real
    assert checksum.digest(b"a") != checksum.digest(b"b")


def test_who_needs_a_descriptor_for_each_tensor_is_left_out_where_there_are_too_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1_000, 4_000))
    assert ddp_bytes.lacking_descriptors(499) == ""
    assert ddp_bytes.lacking_descriptors(20_000) == (
        "it needs a file descriptor for each of 20,000 tensors, and may have 1,000"
    )
    assert {*BACKGROUND_SAVERS} >= ddp_bytes.BY_DESCRIPTOR


def test_a_switch_that_does_not_switch_is_found_out() -> None:
    def hashing() -> dict[str, float]:
        checksum.digest(bytes(300))
        return {}

    digests.check(hashing, off=False, num_bytes=100)
    digests.check(dict, off=True, num_bytes=100)
    with pytest.raises(digests.SwitchError, match="digests are off, but xxh3 saw 300 bytes"):
        digests.check(hashing, off=True, num_bytes=100)
    with pytest.raises(digests.SwitchError, match="of 303 bytes xxh3 saw 300"):
        digests.check(hashing, off=False, num_bytes=101)


def test_a_meeting_of_ranks_counts_once_however_it_is_made() -> None:
    ranks = Ranks(timeout_s=5)
    with collectives.counted() as calls:
        ranks.agree("a test", lambda: 1, lambda facts: facts)
        ranks.barrier("a test")  # which agrees on nothing
        ranks.announced("key")
    assert calls == {"agree": 1, "barrier": 1, "announced": 1}
    ranks.barrier("a test")
    assert calls["barrier"] == 1

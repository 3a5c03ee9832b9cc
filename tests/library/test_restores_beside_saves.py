"""Whoever restores while another job saves, mends and prunes gets a whole checkpoint, and takes none from the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from distckpt import CheckpointManager, catalog, verification
from distckpt.ranks import Ranks
from distckpt.restore import RestoreRequest, restore
from distckpt.storage import open_storage
from distckpt.storage.wrappers import CountingStorage

FOLDER = "step-000000000030"
MOST_CALLS = 100


class Overtaken(CountingStorage):
    """A local directory in which another job does something before this one's call of number `at`."""

    def __init__(self, directory: Path, at: int, then: Callable[[], None]) -> None:
        super().__init__(open_storage(directory))
        self.has_happened = False
        self._at = at
        self._then = then
        self._calls = itertools.count()

    def _count(self, verb: str, *, num_calls: int = 0, num_bytes: int = 0) -> None:
        if num_calls and next(self._calls) == self._at:
            self.has_happened = True
            self._then()
        super()._count(verb, num_calls=num_calls, num_bytes=num_bytes)


def filled(step: int) -> dict[str, object]:
    return {"weights": torch.full((500,), float(step)), "step": step}


def save(directory: Path, *steps: int, keep: int = 9) -> None:
    with CheckpointManager(directory, keep=keep, background=False) as ckpt:
        ckpt.restore(filled(0))
        for step in steps:
            ckpt.save(step, filled(step))


def go_on(directory: Path) -> None:
    """Save step 40 and then 50; the job that does that went on from 40, so that nothing older is kept."""
    save(directory, 40, keep=1)
    save(directory, 50, keep=1)
    assert not (directory / FOLDER).exists()


def restored(storage: Overtaken, *, heal: bool = True) -> int:
    """Return of which step the state is that a job has restored there, all of it."""
    state = filled(0)
    loaded = restore(state, RestoreRequest(heal=heal), storage=storage, ranks=Ranks(timeout_s=10))
    [step] = {float(state["step"]), *state["weights"].tolist()}  # type: ignore[arg-type, attr-defined]
    assert step == (0 if loaded is None else loaded.manifest.step)
    return int(step)


def insist_whole(directory: Path, folder: str) -> None:
    storage = open_storage(directory)
    manifest = catalog.read_manifest(storage, folder)
    assert not list(verification.verify(storage, manifest, folder=folder))


@pytest.mark.parametrize("damage", ["missing", "short", "garbled", "its manifest"])
def test_a_step_that_is_saved_anew_while_it_is_found_damaged_stays(damage: str, tmp_path: Path) -> None:
    found = set()
    for at in range(MOST_CALLS):
        directory = tmp_path / str(at)
        save(directory, 20, 30)
        [path] = (directory / FOLDER).rglob("*.safetensors")
        if damage == "missing":
            path.unlink()
        elif damage == "short":
            path.write_bytes(path.read_bytes()[:-1])
        elif damage == "garbled":
            path.write_bytes(path.read_bytes()[:-8] + bytes(8))
        else:
            (directory / FOLDER / "manifest.json").write_bytes(b"{}")
        storage = Overtaken(directory, at, partial(save, directory, 30))
        found.add(restored(storage))
        if not storage.has_happened:
            break
        insist_whole(directory, FOLDER)
    assert found == {20, 30}


@pytest.mark.parametrize("heal", [True, False])
def test_nobody_starts_afresh_because_what_he_looks_at_is_pruned(heal: bool, tmp_path: Path) -> None:
    found = set()
    for at in range(MOST_CALLS):
        directory = tmp_path / str(at)
        save(directory, 30)
        storage = Overtaken(directory, at, partial(go_on, directory))
        found.add(restored(storage, heal=heal))
        if not storage.has_happened:
            break
        insist_whole(directory, "step-000000000050")
    assert found == {30, 50}

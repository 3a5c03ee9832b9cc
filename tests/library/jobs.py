"""What ranks run in the tests of saves and restores: top-level functions, sent by name."""

from __future__ import annotations

import os
import random
import time
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import distckpt
from benchmarks.kernel import counters
from distckpt import CheckpointManager, PerRank, catalog, loading
from distckpt.errors import RankFailedError, RankTimeoutError, StorageError
from distckpt.manifest import Manifest
from distckpt.preparation import SaveRequest, prepare
from distckpt.ranks import Ranks
from distckpt.storage import Storage
from distckpt.workspace import Workspace


def seeded(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build(seed: int = 0) -> dict[str, Any]:
    """Return a state with one of each kind, the same on every rank but for what is marked."""
    seeded(seed)
    rank = dist.get_rank() if dist.is_initialized() else 0
    model: nn.Module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8 * 36, 10)
    )
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=100)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "epoch": 0,
        "embedding": torch.zeros(5, 3),
        "extra": {"loss": 0.0, "history": [1, 2.5], "pair": (1, "a"), "array": np.arange(4), "blob": b"\0\1"},
        "position": PerRank({"shard": rank}),
    }


def train(state: dict[str, Any], steps: int) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    for _ in range(steps):
        state["optimizer"].zero_grad()
        state["model"](torch.randn(4, 3, 8, 8)).square().mean().backward()
        state["optimizer"].step()
        state["scheduler"].step()
        state["epoch"] += 1
        state["embedding"] += 1.5
        state["extra"]["loss"] = state["epoch"] / 3
        state["position"].value["shard"] = rank * 1000 + state["epoch"]


def facts(state: dict[str, Any]) -> dict[str, Any]:
    """Return everything that has to come back, comparable."""
    inner = getattr(state["model"], "module", state["model"])
    return {
        "model": {name: tensor.tolist() for name, tensor in inner.state_dict().items()},
        "optimizer": repr(state["optimizer"].state_dict()),
        "scheduler": state["scheduler"].state_dict(),
        "epoch": state["epoch"],
        "embedding": state["embedding"].tolist(),
        "extra": repr(state["extra"]),
    }


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(1).item()]


def save_run(directory: str, layout: str, steps: int, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train and save with a manager; return the facts, this rank's own state, and what the generators give next."""
    state = build()
    seeded(100 + (dist.get_rank() if dist.is_initialized() else 0))
    with CheckpointManager(directory, every=2, layout=layout, **(options or {})) as ckpt:
        for _ in ckpt.steps(state, until=steps):
            train(state, 1)
    return {"facts": facts(state), "own": dict(state["position"].value), "draws": draws()}


def restore_run(directory: str, seed: int = 7) -> dict[str, Any]:
    """Restore into a freshly built state; return the same."""
    state = build(seed)
    embedding = state["embedding"]
    with CheckpointManager(directory) as ckpt:
        step = ckpt.restore(state)
    drawn = draws()
    return {
        "step": step,
        "facts": facts(state),
        "own": dict(state["position"].value),
        "draws": drawn,
        "in_place": embedding is state["embedding"],
    }


def restore_and_watch(directory: str, trouble: str = "") -> dict[str, Any]:
    """Restore; return the "step", the "facts", how many manifests this rank has "parsed", and at what ranks "met".

    Args:
        directory: The run.
        trouble: Of other ranks than 0 while rank 0 chooses: they read an "older" manifest, or what they prepare
            "fails". With none, the ranks have to be at their manifests at one time.
    """
    state, parsed, met, matched = build(7), [], [], []
    real_parse, real_agree, real_match = catalog.parsed_manifest, Ranks.agree, loading.match
    is_other = dist.get_rank() > 0

    def parse(storage: Storage, folder: str, data: bytes) -> Manifest:
        if trouble == "older" and is_other and not parsed:
            folder = catalog.scan(storage)[0].name
            data = catalog.manifest_data(storage, folder)
        if not trouble:
            dist.monitored_barrier(timeout=timedelta(seconds=20))
        parsed.append(folder)
        return real_parse(storage, folder, data)

    def match(*args: Any, **kwargs: Any) -> Any:
        matched.append(1)
        if trouble == "fails" and is_other and len(matched) == 1:
            raise StorageError(path=directory, action="read", cause="it fails once")
        return real_match(*args, **kwargs)

    def agree(ranks: Ranks, action: str, *args: Any, **kwargs: Any) -> Any:
        met.append(action.removeprefix("restore: ").split(" ")[0])
        return real_agree(ranks, action, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, CheckpointManager(directory) as ckpt:
        patch.setattr(catalog, "parsed_manifest", parse)
        patch.setattr(loading, "match", match)
        patch.setattr(Ranks, "agree", agree)
        step = ckpt.restore(state)
    return {"step": step, "facts": facts(state), "parsed": len(parsed), "met": met}


def fail_to_match(directory: str, *, victim: int) -> str:
    """Restore while one rank's state raises what distckpt does not know; return what this rank was told."""

    def match(*args: Any, **kwargs: Any) -> Any:
        raise ArithmeticError("made by the test")

    with pytest.MonkeyPatch.context() as patch, CheckpointManager(directory) as ckpt:
        if dist.get_rank() == victim:
            patch.setattr(loading, "match", match)
        try:
            ckpt.restore(build(7))
        except RankFailedError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def restore_without_torchrun(directory: str) -> dict[str, Any]:
    """Restore as a plain script does: no process group."""
    assert not dist.is_initialized()
    return restore_run(directory)


def bytes_by_rank(directory: str) -> list[int]:
    """Return how many bytes of tensors each rank's data file holds."""
    storage = distckpt.storage.open_storage(directory)
    _, manifest = distckpt.catalog.locate(storage)
    return [file.num_bytes - file.segments[0].num_bytes for file in manifest.files]


def save_big(directory: str) -> None:
    """Save one tensor that dwarfs the others."""
    seeded(0)
    state = {"big": nn.Linear(128, 1001, bias=False), "small": nn.Linear(3, 3)}
    distckpt.save(directory, state, rng=False)


def save_differing(directory: str) -> None:
    """Save state that differs by rank, and is not marked."""
    rank = dist.get_rank()
    state = {"rng": torch.tensor([100 + rank]), "sampler": {"rank": rank, "pos": rank * 1000}, "same": torch.ones(3)}
    distckpt.save(directory, state)


def load_differing(directory: str) -> tuple[int, dict[str, int]]:
    state = {"rng": torch.tensor([0]), "sampler": {"rank": -1, "pos": -1}, "same": torch.zeros(3)}
    distckpt.load(directory, state)
    return int(state["rng"]), state["sampler"]


class Breaks(nn.Module):
    """A module whose state_dict fails on one rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.rank = rank

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == self.rank:
            raise ValueError("planned failure")
        return super().state_dict(*args, **kwargs)


def save_broken(directory: str, rank: int) -> str:
    """Save where one rank's state_dict() fails; return the error that this rank gets."""
    try:
        distckpt.save(directory, {"model": Breaks(rank)}, timeout_s=20)
    except distckpt.errors.DistckptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fail_in_background(directory: str) -> dict[str, Any]:
    """Save where rank 1 cannot write, then where it can again."""
    state = build()
    rank = dist.get_rank()
    blocked = f"{directory}/step-000000000002"
    with CheckpointManager(directory, layout="sharded", timeout_s=30) as ckpt:
        ckpt.save(1, state)
        ckpt.wait()
        dist.barrier()
        if rank == 0:
            with open(blocked, "w") as file:  # noqa: PTH123  a file where a folder is wanted
                file.write("in the way")
        dist.barrier()
        ckpt.save(2, state)
        try:
            ckpt.wait()
            first = "no error"
        except distckpt.errors.DistckptError as error:
            first = f"{type(error).__name__}: {error}"
        dist.barrier()
        if rank == 0:
            os.unlink(blocked)  # noqa: PTH108
        dist.barrier()
        ckpt.save(3, state)
        ckpt.wait()
        return {"error": first, "steps": [c.step for c in ckpt.checkpoints]}


def mismatched(directory: str, **changes: Any) -> str:
    """Save on every rank with something that differs; return the error that this rank gets."""
    rank = dist.get_rank()
    state: dict[str, Any] = {"model": nn.Linear(3, 3)}
    if rank == 1 and changes.get("key"):
        state["more"] = 1
    if rank == 1 and changes.get("shape"):
        state["model"] = nn.Linear(3, 4)
    step = rank if changes.get("step") else 5
    try:
        distckpt.save(directory, state, step=step, timeout_s=20)
    except distckpt.errors.DistckptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def stop_by_signal(directory: str, signalled: list[int], at: int, synchronised: bool) -> dict[str, Any]:
    """Run until a signal that only some ranks get."""
    import signal

    rank = dist.get_rank()
    state = build()
    done = 0
    with CheckpointManager(directory, timeout_s=30) as ckpt:
        # Without training the ranks never wait for each other: one may be thousands of steps ahead.
        for step in ckpt.steps(state, until=50 if synchronised else 1_000_000):
            if synchronised:
                train(state, 1)
            if step == at and rank in signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            done = step
        newest = ckpt.latest
        assert newest is not None
        return {"done": done, "preempted": ckpt.preempted, "saved": newest.step}


def do_different_things(directory: str) -> str:
    """Call different verbs on different ranks; return the error that this rank gets."""
    manager = CheckpointManager(directory, timeout_s=20)
    try:
        if dist.get_rank() == 0:
            manager.restore({"x": 1})
        else:
            manager.save(1, {"x": 1})
    except distckpt.errors.DistckptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Leaving(Ranks):
    """Ranks of which number 1 does not come to the second meeting."""

    num_meetings = 0

    def agree(self, *args: Any) -> Any:
        self.num_meetings += 1
        if self.rank == 1 and self.num_meetings == 2:
            raise KeyboardInterrupt
        return super().agree(*args)


def prepare_without_one_rank(directory: str) -> str | None:
    """Prepare a save for which rank 0 needs what the others have, and one of them leaves; return what is raised."""
    request = SaveRequest(step=1, folder="one", run="run", layout="full", rng=False)
    state = {"own": PerRank(torch.ones(3))}
    storage = distckpt.storage.open_storage(directory)
    try:
        prepare(state, request, ranks=Leaving(timeout_s=3), storage=storage, workspace=Workspace())
    except (RankTimeoutError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return None


def wait_with_little_patience(absent: list[int]) -> list[int] | None:
    """Meet on all ranks; those that are absent come when rank 1, which has little patience, has given up.

    Returns:
        Whom rank 1 misses.
    """
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    ranks = Ranks(timeout_s=1.5 if rank == 1 else 60)
    if rank in absent:
        store.wait(["rank 1 has given up"], timedelta(seconds=60))
    try:
        ranks.barrier("meeting")
    except RankTimeoutError as error:
        assert rank == 1
        store.set("rank 1 has given up", "")
        return error.missing
    return None


def leave_one_out(directory: str) -> str:
    """Save on all ranks but the last; return the error that this rank gets."""
    if dist.get_rank() == dist.get_world_size() - 1:
        return "was not there"
    try:
        distckpt.save(directory, {"x": 1}, timeout_s=3)
    except distckpt.errors.DistckptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def count_bytes_of_a_later_save(directory: str, num_tensors: int) -> int:
    """Return how many bytes go over this process's TCP sockets, in both directions, for the third save."""
    model = nn.ParameterList([nn.Parameter(torch.ones(4)) for _ in range(num_tensors)])
    with CheckpointManager(directory, every=None) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"model": model})
            ckpt.wait()
        time.sleep(0.2)  # what is acknowledged later counts later
        before = counters()
        ckpt.save(3, {"model": model})
        ckpt.wait()
        return (counters() - before).wire_bytes


def count_keys_in_the_store(directory: str) -> list[int]:
    """Return how many keys the job's store holds after each of some saves, as rank 0 sees it when all have ended."""
    store, numbers = dist.distributed_c10d._get_default_store(), []
    with CheckpointManager(directory, every=None) as ckpt:
        for step in range(1, 5):
            ckpt.save(step, {"x": step})
            ckpt.wait()
            dist.barrier()
            numbers.append(store.num_keys())
            dist.barrier()
    return numbers


def count_keys_of_single_saves(directory: str) -> list[int]:
    """Return how many keys the job's store holds after each of some saves of a channel of their own."""
    store, numbers = dist.distributed_c10d._get_default_store(), []
    for step in range(3):
        distckpt.save(f"{directory}/{step}", {"x": step})
        dist.barrier()
        numbers.append(store.num_keys())
        dist.barrier()
    return numbers

"""A training that keeps its newest checkpoint in the node's memory, killed and started again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_job import TrainingJob, last_step, logged

from distckpt import catalog, sharedmemory
from distckpt.memorytier import MemoryTier
from distckpt.storage import open_storage

SETTINGS = ["--train.epochs=2", "--train.log_every=1", "--checkpoint.every=5", "--checkpoint.memory_tier=true"]
TOTAL = 2 * 23


@pytest.mark.skipif(sharedmemory.place() is None, reason="no shared memory")
def test_a_training_that_is_killed_goes_on_from_the_memory_of_its_node(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [*SETTINGS, f"--checkpoint.directory={run}"]
    with TrainingJob(settings, tmp_path) as job:
        job.wait_until(lambda: last_step(run) >= 13)
    killed = logged(run)
    state_bytes = catalog.locate(open_storage(run))[1].num_bytes
    with TrainingJob(settings, tmp_path) as job:
        said = job.wait()
    assert "from the memory tier, 0.0 MB from the storage" in said
    assert f"complete: step {TOTAL}" in said
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    restored = [event for event in events if event["kind"] == "restored"][-1]
    assert restored["step"] >= 5
    assert restored["storage_bytes"] == 0
    assert restored["memory_bytes"] >= 2 * 0.95 * state_bytes, "each rank has read what it holds, headers apart"
    # What the killed job did after its last checkpoint is done again, to the last bit of each loss.
    assert logged(run)[: len(killed)] == killed
    assert [line["step"] for line in logged(run) if line["kind"] == "train"] == list(range(1, TOTAL + 1))
    assert not MemoryTier(str(run)).path.exists(), "who is done leaves nothing in memory"

"""Restarts within a job: torchrun starts its ranks again, in the store that those before them have used."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_job import TrainingJob, last_step, logged

SETTINGS = ["--train.epochs=2", "--train.log_every=1", "--checkpoint.every=5", "--checkpoint.timeout_s=60"]
TOTAL = 2 * 23


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_ranks_that_torchrun_starts_again_go_on_from_the_newest_checkpoint(tmp_path: Path, rank: int) -> None:
    run = tmp_path / "run"
    settings = [*SETTINGS, f"--checkpoint.directory={run}"]
    with TrainingJob(settings, tmp_path, max_restarts=2) as job:
        for at in (12, 30):
            job.wait_until(lambda at=at: last_step(run) >= at)
            job.ranks()[rank].kill()
        said = job.wait()
    assert said.count("restored step ") == 2
    assert f"complete: step {TOTAL}" in said
    assert [line["step"] for line in logged(run) if line["kind"] == "train"] == list(range(1, TOTAL + 1))

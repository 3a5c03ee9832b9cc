"""Trainings that are asked to stop at any moment lose no step, say how they ended, and end as if undisturbed.

Under torchrun, and so long; a sample of this without torchrun is in every test run, beside the trainer's tests.
"""

from __future__ import annotations

import itertools
import signal
from collections import Counter
from pathlib import Path

import pytest
from preemption_campaign import STEPS_PER_EPOCH, TOTAL, Request, campaign, interrupt, newest_step, settings
from training_job import distckpt, logged, train

NUM_REQUESTS = 50  # that come when there is something to lose
REQUESTS_PER_RUN = 5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once without any disturbance and return the run's directory."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(settings(folder / "run"), folder)
    return folder / "run"


def assert_ends_as_if_undisturbed(run: Path, undisturbed: Path) -> None:
    """Go on to the end; compare the logs, line by line, and the last checkpoints, entry by entry."""
    said = train(settings(run), run.parent)
    assert "complete:" in said
    assert newest_step(run) == TOTAL
    assert logged(run) == logged(undisturbed)
    diff = distckpt("diff", str(run), str(undisturbed))
    assert diff.returncode == 0, diff.stdout + diff.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_requests_of_all_kinds_lose_no_step(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    requests = [
        Request(number=signal.SIGTERM, target="torchrun", step=11, later_s=0.0),
        Request(number=signal.SIGUSR1, target="rank 1", step=2 * STEPS_PER_EPOCH, later_s=0.0),
        Request(number=signal.SIGINT, target="both ranks", step=3 * STEPS_PER_EPOCH + 2, later_s=0.0),
    ]
    assert [interrupt(run, request) for request in requests] == ["in training", "in an evaluation", "in training"]
    assert_ends_as_if_undisturbed(run, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_requests_at_random_moments_lose_no_step(undisturbed: Path, tmp_path: Path) -> None:
    counts = Counter[str]()
    for seed in itertools.count():
        run = tmp_path / str(seed) / "run"
        counts += campaign(run, seed=seed, num_requests=REQUESTS_PER_RUN)
        assert_ends_as_if_undisturbed(run, undisturbed)
        print(f"{counts.total()} requests: {dict(counts)}", flush=True)
        if counts.total() - counts["not begun"] - counts["complete"] >= NUM_REQUESTS:
            break

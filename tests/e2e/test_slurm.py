"""Under a real Slurm, launch/slurm.sbatch is preempted in every way that there is, and ends as if undisturbed.

The long ones, with a line for each preemption:

    python -m pytest -m "slurm and slow" -s -o faulthandler_timeout=0 tests/e2e
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import POLL_S, SlurmCluster, SlurmJob, missing, slurm_cluster
from training_job import distckpt, last_step, logged, train

pytestmark = pytest.mark.slurm

COMMON = ["--train.global_batch_size=32", "--train.log_every=1"]
SHORT, LONG = ["--train.epochs=8", *COMMON], ["--train.epochs=80", *COMMON]
ENDLESS = ["--train.epochs=100000", "--train.eval_every=100000", "--train.log_every=1", "--checkpoint.every=20"]
TWO_NODES = ["--nodes=2"]
ONE_NODE = ["--nodes=1"]
NUM_PREEMPTIONS = 10  # of each job in the campaign
KINDS = ("USR1 to the script", "USR1 to the steps", "TERM to the steps", "requeue", "priority")


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    """Start a Slurm for the tests of this module."""
    if reason := missing():
        pytest.skip(reason)
    with slurm_cluster() as cluster:
        yield cluster


def undisturbed(settings: list[str], folder: Path) -> Path:
    """Train on two ranks, without Slurm and any disturbance, and return the run's directory."""
    train([*settings, f"--checkpoint.directory={folder / 'undisturbed'}"], folder)
    return folder / "undisturbed"


def submit(slurm: SlurmCluster, run: Path, options: list[str], settings: list[str], **more: str) -> SlurmJob:
    """Submit a training on two ranks, on one node or on two."""
    num_ranks = "2" if options[0] == "--nodes=1" else "1"
    return slurm.submit(run, options, settings, NPROC_PER_NODE=num_ranks, **more)


def preempt(job: SlurmJob, kind: str) -> None:
    """Take the nodes from a running job, and return when it has been queued and started again."""
    number, before, ask = job.number, job.num_restarts, job.cluster.ask
    match kind:
        case "USR1 to the script":  # what --signal sends ahead of the end
            ask("scancel", "--batch", "--signal=USR1", number)
        case "USR1 to the steps":
            ask("scancel", "--signal=USR1", number)
        case "TERM to the steps":
            ask("scancel", "--signal=TERM", number)
        case "requeue":  # by an administrator, or for a lost node: Slurm ends everything, and queues the job itself
            ask("scontrol", "requeue", number)
        case "time limit":  # Slurm looks at the time every 30 s, and signals the script itself
            ask("scontrol", "update", f"JobId={number}", "EndTime=now+90seconds")
        case "priority":  # a job of a higher partition takes the nodes, after a minute's grace
            ask("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.wait_until(lambda: job.num_restarts > before and job.state == "RUNNING")


def assert_complete(job: SlurmJob, run: Path, undisturbed: Path) -> None:
    """The job ends with success, and its log and last checkpoint are those of the run that nothing has disturbed."""
    total = newest(undisturbed)
    assert (job.wait(), job.fact("ExitCode")) == ("COMPLETED", "0:0"), job.output
    assert f"slurm.sbatch: complete, newest checkpoint: step {total}" in job.output
    assert logged(run) == logged(undisturbed)
    diff = distckpt("diff", str(run), str(undisturbed))
    assert diff.returncode == 0, diff.stdout + diff.stderr


def test_a_job_on_two_nodes_that_is_signalled_is_queued_again_and_ends_as_if_undisturbed(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, TWO_NODES, SHORT)
    job.wait_until(lambda: last_step(run) >= 60)
    preempt(job, "USR1 to the script")
    assert_complete(job, run, undisturbed(SHORT, tmp_path))
    assert job.num_restarts == 1
    assert "asked to stop: SIGUSR1" in job.output
    assert "; 120.0 s left" in job.output, "the grace period of the file's --signal reaches the ranks"
    assert "slurm.sbatch: preempted, newest checkpoint: step " in job.output


@pytest.fixture(scope="module")
def long_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once for the campaign, and return the run's directory."""
    return undisturbed(LONG, tmp_path_factory.mktemp("long"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", [ONE_NODE, TWO_NODES], ids=["one node", "two nodes"])
def test_ten_preemptions_of_all_kinds_change_nothing(
    slurm: SlurmCluster, long_undisturbed: Path, tmp_path: Path, options: list[str]
) -> None:
    run, total, chance = tmp_path / "run", newest(long_undisturbed), random.Random(0)
    job = submit(slurm, run, options, LONG)
    for index in range(NUM_PREEMPTIONS):
        kind = KINDS[index % len(KINDS)] if index else "time limit"
        done, before = newest(run), job.num_restarts
        step = done + chance.randint(1, (total - done) // NUM_PREEMPTIONS)
        job.wait_until(lambda step=step: last_step(run) >= step)  # type: ignore[misc]
        pause(chance.uniform(0, 0.5))
        preempt(job, kind)
        print(
            f"{options[0]}: {kind} after step {step}: newest step {newest(run)}, {job.num_restarts} restarts",
            flush=True,
        )
        assert job.num_restarts > before
        assert newest(run) >= done, "a committed step was lost"
    assert_complete(job, run, long_undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_stops_by_itself_before_its_allocation_ends_and_is_not_queued_again_when_it_is_cancelled(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(slurm, run, [*TWO_NODES, "--time=2", "--signal=B:CONT@1"], ENDLESS)
    job.wait_until(lambda: job.num_restarts == 1)
    assert "asked to stop: the end of the allocation is near" in job.output
    assert "slurm.sbatch: preempted" in job.output
    assert "CANCELLED" not in job.output, "Slurm had to end it"
    saved = newest(run)
    job.wait_until(lambda: f"restored step {saved} " in job.output and last_step(run) > saved)
    slurm.ask("scancel", job.number)
    assert job.wait() == "CANCELLED"
    assert job.num_restarts == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_failed_training_is_not_queued_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    broken = ["--optimizer.lr=1e30", "--checkpoint.check_finite=error", "--checkpoint.every=5"]
    job = submit(slurm, tmp_path / "run", ONE_NODE, broken, MAX_RESTARTS="0")
    assert (job.wait(), job.fact("ExitCode"), job.num_restarts) == ("FAILED", "1:0", 0), job.output
    assert "slurm.sbatch: failed, newest checkpoint: step " in job.output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_comes_no_further_is_given_up(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path / "run", ONE_NODE, ["--train.epochs=wrong"], MAX_RESTARTS="0", MAX_IDLE="2")
    assert (job.wait(), job.fact("ExitCode"), job.num_restarts) == ("FAILED", "1:0", 1), job.output
    assert "slurm.sbatch: giving up: 2 starts in a row made no new checkpoint" in job.output


def newest(run: Path) -> int:
    """Return the newest committed step; 0 if there is none."""
    return max((int(path.parent.name.removeprefix("step-")) for path in run.glob("step-*/manifest.json")), default=0)


def pause(duration_s: float) -> None:
    """Let a part of a step, or of a save, go by."""
    began = time.monotonic()
    while time.monotonic() - began < duration_s:
        time.sleep(POLL_S / 10)

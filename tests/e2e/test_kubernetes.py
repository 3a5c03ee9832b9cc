"""The files in launch/kubernetes: they fit the published schemas, agree with each other, and what they run, runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import kubernetes_validate
import psutil
import pytest
import torch
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime
from training_job import END_TIMEOUT_S, ROOT, last_step, logged

FOLDER = ROOT / "launch" / "kubernetes"
OLDEST, NEWEST = "1.29", "1.37"
MODELS = {"TrainJob": TrainerV1alpha1TrainJob, "TrainingRuntime": TrainerV1alpha1TrainingRuntime}
PREEMPTED = 75
POLL_S = 0.05

Document = dict[str, Any]


def documents(name: str) -> dict[str, Document]:
    """Return what a file declares, by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((FOLDER / name).read_text())}


def job_of(name: str) -> Document:
    """Return the Job that a file declares, or that its JobSet makes."""
    found = documents(name)
    if "Job" in found:
        return found["Job"]
    [replicated] = found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "node"},
        "spec": replicated["template"]["spec"],
    }


def container_of(name: str) -> Document:
    """Return the container that trains; a TrainJob's words win over its runtime's, and the environments are merged."""
    [container] = job_of(name)["spec"]["template"]["spec"]["containers"]
    trainer = documents(name).get("TrainJob", {"spec": {"trainer": {}}})["spec"]["trainer"]
    return {**container, **trainer, "env": [*container["env"], *trainer.get("env", [])]}


def differences(document: Document) -> str | None:
    """Return what Kubeflow's own model of a document does not take, or does not know; None if that is nothing."""
    try:
        taken = MODELS[document["kind"]].from_dict(document)
    except ValueError as error:
        return str(error)
    return None if taken is not None and taken.to_dict() == document else f"{taken and taken.to_dict()} != {document}"


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_what_the_cluster_itself_knows_fits_its_schemas(version: str) -> None:
    for document in [*documents("job.yaml").values(), job_of("trainjob.yaml")]:
        kubernetes_validate.validate(document, version, strict=True)


def test_what_kubeflow_knows_fits_its_schemas() -> None:
    found = documents("trainjob.yaml")
    assert found.keys() == MODELS.keys()
    assert [differences(document) for document in found.values()] == [None, None]


def test_a_misspelt_key_is_seen() -> None:
    job = job_of("job.yaml")
    job["spec"]["podFailurePolicies"] = job["spec"].pop("podFailurePolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, NEWEST, strict=True)
    runtime = documents("trainjob.yaml")["TrainingRuntime"]
    runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicies"] = {}
    assert differences(runtime) is not None


@pytest.mark.parametrize("name", ["job.yaml", "trainjob.yaml"])
def test_the_ranks_are_told_the_grace_period_of_their_pod(name: str) -> None:
    grace_s = job_of(name)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert [one["value"] for one in container_of(name)["env"] if one["name"] == "STOP_S"] == [str(grace_s)]


def test_both_ways_treat_failures_the_same() -> None:
    keys = ("podFailurePolicy", "podReplacementPolicy", "backoffLimitPerIndex", "maxFailedIndexes")
    plain, kubeflow = (job_of(name)["spec"] for name in ("job.yaml", "trainjob.yaml"))
    assert {key: plain[key] for key in keys} == {key: kubeflow[key] for key in keys}
    assert plain["template"]["spec"]["restartPolicy"] == kubeflow["template"]["spec"]["restartPolicy"] == "Never"


def test_the_numbers_of_pods_agree() -> None:
    spec, environment = (
        job_of("job.yaml")["spec"],
        {one["name"]: one["value"] for one in container_of("job.yaml")["env"]},
    )
    assert spec["completions"] == spec["parallelism"] == int(environment["NNODES"])
    job, service = (documents("job.yaml")[kind]["metadata"]["name"] for kind in ("Job", "Service"))
    assert spec["template"]["spec"]["subdomain"] == service
    assert environment["HEAD"].startswith(f"{job}-0.{service}:")


def verdict(job: Document, exit_code: int) -> str:
    """Return what a Job's podFailurePolicy does about a pod that ended by itself with a code."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes is not None and codes["operator"] == "In" and exit_code in codes["values"]:
            return str(rule["action"])
    return "Count"


class Pod:
    """What a pod runs, as a process: the container's command with its arguments and environment.

    Args:
        name: The file.
        index: Which pod of the Job it is.
        environment: What the controllers would set, and what is another thing outside of a cluster.
        settings: Further arguments of train.py.
        log: Where its output goes.
    """

    def __init__(self, name: str, index: int, environment: dict[str, str], settings: list[str], log: Path) -> None:
        container = container_of(name)
        declared = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        here = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*container["command"], *container["args"], *settings],
                cwd=ROOT,
                env={**os.environ, **declared, **here, "JOB_COMPLETION_INDEX": str(index), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> int:
        return self.process.wait(END_TIMEOUT_S)

    def kill(self) -> None:
        family = []
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            family = [root, *root.children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Cluster:
    """The pods of a file, each of one rank, as its controllers would start them.

    Args:
        name: The file.
        folder: Where the run goes, and what the pods print.
        stack: Ends the pods.
    """

    def __init__(self, name: str, folder: Path, stack: ExitStack) -> None:
        self.name, self.folder, self.stack = name, folder, stack
        self.run = folder / "run"
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = str(one.getsockname()[1])
        self.environment = {"DIRECTORY": str(self.run)}
        if name == "job.yaml":
            self.environment |= {"HEAD": f"127.0.0.1:{port}", "NPROC_PER_NODE": "1"}
        else:
            self.environment |= {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}
            self.environment |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}

    def start(self, index: int) -> Pod:
        more = {} if self.name == "job.yaml" else {"PET_NODE_RANK": str(index)}
        settings = ["--train.epochs=16", "--train.log_every=1"]
        pod = Pod(self.name, index, self.environment | more, settings, self.folder / f"pod-{index}.txt")
        self.stack.callback(pod.kill)
        return pod

    def said(self) -> str:
        return "\n".join(log.read_text() for log in sorted(self.folder.glob("pod-*.txt")))

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + END_TIMEOUT_S
        while last_step(self.run) < step:
            assert time.monotonic() < deadline, self.said()
            time.sleep(POLL_S)


@pytest.mark.parametrize("name", ["job.yaml", pytest.param("trainjob.yaml", marks=pytest.mark.slow)])
def test_all_pods_start_again_where_the_first_is_evicted_and_that_is_no_failure(
    name: str, stack: ExitStack, tmp_path: Path
) -> None:
    cluster, job = Cluster(name, tmp_path, stack), job_of(name)
    pods = [cluster.start(1), cluster.start(0)]
    cluster.wait_for_step(30)
    pods[-1].process.send_signal(signal.SIGTERM)
    assert [pod.wait() for pod in pods] == [PREEMPTED, PREEMPTED], cluster.said()
    assert verdict(job, PREEMPTED) == "Ignore"
    grace_s = 120 if torch.__version__ >= "2.12" else 30  # before, torchrun did not let itself be told
    assert f"{grace_s:.1f} s left" in cluster.said()
    saved = last_step(cluster.run)
    pods = [cluster.start(1), cluster.start(0)]
    assert [pod.wait() for pod in pods] == [0, 0], cluster.said()
    assert_trained_once(cluster.run, more_than=saved)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["job.yaml", "trainjob.yaml"])
def test_the_other_pods_wait_for_the_one_that_replaces_an_evicted_one(
    name: str, stack: ExitStack, tmp_path: Path
) -> None:
    cluster = Cluster(name, tmp_path, stack)
    first, second = cluster.start(0), cluster.start(1)
    cluster.wait_for_step(30)
    second.process.send_signal(signal.SIGTERM)
    assert second.wait() == PREEMPTED, cluster.said()
    saved = last_step(cluster.run)
    assert [pod.wait() for pod in (cluster.start(1), first)] == [0, 0], cluster.said()
    assert_trained_once(cluster.run, more_than=saved)


def assert_trained_once(run: Path, *, more_than: int) -> None:
    steps = [line["step"] for line in logged(run) if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > more_than


@pytest.mark.parametrize("code", [1, 137])
def test_a_failure_counts(code: int) -> None:
    assert verdict(job_of("job.yaml"), code) == "Count"


def test_a_pod_whose_training_cannot_begin_ends_with_a_code_that_counts(stack: ExitStack, tmp_path: Path) -> None:
    environment = {"DIRECTORY": str(tmp_path / "run"), "NNODES": "1", "MAX_RESTARTS": "0", "NPROC_PER_NODE": "1"}
    pod = Pod("job.yaml", 0, environment, ["--train.epochs=wrong"], tmp_path / "pod.txt")
    stack.callback(pod.kill)
    assert pod.wait() == 1
    assert "pod.sh: unknown, newest checkpoint: step none" in pod.log.read_text()

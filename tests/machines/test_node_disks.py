"""Machines without a shared disk: what could not be restored is not saved; and whose dead owner a machine knows."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from elastic_job import ROOT
from machines import Room, why_not

JOB = Path(__file__).parent / "two_hosts_job.py"

pytestmark = [pytest.mark.netns, pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """Run all cases once on two machines; return the folder and what each rank says."""
    folder = tmp_path_factory.mktemp("machines")
    shared = folder / "shared"
    shared.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with Room(folder, num_machines=2) as room:
        arguments = ["node-0:29600", str(shared), str(room.scratch)]
        ranks = [
            machine.start(
                [sys.executable, str(JOB), str(machine.number), *arguments],
                log=folder / f"{machine.name}.txt",
                env=env,
                cwd=ROOT,
            )
            for machine in room.machines
        ]
        codes = [rank.wait(280) for rank in ranks]
    said = [(folder / f"node-{number}.txt").read_text() for number in range(2)]
    assert codes == [0, 0], "\n".join(said)
    return folder, [json.loads(text.splitlines()[-1]) for text in said]


def on_own_disks(found: tuple[Path, list[dict[str, str]]]) -> dict[str, tuple[str, ...]]:
    first, second = found[1]
    return {name: (first[name], second[name]) for name in first if name.startswith("own/")}


def test_a_directory_that_is_another_one_on_each_machine_is_refused_on_all_ranks(
    found: tuple[Path, list[dict[str, str]]],
) -> None:
    refused = on_own_disks(found)
    assert len(refused) == 5
    for name, words in refused.items():
        for said in words:
            assert said.startswith("ConfigError: directory: "), name
            assert (
                "is not one directory for all ranks: host node-1 does not see what rank 0 (host node-0) writes" in said
            )
            assert str(found[0] / "scratch") in said
            assert "\nFix: give a directory that every host sees: shared storage, or a URL such as s3://" in said


def test_what_was_refused_has_left_no_checkpoint_and_no_mark(found: tuple[Path, list[dict[str, str]]]) -> None:
    for machine in ("node-0", "node-1"):
        left = [path.name for path in (found[0] / machine).rglob("*") if path.is_file()]
        assert [name for name in left if not name.endswith(".json") or name == "manifest.json"] == []


def test_a_shared_directory_takes_saves_of_any_kind(found: tuple[Path, list[dict[str, str]]]) -> None:
    folder, (first, second) = found
    names = [name for name in first if name.startswith("shared/save")]
    assert len(names) == 4
    assert {first[name] for name in names} == {second[name] for name in names} == {"done"}
    assert len(list((folder / "shared").rglob("manifest.json"))) == 5
    assert not list((folder / "shared").rglob("seen-*"))


def test_the_lease_of_an_owner_that_died_on_another_machine_of_the_job_is_taken_at_once(
    found: tuple[Path, list[dict[str, str]]],
) -> None:
    """It had said that it would be back within 3,000 s, fifty times longer than ranks wait here."""
    assert [said["shared/take_over"] for said in found[1]] == ["done", "done"]

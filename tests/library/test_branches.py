"""A branch goes on from an older checkpoint, and everything that came after that stays as it is."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jobs
import pytest

import distckpt
from distckpt import CheckpointManager, catalog
from distckpt.errors import (
    CheckpointDamagedError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigError,
    UsageError,
)
from distckpt.storage import open_storage


def steps_in(directory: Path | str) -> list[int]:
    return [checkpoint.step for checkpoint in CheckpointManager(directory).checkpoints]


def go_on(directory: Path | str, *, until: int, every: int = 10, **options: Any) -> list[int]:
    """Train until a step, with a save each `every`; return the steps that were done."""
    state = jobs.build()
    with CheckpointManager(directory, every=every, **{"keep": 9, **options}) as ckpt:
        return [step for step in ckpt.steps(state, until=until) if jobs.train(state, 1) is None]


@pytest.fixture(scope="module")
def made_trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trunk") / "run"
    go_on(directory, until=40)
    return directory


@pytest.fixture
def trunk(made_trunk: Path, tmp_path: Path) -> Path:
    """Give a run with the checkpoints 10, 20, 30 and 40."""
    return Path(shutil.copytree(made_trunk, tmp_path / "run"))


def files_of(trunk: Path) -> dict[str, bytes]:
    names = [path for path in trunk.rglob("*") if path.is_file() and "branches" not in path.parts]
    return {str(path.relative_to(trunk)): path.read_bytes() for path in names}


def test_a_branch_goes_on_from_the_older_step_and_the_run_stays_as_it_is(trunk: Path):
    before = files_of(trunk)
    assert go_on(trunk, at=20, branch="wide", until=50) == [*range(21, 51)]
    assert files_of(trunk) == before
    assert steps_in(trunk) == [10, 20, 30, 40]
    assert steps_in(trunk / "branches/wide") == [30, 40, 50]


def test_a_branch_loads_just_what_the_run_had_at_that_step(trunk: Path):
    wanted, state = jobs.build(), jobs.build(seed=1)
    distckpt.load(trunk / "step-000000000020", wanted)
    with CheckpointManager(trunk, at=20, branch="wide") as ckpt:
        assert ckpt.restore(state) == 20
    jobs.seeded(3)
    assert repr(jobs.facts(state)) == repr(jobs.facts(wanted))


def test_a_restart_with_the_same_options_or_without_the_step_goes_on_in_the_branch(trunk: Path):
    go_on(trunk, at=20, branch="wide", until=35)
    assert go_on(trunk, at=20, branch="wide", until=40) == [*range(36, 41)]
    assert go_on(trunk, branch="wide", until=45) == [*range(41, 46)]
    assert go_on(trunk / "branches/wide", until=50) == [*range(46, 51)], "its directory is a run's like any other"


def test_a_branch_that_was_stopped_before_its_first_save_begins_again(trunk: Path):
    for directory, options in ((trunk, {"at": 20}), (trunk, {}), (trunk / "branches/wide", {"branch": None})):
        with CheckpointManager(directory, every=10, **{"branch": "wide", **options}) as ckpt:
            assert ckpt.restore(jobs.build()) == 20
            assert ckpt.latest is not None
            assert ckpt.latest.path == str(trunk / "step-000000000020")


def test_lineage_stands_in_the_manifests(trunk: Path):
    go_on(trunk, at=20, branch="wide", until=40)
    origin = catalog.read_manifest(open_storage(trunk), "step-000000000020")
    first, second = CheckpointManager(trunk / "branches/wide").checkpoints
    assert first.parent == {"step": 20, "attempt": origin.attempt}
    assert second.parent == {"step": 30, "attempt": first.attempt}
    assert first.run == origin.run
    (mark,) = (trunk / "branches/wide").glob("from-*")
    assert mark.name == "from-step-000000000020.json"
    assert {"format": 1, "step": 20, "attempt": origin.attempt}.items() <= json.loads(mark.read_text()).items()


def test_the_run_keeps_what_a_branch_went_off_from_for_as_long_as_the_branch_is_there(trunk: Path):
    go_on(trunk, at=20, branch="wide", until=30)
    go_on(trunk, keep=1, until=50)
    assert steps_in(trunk) == [20, 40, 50], "the newest, the one that it resumed from, and the branch's origin"
    shutil.rmtree(trunk / "branches")
    go_on(trunk, keep=1, until=60)
    assert steps_in(trunk) == [50, 60]


def test_a_branch_has_a_retention_and_an_owner_of_its_own(trunk: Path):
    state = jobs.build()
    with CheckpointManager(trunk, every=10, keep=9) as of_run:
        assert of_run.restore(state) == 40
        go_on(trunk, at=20, branch="wide", keep=1, until=60)
        of_run.save(41, state)
    assert steps_in(trunk) == [10, 20, 30, 40, 41]
    assert steps_in(trunk / "branches/wide") == [60]


def test_a_branch_of_a_branch_is_one_more(trunk: Path):
    go_on(trunk, at=20, branch="wide", until=40)
    assert go_on(trunk / "branches/wide", at=30, branch="wider", until=50) == [*range(31, 51)]
    assert steps_in(trunk / "branches/wide/branches/wider") == [40, 50]
    go_on(trunk / "branches/wide", keep=1, until=60)
    assert 30 in steps_in(trunk / "branches/wide")


def test_if_all_of_a_branch_is_damaged_it_begins_again_and_its_origin_is_not_put_aside(trunk: Path, caplog: Any):
    go_on(trunk, at=20, branch="wide", until=30)
    (data,) = (trunk / "branches/wide/step-000000000030").glob("*/*.safetensors")
    body = bytearray(data.read_bytes())
    body[-5000] ^= 1
    data.write_bytes(body)
    with caplog.at_level(logging.WARNING):
        assert go_on(trunk, branch="wide", until=40) == [*range(21, 41)]
    assert "the next older one is taken" in caplog.text
    (data,) = (trunk / "step-000000000020").glob("*/*.safetensors")
    data.write_bytes(bytes(len(data.read_bytes())))
    shutil.rmtree(trunk / "branches")
    with pytest.raises(CheckpointDamagedError):
        go_on(trunk, at=20, branch="deep", until=30)
    assert (trunk / "step-000000000020/manifest.json").exists(), "a branch changes nothing of the run"


def test_a_named_step_of_a_branch_may_be_its_origin(trunk: Path):
    go_on(trunk, at=20, branch="wide", until=40)
    with CheckpointManager(trunk, branch="wide") as ckpt:
        assert [ckpt.restore(jobs.build(), step=step) for step in (20, 30, 40)] == [20, 30, 40]
        with pytest.raises(CheckpointNotFoundError, match="of step 10 there is none; committed are 30, 40"):
            ckpt.restore(jobs.build(), step=10)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"at": 25, "branch": "new"},
            CheckpointNotFoundError,
            "of step 25 there is none; committed are 10, 20, 30, 40",
        ),
        (
            {"branch": "new"},
            ConfigError,
            "has no branch 'new'; it has wide\nFix: say where it begins: at=STEP",
        ),
        ({"at": 30, "branch": "wide"}, ConfigError, "branch 'wide' of .* went off from step 20, not 30"),
    ],
)
def test_what_cannot_be_branched_is_one_clear_error_and_makes_nothing(
    trunk: Path, options: dict[str, Any], error: type[Exception], words: str
):
    go_on(trunk, at=20, branch="wide", until=30)
    with CheckpointManager(trunk, **options) as ckpt, pytest.raises(error, match=words):
        ckpt.restore(jobs.build())
    assert sorted(path.name for path in (trunk / "branches").iterdir()) == ["wide"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"at": 20},
            "what goes on from it needs a name of its own\nFix: at=20, branch=",
        ),
        ({"at": -1, "branch": "a"}, "at: must be a step, from 0 on, is -1"),
        ({"at": True, "branch": "a"}, "at: must be a step"),
        ({"at": 20, "branch": "../up"}, "branch: must be letters"),
        ({"at": 20, "branch": ""}, "branch: must be letters"),
        ({"at": 20, "branch": "step-000000000001"}, "branch: must be letters"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(trunk: Path, options: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        CheckpointManager(trunk, **options)


def test_a_branch_is_not_saved_before_something_was_restored(trunk: Path):
    state = jobs.build()
    with CheckpointManager(trunk, at=20, branch="wide") as ckpt:
        with pytest.raises(UsageError, match="nothing was restored"):
            ckpt.save(21, state)
        assert not (trunk / "branches").exists()
        assert ckpt.restore(state) == 20
        ckpt.save(21, state)
    assert steps_in(trunk / "branches/wide") == [21]


def test_an_origin_that_was_replaced_or_is_gone_is_not_taken_for_it(trunk: Path):
    with CheckpointManager(trunk, at=20, branch="wide") as ckpt:
        ckpt.restore(jobs.build())
    shutil.rmtree(trunk / "step-000000000020")
    with pytest.raises(CheckpointNotFoundError, match="a branch went off from it, and it is gone"):
        go_on(trunk, branch="wide", until=30)
    with CheckpointManager(trunk) as ckpt:
        ckpt.save(20, jobs.build())
    with pytest.raises(CheckpointNotFoundError, match="the branch went off from attempt"):
        go_on(trunk, branch="wide", until=30)


def test_going_on_from_an_older_step_without_a_branch_is_warned_of_and_names_the_way(trunk: Path, caplog: Any):
    state = jobs.build()
    with caplog.at_level(logging.WARNING), CheckpointManager(trunk, every=10, background=False) as ckpt:
        ckpt.restore(state, step=20)
        assert "goes up to step 40: a restart takes that one" in caplog.text
        assert f"CheckpointManager({str(trunk)!r}, at=20, branch=" in caplog.text
        jobs.train(state, 1)
        ckpt.save(25, state)
        with pytest.raises(CheckpointExistsError, match=r"Fix: go on from there in a branch.*at=25, branch="):
            ckpt.save(30, state)


def test_a_directory_that_only_looks_like_a_branch_is_a_run(tmp_path: Path):
    assert go_on(tmp_path / "branches/mine", until=10) == [*range(1, 11)]


def test_a_branch_on_s3(trunk: Path, s3_bucket: str):
    from distckpt.transfer import Place, copy

    url = f"s3://{s3_bucket}/run"
    folder = "step-000000000020"
    copy(Place(storage=open_storage(trunk), folder=folder), Place(storage=open_storage(url), folder=folder))
    assert go_on(url, at=20, branch="wide", until=30) == [*range(21, 31)]
    assert go_on(url, branch="wide", until=31) == [31]
    assert steps_in(f"{url}/branches/wide") == [30, 31]


def branch_off(directory: str) -> tuple[int, int, str]:
    state = jobs.build()
    with CheckpointManager(directory, at=20, branch="wide", every=5) as ckpt:
        first = ckpt.restore(state)
        jobs.train(state, 1)
        ckpt.save(25, state)
    with CheckpointManager(directory, branch="wide", every=5) as ckpt:
        again = ckpt.restore(state)
    with CheckpointManager(directory, at=20, branch="none", every=5) as ckpt:
        try:
            CheckpointManager(directory, branch="no", every=5).restore(state)
        except ConfigError as error:
            return first, again, type(error).__name__
    return first, again, ""


def test_all_ranks_branch_off_together(trunk: Path, ranks: Any):
    assert ranks(2).run(branch_off, str(trunk)) == [(20, 25, "ConfigError")] * 2

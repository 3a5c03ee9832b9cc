"""What local disk adds to the contract: durability by system calls, links, full and read-only disks, crashes."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from distckpt.errors import StorageError
from distckpt.storage import LocalStorage
from distckpt.storage.exclusive import _rename_exclusively, name_exclusively


def run_as_root(*command: str) -> None:
    """Run a command that needs rights, or skip the test, visibly, where they are missing."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    if result.returncode != 0:
        pytest.skip(f"{' '.join(command)}: {result.stderr.strip()}")


@contextmanager
def mounted_tmpfs(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    run_as_root("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


# --- failures ---


def test_full_disk_is_told_with_path_and_free_space_and_leaves_nothing(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "small", "size=1m") as folder:
        storage = LocalStorage(folder / "run")
        with pytest.raises(StorageError) as caught:
            storage.put("step-1/a/f", [bytes(600_000)] * 3)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.path == str(folder / "run/step-1/a/f")
        assert re.search(r"No space left on device after [\d,]+ bytes .*; [\d,]+ bytes are free", str(caught.value))
        assert f"Fix: free space or raise the quota there (df -h {folder}" in str(caught.value)
        assert storage.list() == []

        storage.put("step-1/a/f", [bytes(900_000)])
        with pytest.raises(StorageError, match="No space left"):
            storage.publish("step-1/m.json", bytes(300_000))
        assert [info.name for info in storage.list()] == ["step-1/a/f"]
        storage.publish("step-1/m.json", b"{}")  # what failed before is in nobody's way


def test_read_only_file_system_is_told(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "ro", "size=1m") as folder:
        LocalStorage(folder).put("a/f", [b"1"])
        run_as_root("mount", "-o", "remount,ro", str(folder))
        storage = LocalStorage(folder)
        assert storage.read_all("a/f", limit_bytes=10) == b"1"
        for verb in (
            lambda: storage.put("g", [b"1"]),
            lambda: storage.publish("g", b"1"),
            lambda: storage.delete(["a/f"]),
        ):
            with pytest.raises(StorageError, match="Read-only file system\nFix: remount") as caught:
                verb()
            assert caught.value.errno == errno.EROFS


def test_folder_without_the_right_to_write_is_told(tmp_path: Path) -> None:
    run_as_root("chattr", "+i", str(tmp_path))  # binds root too
    try:
        with pytest.raises(
            StorageError, match=r"could not write '.*': Operation not permitted\nFix: give user id"
        ) as caught:
            LocalStorage(tmp_path / "run").put("f", [b"1"])
        assert caught.value.errno == errno.EPERM
    finally:
        subprocess.run(["chattr", "-i", str(tmp_path)], check=True, timeout=30)


def test_file_in_the_place_of_the_root_is_told_by_every_verb(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"a file")
    storage = LocalStorage(tmp_path / "run")
    for verb in (
        lambda: storage.put("f", [b"1"]),
        lambda: storage.publish("f", b"1"),
        storage.list,
        lambda: storage.sync(["f"]),
        lambda: storage.delete(["f"]),
        lambda: storage.read_all("f", limit_bytes=1),
        lambda: storage.read("f", 0, memoryview(bytearray(1))),
    ):
        with pytest.raises(StorageError, match="Not a directory\nFix: "):
            verb()
    assert (tmp_path / "run").read_bytes() == b"a file"


def test_put_never_replaces_a_file(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("f", [b"old"])
    with pytest.raises(StorageError, match="File exists") as caught:
        storage.put("f", [b"new"])
    assert caught.value.errno == errno.EEXIST
    assert storage.read_all("f", limit_bytes=10) == b"old"


def test_a_file_that_cannot_be_deleted_keeps_those_after_it(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for name in ["s/m.json", "s/a/folder/f", "s/b/f"]:
        storage.put(name, [b"1"])
    with pytest.raises(StorageError, match=r"could not delete '.*/s/a/folder'"):
        storage.delete(["s/m.json", "s/a/folder", "s/b/f"])
    assert [info.name for info in storage.list()] == ["s/a/folder/f", "s/b/f"]


def test_delete_removes_emptied_folders_but_never_the_root(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "run")
    storage.put("s/a/b/f", [b"1"])
    storage.put("s/c/f", [b"1"])
    storage.delete(["s/a/b/f"])
    assert sorted(path.name for path in (tmp_path / "run/s").iterdir()) == ["c"]
    storage.delete(["s/c/f"])
    assert list((tmp_path / "run").iterdir()) == []


def test_writing_and_deleting_in_the_same_folders_do_not_disturb_each_other(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    is_done = threading.Event()

    def remove_empty_folders() -> None:
        while not is_done.is_set():
            storage.delete(["s/a/b/missing"])

    with ThreadPoolExecutor(2) as pool:
        removing = [pool.submit(remove_empty_folders) for _ in range(2)]
        try:
            for number in range(150):
                storage.put(f"s/a/b/f-{number}", [b"1"])
                storage.delete([f"s/a/b/f-{number}"])
        finally:
            is_done.set()
        for removed in removing:
            removed.result(30)
    assert storage.list() == []


# --- links and other strange files ---


def test_links_below_the_root_are_never_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "f").write_bytes(b"secret")
    storage = LocalStorage(tmp_path / "run")
    storage.put("s/a/f", [b"1"])
    (tmp_path / "run/s/link").symlink_to(secret / "f")
    (tmp_path / "run/s/folder").symlink_to(secret)
    (tmp_path / "run/step-000000000007").symlink_to(secret)

    for name in ["s/link", "s/folder/f"]:
        with pytest.raises(StorageError):
            storage.read_all(name, limit_bytes=10)
        with pytest.raises(StorageError):
            storage.read(name, 0, memoryview(bytearray(1)))
    for name in ["s/folder/new", "s/link"]:
        with pytest.raises(StorageError):
            storage.put(name, [b"1"])
    with pytest.raises(FileExistsError):
        storage.publish("s/link", b"secret")
    with pytest.raises(StorageError):
        storage.publish("s/folder/m.json", b"1")
    with pytest.raises(StorageError):
        storage.delete(["s/folder/f"])
    assert [info.name for info in storage.list()] == ["s/a/f"]
    assert "step-000000000007 is a symbolic link and is left out" in caplog.text
    storage.delete(["s/link"])  # removes the link, not what it points to
    assert [path.name for path in secret.iterdir()] == ["f"]
    assert (secret / "f").read_bytes() == b"secret"


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    storage = LocalStorage(tmp_path / "run")
    storage.publish("a/m.json", b"1")
    assert storage.read_all("a/m.json", limit_bytes=10) == b"1"


def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    storage = LocalStorage(tmp_path)
    assert storage.list() == []
    with pytest.raises(StorageError, match="not a regular file"):
        storage.read_all("pipe", limit_bytes=10)


def test_the_root_is_fixed_when_the_storage_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    storage.put("f", [b"1"])
    assert (tmp_path / "run/f").read_bytes() == b"1"
    assert storage.url == str(tmp_path / "run")


# --- publishing on file systems with fewer calls ---


@pytest.mark.parametrize("give_name", [name_exclusively, _rename_exclusively])
def test_a_name_is_given_once(tmp_path: Path, give_name: object) -> None:
    assert callable(give_name)
    (tmp_path / "one.tmp").write_bytes(b"1")
    (tmp_path / "two.tmp").write_bytes(b"2")
    folder_fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert give_name("one.tmp", "final", folder_fd) is True
        with pytest.raises(FileExistsError):
            give_name("two.tmp", "final", folder_fd)
        with pytest.raises(FileNotFoundError):
            give_name("missing.tmp", "other", folder_fd)
    finally:
        os.close(folder_fd)
    assert (tmp_path / "final").read_bytes() == b"1"


# --- crashes ---

KILLED_WHILE_PUBLISHING = """
import os, sys
from distckpt.storage import LocalStorage, local
local.name_exclusively = lambda *_: os._exit(9)
LocalStorage(sys.argv[1]).publish("s/m.json", b"{}")
"""


def test_a_killed_publish_shows_nothing_but_a_temporary_file_that_can_be_deleted(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", KILLED_WHILE_PUBLISHING, str(tmp_path)], check=False, timeout=60)
    assert result.returncode == 9
    storage = LocalStorage(tmp_path)
    (left,) = storage.list()
    assert left.name.startswith("s/m.json.")
    assert left.name.endswith(".tmp")
    storage.publish("s/m.json", b"[]")
    storage.delete([left.name])
    assert [info.name for info in storage.list()] == ["s/m.json"]


TRACED = """
import sys
from distckpt.storage import LocalStorage
storage = LocalStorage(sys.argv[1])
storage.put("s/a/rank-0", [b"0123", memoryview(b"45")])
storage.sync(["s/a/rank-0"])
storage.publish("s/m.json", b"{}")
storage.delete(["s/m.json", "s/a/rank-0"])
"""
CALL = re.compile(r"\d+ +(?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>\S+)")


def traced_steps(trace: str, base: Path) -> list[str]:
    """Turn a trace into steps such as "sync run/s" and "link run/s/m.json", in order."""
    steps = []
    for line in trace.splitlines():
        match = CALL.match(line)
        if match is None or match["result"].startswith("-1"):
            continue
        paths = re.findall(r"<([^<>]*)>", match["arguments"])
        texts = re.findall(r'"([^"]*)"', match["arguments"])
        folder = Path(paths[0]) if paths else base
        if match["call"] in {"write", "fsync"}:
            step = f"{match['call']} {os.path.relpath(folder, base)}"
        else:
            step = f"{match['call']} {os.path.relpath(folder / texts[-1], base)}"
        steps.append(re.sub(r"\.[0-9a-f]{16}\.tmp", ".tmp", step))
    return [step for step in steps if not step.startswith("write ../../..")]


def test_every_acknowledgement_comes_after_the_syncs_that_it_needs(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    base = tmp_path / "base"
    base.mkdir()
    trace = tmp_path / "trace"
    calls = "trace=write,fsync,linkat,unlinkat,mkdir,mkdirat,rename,renameat2"
    command = ["strace", "-f", "-y", "-o", str(trace), "-e", calls, sys.executable, "-c", TRACED, str(base / "new/run")]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if "ptrace" in result.stderr:
        pytest.skip(f"strace may not trace here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    steps = [step for step in traced_steps(trace.read_text(), base) if "__pycache__" not in step]
    own = [step for step in steps if "new" in step or step == "fsync ."]
    assert own == [
        "mkdir new",
        "mkdir new/run",
        "mkdirat new/run/s",
        "mkdirat new/run/s/a",
        "write new/run/s/a/rank-0",
        "write new/run/s/a/rank-0",
        "fsync new/run/s/a/rank-0",  # put's answer: the bytes
        "fsync new/run/s/a",
        "fsync new/run/s",
        "fsync new/run",
        "fsync new",
        "fsync .",  # sync's answer: every entry on the way, also above the root, which was made here
        "write new/run/s/m.json.tmp",
        "fsync new/run/s/m.json.tmp",
        "linkat new/run/s/m.json",
        "unlinkat new/run/s/m.json.tmp",
        "fsync new/run/s",
        "fsync new/run",  # publish's answer
        "unlinkat new/run/s/m.json",
        "fsync new/run/s",  # the manifest is durably gone ...
        "unlinkat new/run/s/a/rank-0",  # ... before its data files
        "fsync new/run/s/a",
        "unlinkat new/run/s/a",
        "unlinkat new/run/s",
    ]

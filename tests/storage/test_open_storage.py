"""From paths and URLs to storages."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distckpt.errors import ConfigError, DependencyError
from distckpt.storage import LocalStorage, ObjectStorage, open_storage


def test_paths_and_file_urls_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cases: list[tuple[str | Path, Path]] = [
        (tmp_path / "run", tmp_path / "run"),
        (str(tmp_path / "run"), tmp_path / "run"),
        (f"file://{tmp_path}/run", tmp_path / "run"),
        ("runs/run", tmp_path / "runs/run"),
        ("~/run", tmp_path / "home/run"),
        (Path("~/run"), tmp_path / "home/run"),
        ("a:b", tmp_path / "a:b"),
    ]
    for directory, url in cases:
        storage = open_storage(directory)
        assert isinstance(storage, LocalStorage)
        assert storage.url == str(url)
    assert list(tmp_path.iterdir()) == []  # nothing is made before it is needed


@pytest.mark.parametrize(
    ("directory", "url"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("s3://bucket/run/", "s3://bucket/run"),
        ("S3://Bucket/Run", "s3://Bucket/Run"),
        ("s3://bucket", "s3://bucket"),
        ("s3a://bucket/a/b", "s3a://bucket/a/b"),
        ("memory://run", "memory://run"),
    ],
)
def test_urls_are_object_storages_and_nothing_is_connected_to(
    directory: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    storage = open_storage(directory)
    assert isinstance(storage, ObjectStorage)
    assert storage.url == url


@pytest.mark.parametrize(
    ("directory", "options", "message"),
    [
        ("", None, "neither a path nor a URL"),
        ("  ", None, "neither a path nor a URL"),
        (b"bytes", None, "neither a path nor a URL"),
        ("s4://bucket/run", None, "unknown scheme 's4'; did you mean 's3'"),
        ("nonsense://bucket/run", None, "unknown scheme 'nonsense'.*\nFix: "),
        (Path("s3://bucket/run"), None, "lost a slash.*\nFix: give it as a string: 's3://bucket/run'"),
        ("s3://", None, "names no place"),
        ("simplecache::s3://bucket/run", None, "neither a path nor a URL of one"),
        ("s3://key:secret@bucket/run", None, "'s3://bucket/run' was given with a login.*\nFix: set AWS_ACCESS_KEY_ID"),
        ("/tmp/run", {"key": "value"}, "'/tmp/run' is a local path, which takes none; given: key\nFix: "),
        ("s3://bucket/run", {"key": "a", "username": "b"}, "not both"),
    ],
)
def test_what_means_no_directory_is_refused(directory: Any, options: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_storage(directory, storage_options=options)
    assert "secret@" not in str(caught.value)


def test_missing_package_names_the_pip_line() -> None:
    script = """
import sys
sys.modules["s3fs"] = None
from distckpt.errors import DependencyError
from distckpt.storage import open_storage
try:
    open_storage("s3://bucket/run")
except DependencyError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == [
        "the directory 's3://bucket/run' needs the package 's3fs', which is not installed",
        "Fix: pip install s3fs",
    ]


def test_login_in_a_url_is_used_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    storage = open_storage("http://user:pass-word@127.0.0.1:1/run")
    assert storage.url == "http://127.0.0.1:1/run"
    assert "pass-word" not in repr(storage)


def test_a_scheme_whose_package_is_not_installed_is_told() -> None:
    if importlib.util.find_spec("gcsfs") is not None:
        pytest.skip("gcsfs is installed")
    with pytest.raises(DependencyError, match="pip install gcsfs"):
        open_storage("gs://bucket/run")


def test_importing_the_storages_imports_no_torch_and_no_client() -> None:
    script = "import sys, distckpt.storage; print([m for m in ('torch', 's3fs', 'botocore') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]"

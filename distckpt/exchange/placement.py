"""Where an export goes: under a temporary name first, and in its place when it is whole and durable.

Invariant: what exists is never replaced, and a name that appears is complete.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distckpt.errors import ConfigError, StorageError
from distckpt.storage.exclusive import name_exclusively

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def local_target(text: str) -> Path:
    """Return the path that a user names.

    Raises:
        ConfigError: It is a URL; other tools' formats are written to local paths.
        StorageError: Something of that name exists.

    Ranks: any.
    """
    if "://" in text:
        raise ConfigError(
            source="DST", problem=f"{text!r} is no local path", fix="export to a local path, and upload it"
        )
    path = Path(text).expanduser().absolute()
    if path.is_symlink() or path.exists():
        raise _exists(path)
    return path


@contextmanager
def placed(path: Path, *, folder: bool) -> Iterator[Path]:
    """Give a temporary name beside `path`, and when the block ends well, make it durable and give it its name.

    Args:
        path: The final name; missing folders above it are made.
        folder: Whether it is to be a folder, which is then made; else the block makes a file.

    Raises:
        StorageError: It could not be written, or the name was taken meanwhile.

    Ranks: any.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            temporary.mkdir()
        yield temporary
        for inner in sorted(temporary.rglob("*"), reverse=True) if folder else ():
            _sync(inner)
        _sync(temporary)
        parent_fd = os.open(path.parent, _FOLDER)
        try:
            name_exclusively(temporary.name, path.name, parent_fd)
            if not folder:
                temporary.unlink(missing_ok=True)  # the file has two names now
            os.fsync(parent_fd)
        finally:
            os.close(parent_fd)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        cause = error.strerror or str(error)
        raise StorageError(path=str(path), action="export to", cause=cause, errno=error.errno) from error
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exists(path: Path) -> StorageError:
    return StorageError(
        path=str(path),
        action="export to",
        cause="it exists already, and nothing is overwritten",
        errno=errno.EEXIST,
        fix="give another name, or remove it first",
    )

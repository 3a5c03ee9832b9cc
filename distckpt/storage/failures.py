"""What storages raise: errors of the system, of servers and of their clients, told as `StorageError`.

Invariant: no text that leaves this module holds a credential.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distckpt.errors import StorageError
from distckpt.storage.room import mount_point, room_at

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_PERMISSION = {errno.EACCES, errno.EPERM}

_UNREACHABLE = {
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ConnectionRefusedError",
    "EndpointConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "ProxyConnectionError",
    "ReadTimeoutError",
    "SSLError",
    "gaierror",
}
_NO_CREDENTIALS = {
    "CredentialRetrievalError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
STALE_CREDENTIALS = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired"}
_BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthorizationHeaderMalformed"}

CREDENTIALS_FIX = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
    "or pass storage_options={'key': ..., 'secret': ...}"
)

_URL_LOGIN = re.compile(r"://[^/@\s]*@")


@contextmanager
def telling(action: str, path: str, *, absent_is_builtin: bool = False) -> Iterator[None]:
    """Turn an `OSError` of the block into a `StorageError` about `path`.

    `absent_is_builtin` leaves "no such file" a `FileNotFoundError`, with the full path in it.
    """
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        if absent_is_builtin:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        raise local_error(error, action=action, path=path) from error
    except OSError as error:
        raise local_error(error, action=action, path=path) from error


def local_error(
    error: OSError, *, action: str, path: str, num_written: int | None = None, num_bytes: int | None = None
) -> StorageError:
    """Return the `StorageError` for a system call on a local file that failed.

    Args:
        error: What the system said.
        action: What was tried, as a verb.
        path: On what.
        num_written: How many bytes of the file had been written.
        num_bytes: How many it was to have.
    """
    cause = error.strerror or str(error) or type(error).__name__
    fix = None
    if is_full(error):
        cause, fix = _told_full(cause, path, num_written, num_bytes)
    elif error.errno in _NO_PERMISSION:
        fix = f"give user id {os.geteuid()} the right to {action} there (ls -ld shows who has it)"
    elif error.errno == errno.EROFS:
        fix = "remount that file system for writing, or use another directory"
    elif error.errno == errno.ENOTDIR:
        fix = "a file or a link stands where a folder is needed: move it away, or use another directory"
    elif error.errno == errno.ELOOP:
        cause = f"{cause}; links inside a directory of checkpoints are not followed"
        fix = "put the file itself in the link's place, or give the directory that the link points into"
    return StorageError(path=path, action=action, cause=cause, errno=error.errno, fix=fix)


def is_full(error: BaseException) -> bool:
    """Say whether a call was refused because a disk or a quota is full: then it has not happened, and never will."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def _told_full(cause: str, path: str, num_written: int | None, num_bytes: int | None) -> tuple[str, str]:
    """Return the cause with what was written and what is left, and what to do about it."""
    if num_written is not None:
        wanted = "" if num_bytes is None else f" of {num_bytes:,}"
        cause += f" after {num_written:,}{wanted} bytes of this file"
    room = room_at(Path(path).parent)
    if room is None:
        folder = str(Path(path).parent)
    else:
        folder = mount_point(room.folder)
        cause += f"; {room.num_bytes:,} bytes are free for this user on the file system of {folder!r}"
        cause += "" if room.takes_files else ", but it takes no more files"
    fix = f"free space or raise the quota there (df -h {folder}), keep fewer checkpoints, or use another directory"
    return cause, fix


def remote_error(
    error: BaseException,
    *,
    action: str,
    path: str,
    secrets: frozenset[str] = frozenset(),
    is_final: bool = False,
) -> StorageError:
    """Return the `StorageError` for a call to a server that failed.

    Args:
        error: What the client raised.
        action: What was tried, as a verb.
        path: On what.
        secrets: Texts that are blotted out.
        is_final: Whether to say that trying again would not help.
    """
    if isinstance(error, StorageError):
        return error
    code = server_code(error)
    names = {type(link).__name__ for link in chain(error)}
    fix = _remote_fix(error, code, names, action=action, path=path)
    cause = redacted(_words(error, code), secrets) + (", which no retry mends" if is_final else "")
    number = _number(error, code)
    return StorageError(path=path, action=action, cause=cause, errno=number, fix=fix)


def server_code(error: BaseException) -> str | None:
    """Return the server's own error code, such as "NoSuchBucket" or "412"; None if no server answered."""
    for link in chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", "")) or None
    return None


def server_status(error: BaseException) -> int | None:
    """Return the HTTP status that a server answered with, such as 503; None if no server answered."""
    for link in chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status if isinstance(status, int) else None
    return None


def is_unreachable(error: BaseException) -> bool:
    """Say whether the server was not reached at all, or did not answer."""
    return server_code(error) is None and any(type(link).__name__ in _UNREACHABLE for link in chain(error))


def redacted(text: str, secrets: frozenset[str] = frozenset()) -> str:
    """Return `text` without `secrets` and without logins in URLs."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return _URL_LOGIN.sub("://", text)


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it came from, one after another."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _words(error: BaseException, code: str | None) -> str:
    """Return the server's words with their code, or the client's with the error's type, on one line."""
    words = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno is not None and len(error.args) > 1:
        words = " ".join(str(error.args[1]).split())  # without "[Errno 22]"
    if words in ("", "None"):
        words = code or type(error).__name__
    if code is not None:
        return words if code in words else f"{words} ({code})"
    return words if isinstance(error, OSError) else f"{type(error).__name__}: {words}"


def _number(error: BaseException, code: str | None) -> int | None:
    if isinstance(error, PermissionError):
        return errno.EACCES
    if isinstance(error, FileNotFoundError) or code == "NoSuchBucket":
        return errno.ENOENT
    return error.errno if isinstance(error, OSError) else None


def _remote_fix(error: BaseException, code: str | None, names: set[str], *, action: str, path: str) -> str | None:
    if names & _NO_CREDENTIALS:
        return CREDENTIALS_FIX
    if code in STALE_CREDENTIALS:
        return "renew the session's credentials, they have expired; what is committed is safe"
    if code in _BAD_CREDENTIALS:
        return "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the key and secret in storage_options"
    if isinstance(error, PermissionError):
        rights = "s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject"
        return f"grant these credentials the right to {action} {path} ({rights})"
    if code == "NoSuchBucket":
        return "create the bucket, or correct its name in the URL"
    if code in {"SlowDown", "ServiceUnavailable", "503"}:
        return "the server is overloaded or down: try again later, or save less often"
    if is_unreachable(error):
        return "check that AWS_ENDPOINT_URL, or endpoint_url in storage_options, is right and reachable from this host"
    if isinstance(error, TypeError):
        return "check the names in storage_options"
    return None

"""From what users write, a path or a URL, to the storage that it means."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.config import conf

from distckpt.errors import ConfigError, DependencyError
from distckpt.storage.contract import Storage
from distckpt.storage.failures import CREDENTIALS_FIX, redacted, remote_error
from distckpt.storage.local import LocalStorage
from distckpt.storage.objects import ObjectStorage

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
_SQUASHED_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>[^/].*)", re.DOTALL)
_LOCAL = {"file", "local"}
_S3 = {"s3", "s3a"}

# Seconds that let a slow server answer, and make one that is not there an error soon. How often a request is tried
# is said by `retries.Patience`, or by the user in botocore's own words: config_kwargs={"retries": ...}.
_S3_CONFIG: dict[str, Any] = {"connect_timeout": 5, "read_timeout": 30}
# What distckpt writes has digests of its own; botocore's newer default checksums are refused by older servers.
_S3_CHECKSUMS = {
    "request_checksum_calculation": "AWS_REQUEST_CHECKSUM_CALCULATION",
    "response_checksum_validation": "AWS_RESPONSE_CHECKSUM_VALIDATION",
}


def open_storage(directory: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> Storage:
    """Return the storage below `directory`. Nothing is read, written or connected to before its first use.

    Args:
        directory: A local path ("~" is the home folder), a `file://` URL, or any URL that fsspec knows.
        storage_options: What fsspec's filesystem of that URL takes: for S3 `key`, `secret`, `endpoint_url`,
            `profile`, `client_kwargs`, ... Without them, AWS's own variables and files count, `AWS_ENDPOINT_URL` too.
            For S3 also `engine`, what uploads: "s3fs" or "obstore"; without it, obstore where it is installed and
            can be given the same settings.

    Raises:
        ConfigError: The URL has no known scheme or is no directory's, or options are given for a local path.
        DependencyError: The URL's scheme needs a package that is not installed.
    """
    text = os.fspath(directory)
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(source="directory", problem=f"{directory!r} is neither a path nor a URL")
    options = dict(storage_options or {})
    url = _URL.fullmatch(text)
    if url is None:
        _refuse_broken_url(text)
    if url is None or url["scheme"].lower() in _LOCAL:
        if options:
            raise ConfigError(
                source="storage_options",
                problem=f"{text!r} is a local path, which takes none; given: {', '.join(sorted(options))}",
                fix="leave them out, or give a URL such as s3://bucket/run-1",
            )
        return LocalStorage(Path(text if url is None else url["rest"]).expanduser())
    return _open_remote(url["scheme"].lower(), url["rest"], options)


def _refuse_broken_url(text: str) -> None:
    """Refuse what was meant as a URL, such as "s3:/bucket/run", which is what `pathlib.Path` makes of one."""
    if "://" in text:
        raise ConfigError(
            source="directory",
            problem=f"{redacted(text)!r} is neither a path nor a URL of one filesystem",
            fix="give a local path, or a URL such as s3://bucket/run-1",
        )
    squashed = _SQUASHED_URL.fullmatch(text)
    if squashed is not None and squashed["scheme"].lower() in fsspec.available_protocols():
        url = redacted(f"{squashed['scheme']}://{squashed['rest']}")
        raise ConfigError(
            source="directory",
            problem=f"{redacted(text)!r} looks like a URL that has lost a slash, as pathlib.Path does to them",
            fix=f"give it as a string: {url!r}",
        )


def _open_remote(scheme: str, rest: str, options: dict[str, Any]) -> ObjectStorage:
    shown, engine = redacted(f"{scheme}://{rest}").rstrip("/"), None
    filesystem_class = _filesystem_class(scheme, shown)
    if scheme in _S3:
        if "@" in rest.split("/", 1)[0]:
            raise ConfigError(
                source="directory",
                problem=f"{shown!r} was given with a login, which S3 URLs do not have",
                fix=CREDENTIALS_FIX,
            )
        engine = _engine(options)
        options = _s3_options(options)
    root = filesystem_class._strip_protocol(f"{scheme}://{rest}")
    if not root.strip("/"):
        raise ConfigError(
            source="directory", problem=f"{shown + '//'!r} names no place", fix=f"{scheme}://bucket/run-1, for instance"
        )
    url_options = filesystem_class._get_kwargs_from_urls(f"{scheme}://{rest}")
    fresh = {"skip_instance_cache": True, "use_listings_cache": False}  # settings and files change under a cache
    try:
        fs = filesystem_class(**{**url_options, **options, **fresh})
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            source="storage_options", problem=f"{shown!r} does not take {', '.join(sorted(options)) or 'none'}: {error}"
        ) from error
    except Exception as error:  # most connect at their first use, a few at once
        raise remote_error(error, action="open", path=shown) from error
    return ObjectStorage(fs, root, shown, engine=engine)


def _filesystem_class(scheme: str, shown: str) -> Any:
    try:
        return fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        known = fsspec.available_protocols()
        near = difflib.get_close_matches(scheme, known, n=1, cutoff=0.5)
        raise ConfigError(
            source="directory",
            problem=f"{shown!r} has the unknown scheme {scheme!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            fix="give a local path, or a URL such as s3://bucket/run-1",
        ) from error
    except ImportError as error:
        cause = error.__cause__
        missing = cause.name if isinstance(cause, ImportError) and cause.name else error.name or scheme
        raise DependencyError(package=missing.partition(".")[0], purpose=f"the directory {shown!r}") from error


def _engine(options: dict[str, Any]) -> str | None:
    """Take the option that is distckpt's own out of the user's: which client uploads."""
    engine: str | None = options.pop("engine", None)
    if engine not in (None, "s3fs", "obstore"):
        raise ConfigError(
            source="storage_options",
            problem=f"engine {engine!r} is unknown",
            fix="leave it out, or name 's3fs' or 'obstore'",
        )
    return engine


def _s3_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the user's options, and fsspec's configuration, with distckpt's defaults for what they leave open."""
    configured = conf.get("s3", {})
    config = dict(_S3_CONFIG)
    for option, variable in _S3_CHECKSUMS.items():
        if variable not in os.environ:
            config[option] = "when_required"
    config.update(configured.get("config_kwargs") or {})
    config.update(options.get("config_kwargs") or {})
    return {**options, "config_kwargs": config}

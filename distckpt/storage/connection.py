"""A filesystem of fsspec, kept usable: built anew in a forked child, and where credentials are to be looked up anew."""

from __future__ import annotations

import os
from typing import Any

from fsspec import AbstractFileSystem

_SECRET_OPTIONS = {"key", "secret", "token", "username", "password"}
_SECRET_CLIENT_OPTIONS = {"aws_access_key_id", "aws_secret_access_key", "aws_session_token"}
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class Connection:
    """A filesystem that may be used from any thread, and in children of this process."""

    def __init__(self, fs: AbstractFileSystem) -> None:
        self._fs = fs
        self._pid = os.getpid()
        self._inherited: AbstractFileSystem | None = None
        self._is_stale = False

    def filesystem(self) -> AbstractFileSystem:
        """Return the filesystem, built anew where its connections and threads are lost, or its credentials stale."""
        is_forked = self._pid != os.getpid()
        if is_forked or self._is_stale:
            if is_forked:
                self._inherited = self._fs  # kept: its finalizer would talk to a thread that is not there
            if self._fs.async_impl:
                options = {**self._fs.storage_options, "skip_instance_cache": True}
                self._fs = type(self._fs)(*self._fs.storage_args, **options)
            self._pid, self._is_stale = os.getpid(), False
        return self._fs

    def forget(self) -> None:
        """Look the credentials up anew at the next use."""
        self._is_stale = True

    @property
    def origin(self) -> AbstractFileSystem:
        """The filesystem as it is, to be sent to another process or asked for its settings."""
        return self._fs

    def secrets(self) -> frozenset[str]:
        """Return every text that must not be shown."""
        options: dict[str, Any] = self._fs.storage_options
        client_options = options.get("client_kwargs") or {}
        secrets = [options.get(option) for option in _SECRET_OPTIONS]
        secrets += [client_options.get(option) for option in _SECRET_CLIENT_OPTIONS]
        secrets += [os.environ.get(variable) for variable in _SECRET_VARIABLES]
        return frozenset(secret for secret in secrets if isinstance(secret, str) and secret)

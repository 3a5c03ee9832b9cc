"""Somewhere to store, past and through a storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import s3fs
from s3_server import S3Server

from distckpt.storage import Storage, open_storage

TRIES = 3
IMPATIENT: dict[str, Any] = {
    "config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": TRIES}, "connect_timeout": 2}
}
"""Storage options of a client that gives up soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Somewhere to store; each call of `open` is another client of it. `plant` writes past the storage."""

    kind: str
    url: str
    plant: Callable[[str, bytes], None]
    options: dict[str, Any] | None = None

    def open(self) -> Storage:
        return open_storage(self.url, storage_options=self.options)


def filesystem(server: S3Server, *, through: str | None = None, **config: Any) -> s3fs.S3FileSystem:
    """Return a filesystem of its own for a server, perhaps through a proxy's URL; `config` is botocore's."""
    return s3fs.S3FileSystem(
        endpoint_url=through or server.endpoint,
        key=server.key,
        secret=server.secret,
        config_kwargs={
            **IMPATIENT["config_kwargs"],
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            **config,
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )

"""Somewhere to store, past and through a storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distckpt.storage import Storage, open_storage

TRIES = 2
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

    def open(self) -> Storage:
        return open_storage(self.url)

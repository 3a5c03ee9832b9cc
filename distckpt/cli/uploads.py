"""Unfinished uploads, as `ls` and `prune` show them.

An object store keeps what a killed upload has sent, shows it in no listing, and charges for it. One that began less
than a day ago may be a save in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distckpt import names
from distckpt.cli import terminal
from distckpt.errors import StorageError
from distckpt.storage import KeepsUploads, Storage, UnfinishedUpload
from distckpt.storage.contract import DAY_S


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadItem:
    """What happens to one unfinished upload: it is aborted, or not, because of `reason`."""

    upload: UnfinishedUpload
    goes: bool
    reason: str


def look(storage: Storage) -> list[UnfinishedUpload] | None:
    """Return the unfinished uploads, oldest first; None, with a word on stderr, if they may not be listed."""
    if not isinstance(storage, KeepsUploads):
        return []
    try:
        return list(storage.uploads(older_than_s=0.0, sized=True))
    except StorageError as error:
        terminal.say(f"unfinished uploads are not shown: {error}".partition("\n")[0])
        return None


def plan(uploads: Sequence[UnfinishedUpload] | None, *, now: float) -> list[UploadItem]:
    """Return what `prune` does with each, at `now`, in seconds since 1970."""
    items = []
    for upload in uploads or ():
        is_old = 0 < upload.started <= now - DAY_S
        age = "of unknown age" if not upload.started else f"begun {terminal.age_text(upload.started)}"
        reason = f"unfinished upload, {age}" if is_old else f"may be in flight: {age}"
        items.append(UploadItem(upload=upload, goes=is_old, reason=reason))
    return items


def carry_out(storage: Storage, items: Sequence[UploadItem]) -> None:
    """Abort the uploads that are to go.

    Raises:
        StorageError: One could not be aborted; those before it are gone.
    """
    assert isinstance(storage, KeepsUploads) or not items
    for item in items:
        if item.goes and isinstance(storage, KeepsUploads):
            storage.abort_uploads([item.upload])
            terminal.say(f"aborted the upload of {item.upload.name}")


def facts(url: str, upload: UnfinishedUpload) -> dict[str, Any]:
    """Return an upload's fields for JSON."""
    return {
        "path": names.join(url, upload.name),
        "id": upload.id,
        "started": upload.started or None,
        "bytes": upload.num_bytes,
    }


def plan_facts(url: str, items: Sequence[UploadItem]) -> list[dict[str, Any]]:
    """Return a plan's fields for JSON."""
    return [
        {**facts(url, item.upload), "action": "abort" if item.goes else "keep", "reasons": [item.reason]}
        for item in items
    ]


def size_of(uploads: Sequence[UnfinishedUpload]) -> int:
    """Return how many bytes the server holds of uploads, as far as it says."""
    return sum(upload.num_bytes or 0 for upload in uploads)


def summary(url: str, uploads: Sequence[UnfinishedUpload], *, now: float) -> str:
    """Return a line on unfinished uploads: how many, how much, how old, and what to do about them."""
    size, oldest = terminal.size_text(size_of(uploads)), uploads[0].started
    age = f", the oldest begun {terminal.age_text(oldest)}" if oldest else ""
    num_old = sum(item.goes for item in plan(uploads, now=now))
    remedy = f"; distckpt prune {url} --partial aborts the {num_old:,} older than a day" if num_old else ""
    return f"{terminal.count_text(len(uploads), 'unfinished upload')}, {size}{age}{remedy}"

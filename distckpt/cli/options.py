"""Arguments and options that several commands take, and what they mean."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer

from distckpt.errors import ConfigError
from distckpt.storage import Storage, open_storage

_SIZE = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?) ?(?P<unit>[kKMGT]i?)?B?")
_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Return the bytes that a size means: "500", "64MiB", "5GB", "1.5 TB"."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise typer.BadParameter("no size, such as 64MiB, 5GB or 1500000")
    unit = match["unit"] or ""
    factor = (1024 if unit.endswith("i") else 1000) ** _UNITS[unit[0].lower()] if unit else 1
    size = int(float(match["number"]) * factor)
    if size < 1:
        raise typer.BadParameter("a size is at least 1 byte")
    return size


def parse_options(text: str) -> dict[str, Any]:
    """Return the storage options that a text of JSON states."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"no JSON: {error}") from error
    if not isinstance(options, dict):
        raise typer.BadParameter('no JSON object, such as {"endpoint_url": "http://127.0.0.1:9000"}')
    return options


Url = Annotated[
    str, typer.Argument(metavar="URL", help="A run's directory, or one checkpoint's folder.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Step = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="The checkpoint of this step of the run.", show_default=False),
]
StorageOptions = Annotated[
    dict[str, Any] | None,
    typer.Option(
        metavar="JSON",
        parser=parse_options,
        help="What fsspec's file system of the URL takes; others can read it in the list of processes.",
        show_default=False,
    ),
]


def is_local(url: str) -> bool:
    """Say whether a URL is a path on this machine, which takes no storage options."""
    scheme, separator, _ = url.partition("://")
    return not separator or scheme.lower() in ("file", "local")


def open_url(url: str, options: dict[str, Any] | None) -> Storage:
    """Return the storage that a URL means.

    Raises:
        ConfigError: The URL is malformed, or does not take the options.
        DependencyError: It needs a package that is not installed.
    """
    try:
        return open_storage(url, storage_options=options)
    except ConfigError as error:
        if error.source != "storage_options":
            raise
        raise ConfigError(source="--storage-options", problem=error.problem, fix=error.fix) from error

"""The outline of a manifest: what a list of checkpoints shows, without a look at every tensor.

A manifest names each tensor, chunk and digest, and grows with the model; a list of a thousand needs a dozen facts of
each. Its keys are sorted and it has no white space, so these facts are found by skipping what lies between.
Invariant: what `outline` returns is what `manifest.parse` would find; where the text is not as it expects, it asks it.

Source: for a ResNet-18 with AdamW, 53 kB, parsing took 1.8 ms, `json.loads` alone 0.4 ms, this 0.1 ms.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, cast

from distckpt import names
from distckpt.checksum import digest
from distckpt.manifest import FORMAT, Layout, parse
from distckpt.values import Json

_SEAL = re.compile(rb',"xxh3":"([0-9a-f]{32})"}\n')
_SEAL_BYTES = len(b',"xxh3":"') + 32 + len(b'"}\n')
_FILE_BYTES = re.compile(r'\{"bytes":([0-9]{1,18}),"name":"[^"\\]*","rank":')
_MIDDLE = re.compile(r',"parent":(null|\{[^{}]*\}),"run":("[^"\\]*"),"step":([0-9]{1,18}),"tensors":\{')
_END = re.compile(
    r',"timings":(\{[^{}]*\}),"versions":(\{[^{}]*\}),"world_size":([0-9]{1,18}),"writer":(\{[^{}]*\}),'
    r'"xxh3":"[0-9a-f]{32}"\}\n\Z'
)
_TAIL_CHARS = 4096
_FILES_END = '],"format":'
_SCALARS = json.JSONDecoder()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """Some of `Manifest`'s facts, under the names that they have there."""

    step: int
    run: str
    attempt: str
    layout: Layout
    world_size: int
    created: float
    metrics: dict[str, float]
    parent: dict[str, Json] | None
    config: dict[str, Json] | None
    num_bytes: int
    timings: dict[str, float]
    versions: dict[str, str]
    writer: dict[str, Json]


def outline(data: bytes, *, path: str) -> Outline:
    """Return the outline of the manifest in `data`, whose digest is checked; whether it is consistent is not.

    Raises:
        CheckpointDamagedError: The bytes are not the ones that were written.
        FormatVersionError: It is of a newer format.
    """
    try:
        found = _skim(data)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        found = None
    if found is not None:
        return found
    manifest = parse(data, path=path)
    return Outline(
        step=manifest.step,
        run=manifest.run,
        attempt=manifest.attempt,
        layout=manifest.layout,
        world_size=manifest.world_size,
        created=manifest.created,
        metrics=manifest.metrics,
        parent=manifest.parent,
        config=manifest.config,
        num_bytes=manifest.num_bytes,
        timings=manifest.timings,
        versions=manifest.versions,
        writer=manifest.writer,
    )


def _skim(data: bytes) -> Outline | None:
    """Return the outline if the text is laid out as this distckpt writes it; None, or any error, if it is not."""
    seal = _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if seal is None or digest(memoryview(data)[:-_SEAL_BYTES]) != seal[1].decode():
        return None
    text = data.decode()
    facts, files_begin = _pairs_until(text, 0, "files")
    files_end = text.index(_FILES_END, files_begin)
    files = text[files_begin : files_end + 1]
    sizes = _FILE_BYTES.findall(files)
    if len(sizes) != files.count('"segments":'):
        return None
    more, objects_begin = _pairs_until(text, files_end + 1, "objects")
    if "files" in more or '"files":' in files:
        return None
    facts |= more
    middles = list(_MIDDLE.finditer(text, objects_begin))
    end = _END.search(text, max(0, len(text) - _TAIL_CHARS))
    # What was found may stand inside another object, if that has the key, too, or the true one is escaped.
    if len(middles) != 1 or text.count('"parent":', objects_begin) != 1 or r"\u00" in text:
        return None
    # Of a key that stands there twice, the last one counts.
    if end is None or text[end.start() - 1] != "}":
        return None
    parent_begin, run_begin = middles[0].span(1)
    for name in (*facts, "files"):
        if text.find(f'"{name}":', objects_begin, parent_begin) >= 0 or text.find(f'"{name}":', run_begin) >= 0:
            return None
    if any(text.find(f'"{name}":', middles[0].end()) >= 0 for name in ("run", "step")):
        return None
    if type(facts["format"]) is not int or not 1 <= facts["format"] <= FORMAT:
        return None
    if facts["layout"] not in ("full", "sharded"):
        return None
    if not math.isfinite(float(facts["created"])):
        return None
    parent, run, step = middles[0].groups()
    timings, versions, world_size, writer = end.groups()
    return Outline(
        step=int(step),
        run=json.loads(run),
        attempt=names.checked(_checked(facts["attempt"], str)),
        layout=cast(Layout, facts["layout"]),
        world_size=int(world_size),
        created=float(facts["created"]),
        metrics={name: float(value) for name, value in facts["metrics"].items()},
        parent=json.loads(parent),
        config=facts["config"] if facts["config"] is None else _checked(facts["config"], dict),
        num_bytes=sum(map(int, sizes)),
        timings={name: float(value) for name, value in json.loads(timings).items()},
        versions={name: _checked(value, str) for name, value in json.loads(versions).items()},
        writer=json.loads(writer),
    )


def _pairs_until(text: str, begin: int, last: str) -> tuple[dict[str, Any], int]:
    """Return the keys and values from `begin` on, up to the key `last`, and where the value of that one begins."""
    found: dict[str, Any] = {}
    while True:
        if text[begin] not in "{,":
            raise ValueError("no pair begins here")
        name, end = _SCALARS.raw_decode(text, begin + 1)
        if text[end] != ":":
            raise ValueError("a key without a value")
        if name == last:
            return found, end + 1
        found[name], begin = _SCALARS.raw_decode(text, end + 1)


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value

"""The record: what a file of another tool has no place for, as one text of JSON that travels with the tensors.

With it, what was exported comes back as the same checkpoint; without it, a file is taken in as it looks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from distckpt.manifest import Manifest, ObjectEntry
from distckpt.values import Json

KEY = "_distckpt"  # the record's name among a file's metadata, or its keys
COMPLEX = "_distckpt_complex"  # names of complex tensors, which safetensors files hold as pairs of floats
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a checkpoint is beyond its tensors.

    Attributes:
        step: Optimizer steps completed.
        world_size: The number of ranks that saved it.
        objects: The state's keys.
        metrics: What was measured.
        config: The run's configuration.
    """

    step: int
    world_size: int
    objects: dict[str, ObjectEntry]
    metrics: dict[str, float] = field(default_factory=dict)
    config: dict[str, Json] | None = None


def write(manifest: Manifest) -> str:
    """Return the record of a checkpoint.

    Ranks: any.
    """
    body = {
        "config": manifest.config,
        "format": FORMAT,
        "metrics": {name: repr(value) for name, value in manifest.metrics.items()},
        "objects": {
            key: {"kind": entry.kind, "per_rank": entry.per_rank, "trees": list(entry.trees)}
            for key, entry in manifest.objects.items()
        },
        "step": manifest.step,
        "world_size": manifest.world_size,
    }
    return json.dumps(body, sort_keys=True, allow_nan=False)


def read(text: object) -> Record | None:
    """Return the record that a text holds; None if it is no record that this distckpt knows.

    Ranks: any.
    """
    try:
        body = json.loads(text) if isinstance(text, str) else None
        if not isinstance(body, dict) or body["format"] != FORMAT:
            return None
        step, world_size = body["step"], body["world_size"]
        if type(step) is not int or type(world_size) is not int or step < 0 or world_size < 1:
            return None
        return Record(
            step=step,
            world_size=world_size,
            objects={
                str(key): ObjectEntry(
                    kind=str(entry["kind"]), per_rank=entry["per_rank"] is True, trees=tuple(entry["trees"])
                )
                for key, entry in body["objects"].items()
            },
            metrics={str(name): float(value) for name, value in body["metrics"].items()},
            config=body["config"] if isinstance(body["config"], dict) else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None

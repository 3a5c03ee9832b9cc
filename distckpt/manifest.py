"""The manifest: the JSON file that makes a checkpoint, and the facts in it.

Invariant: what `parse` returns is whole and consistent. It is treated as hostile input until then: the digest, every
type, every name, and that each chunk lies inside its file and inside its tensor are checked before anything is used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from distckpt import chunks as pieces
from distckpt import names
from distckpt.checksum import digest, is_digest
from distckpt.chunks import MAX_DIMS, Chunk, Rooms, Runs, integer
from distckpt.errors import CheckpointDamagedError, FormatVersionError
from distckpt.runs import Run
from distckpt.safetensors import ITEM_BYTES, MAX_HEADER_BYTES
from distckpt.tiling import tiles
from distckpt.values import Json, references

FORMAT = 2  # the newest; what has no runs is written as format 1
MAX_BYTES = 1 << 30
MAX_SEGMENT_BYTES = MAX_HEADER_BYTES + 8  # who checks a digest holds that many bytes; the header is one segment
_ZEROS = [[0] * num_dims for num_dims in range(MAX_DIMS + 1)]
_ORIGINS = [(0,) * num_dims for num_dims in range(MAX_DIMS + 1)]
Layout = Literal["full", "sharded"]

# The digest of all bytes before it, as the last key: "xxh3" sorts behind every other.
_SEAL = re.compile(rb',"xxh3":"([0-9a-f]{32})"}\n')
_SEAL_BYTES = len(b',"xxh3":"') + 32 + len(b'"}\n')


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of bytes of a data file, with their digest; a file's segments, in order, are all of its bytes."""

    num_bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One data file.

    Attributes:
        name: Relative to the checkpoint's folder.
        rank: The rank that wrote it.
        num_bytes: Its size.
        segments: Its digests.
    """

    name: str
    rank: int
    num_bytes: int
    segments: tuple[Segment, ...]


class TensorEntry(NamedTuple):
    """One tensor; its chunks do not overlap and together are all of it. A tuple, as `Chunk` is."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Sequence[Chunk]

    @property
    def num_bytes(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectEntry:
    """One key of the state.

    Attributes:
        kind: "module", "optimizer", "stateful" or "value".
        trees: The object as JSON (see `values`): one tree for all ranks, or, if `per_rank`, one for each rank.
        per_rank: Whether it differs from rank to rank.
    """

    kind: str
    trees: tuple[Json, ...]
    per_rank: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that is known of one checkpoint.

    Attributes:
        step: Optimizer steps completed.
        run: The name of the run, the same over all its restarts.
        attempt: The name of the save; its data files lie in the folder of that name.
        layout: "full" or "sharded".
        world_size: The number of ranks that saved it.
        created: When it was committed, in seconds since 1970.
        writer: Who committed it: {"host": ..., "pid": ...}.
        files: The data files.
        tensors: Tensor entries by name.
        objects: The state's keys.
        metrics: What the caller measured at this step.
        versions: Of distckpt, torch and Python.
        timings: Seconds that the save's parts took on the slowest rank.
        parent: {"step": ..., "attempt": ...} of the checkpoint that the run restored or saved before, or None.
        config: The run's configuration, if the caller gave one.
    """

    step: int
    run: str
    attempt: str
    layout: Layout
    world_size: int
    created: float
    writer: dict[str, Json]
    files: tuple[DataFile, ...]
    tensors: dict[str, TensorEntry]
    objects: dict[str, ObjectEntry]
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    parent: dict[str, Json] | None = None
    config: dict[str, Json] | None = None

    @property
    def num_bytes(self) -> int:
        """The size of all data files, in bytes."""
        return sum(file.num_bytes for file in self.files)


def serialize(manifest: Manifest, *, texts: Mapping[str, str] | None = None) -> bytes:
    """Return the manifest's file: JSON with sorted keys, sealed by a digest of itself.

    Args:
        manifest: The manifest.
        texts: The JSON of "tensors" or "objects", where it is known from before.
    """
    known = texts or {}
    body: dict[str, Json] = {
        "attempt": manifest.attempt,
        "config": manifest.config,
        "created": manifest.created,
        "files": [_file_to_json(file) for file in manifest.files],
        "format": 2 if any(type(entry.chunks) is Runs for entry in manifest.tensors.values()) else 1,
        "layout": manifest.layout,
        "metrics": {name: _float_to_json(value) for name, value in manifest.metrics.items()},
        "objects": None,
        "parent": manifest.parent,
        "run": manifest.run,
        "step": manifest.step,
        "tensors": None,
        "timings": manifest.timings,
        "versions": manifest.versions,
        "world_size": manifest.world_size,
        "writer": manifest.writer,
    }
    parts = {key: to_text(value) for key, value in body.items()}
    parts["objects"] = known.get("objects") or objects_text(
        {key: (entry, [to_text(tree) for tree in entry.trees]) for key, entry in manifest.objects.items()}
    )
    parts["tensors"] = known.get("tensors") or tensors_text(manifest.tensors)
    text = ("{" + ",".join(f'"{key}":{parts[key]}' for key in sorted(parts))).encode()
    return text + f',"xxh3":"{digest(text)}"}}\n'.encode()


def to_text(value: Json) -> str:
    """Return JSON as a manifest has it: keys sorted, no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def tensors_text(tensors: Mapping[str, TensorEntry]) -> str:
    """Return the JSON of a manifest's tensors."""
    return to_text({name: _tensor_to_json(entry) for name, entry in tensors.items()})


def objects_text(objects: Mapping[str, tuple[ObjectEntry, Sequence[str]]]) -> str:
    """Return the JSON of the state's keys, from the JSON of each one's trees."""
    texts = (
        f'{to_text(key)}:{{"kind":{to_text(entry.kind)},"per_rank":{to_text(entry.per_rank)},"trees":[{",".join(trees)}]}}'
        for key, (entry, trees) in sorted(objects.items())
    )
    return "{" + ",".join(texts) + "}"


def parse(data: bytes, *, path: str) -> Manifest:
    """Return the manifest in `data`.

    Args:
        data: The file's bytes.
        path: The checkpoint's folder, for errors.

    Raises:
        CheckpointDamagedError: The bytes are not the ones that were written, or contradict themselves.
        FormatVersionError: It is of a newer format.
    """
    try:
        body = _unseal(data)
        version = integer(body["format"])
        if version > FORMAT:
            raise FormatVersionError(path=path, found=version, supported=FORMAT)
        manifest = _from_body(body, with_runs=version > 1)
        check(manifest)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        OverflowError,
    ) as error:
        if isinstance(error, FormatVersionError):
            raise
        problem = f"is missing {error}" if isinstance(error, KeyError) else f"is no whole manifest: {error}"
        raise CheckpointDamagedError(path=path, file=names.MANIFEST, problem=problem) from error
    return manifest


def _unseal(data: bytes) -> dict[str, Any]:
    text, seal = data[:-_SEAL_BYTES], _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if seal is None:
        raise ValueError(f"its {len(data):,} bytes do not end in a digest")
    if digest(text) != seal[1].decode():
        raise ValueError("its digest does not fit its bytes")
    body = json.loads(data.decode())  # of bytes, it would guess the encoding
    if not isinstance(body, dict):
        raise ValueError("it is no JSON object")
    return body


def _from_body(body: dict[str, Any], *, with_runs: bool) -> Manifest:
    layout = body["layout"]
    if layout not in ("full", "sharded"):
        raise ValueError(f"unknown layout {layout!r}")
    files = tuple(_file_from_json(file) for file in body["files"])
    begins = tuple(file.segments[0].num_bytes if file.segments else 0 for file in files) if with_runs else None
    return Manifest(
        step=integer(body["step"]),
        run=_text(body["run"]),
        attempt=names.checked(_text(body["attempt"])),
        layout=layout,
        world_size=integer(body["world_size"], least=1),
        created=_moment(body["created"]),
        writer=_mapping(body["writer"]),
        files=files,
        tensors=_tensors_from_json(_mapping(body["tensors"]), begins),
        objects={key: _object_from_json(entry) for key, entry in _mapping(body["objects"]).items()},
        metrics={name: float(value) for name, value in _mapping(body["metrics"]).items()},
        versions={name: _text(value) for name, value in _mapping(body["versions"]).items()},
        timings={name: float(value) for name, value in _mapping(body["timings"]).items()},
        parent=None if body["parent"] is None else _mapping(body["parent"]),
        config=None if body["config"] is None else _mapping(body["config"]),
    )


def check(manifest: Manifest) -> None:
    """Return if the parts of a manifest do not contradict each other.

    Raises:
        ValueError: They do; says where.
    """
    seen = [file.name for file in manifest.files]
    if len(set(seen)) != len(seen):
        raise ValueError("two data files have one name")
    check_tensors(manifest.tensors, [file.num_bytes for file in manifest.files])
    for key, entry in manifest.objects.items():
        if len(entry.trees) != (manifest.world_size if entry.per_rank else 1):
            raise ValueError(f"state key {key!r} has {len(entry.trees)} trees")
        check_references(key, entry.trees, manifest.tensors)


def check_tensors(tensors: Mapping[str, TensorEntry], file_bytes: Sequence[int]) -> None:
    """Return if each tensor's chunks lie inside their files, and cover it exactly once.

    Args:
        tensors: The tensors, by name.
        file_bytes: The size of each data file.

    Raises:
        ValueError: They do not; names the tensor.
    """
    rooms = _rooms(tensors, file_bytes)
    left_bytes = sum(file_bytes)  # else a few bytes, named over and over, could fill all memory
    for name, (dtype, shape, chunks) in tensors.items():
        item_bytes = ITEM_BYTES[dtype]
        num_bytes = math.prod(shape) * item_bytes
        left_bytes -= num_bytes
        if left_bytes < 0:
            raise ValueError("its tensors have more bytes than its files")
        if len(chunks) == 1 and chunks[0].shape == shape and not any(chunks[0].start):  # nearly all of them
            file, offset, _, _ = chunks[0]
            if offset + num_bytes > file_bytes[file]:
                raise ValueError(f"a chunk of {name!r} lies outside its file")
            continue
        try:
            pieces.check_inside(chunks, item_bytes=item_bytes, file_bytes=file_bytes, rooms=rooms)
        except ValueError as error:
            raise ValueError(f"a chunk of {name!r} {error}") from error
        boxes = [(part.start, part.extent if isinstance(part, Run) else part.shape) for part in pieces.parts_of(chunks)]
        if not tiles(shape, boxes):
            raise ValueError(f"the chunks of {name!r} do not cover it exactly once")


def _rooms(tensors: Mapping[str, TensorEntry], file_bytes: Sequence[int]) -> Rooms | None:
    """Return how much the files hold behind their headers; None if there are no runs, which ask for it."""
    for entry in tensors.values():
        if isinstance(entry.chunks, Runs):
            return Rooms(file_bytes, entry.chunks.begins)
    return None


def check_references(key: str, trees: Iterable[Json], tensors: Mapping[str, TensorEntry]) -> None:
    """Return if the trees of a key of the state refer to tensors that are there.

    Raises:
        ValueError: They do not; names key and tensor.
    """
    for name in references(list(trees)):
        if name not in tensors:
            raise ValueError(f"state key {key!r} refers to {name!r}, which is not there")


def _file_to_json(file: DataFile) -> Json:
    segments = [[segment.num_bytes, segment.digest] for segment in file.segments]
    return {"bytes": file.num_bytes, "name": file.name, "rank": file.rank, "segments": segments}


def _file_from_json(body: Json) -> DataFile:
    segments = []
    for num_bytes, hexadecimal in body["segments"]:
        if not is_digest(hexadecimal):
            raise ValueError("a segment's digest is malformed")
        segments.append(Segment(num_bytes=integer(num_bytes, least=1), digest=hexadecimal))
        if num_bytes > MAX_SEGMENT_BYTES:
            raise ValueError(f"a segment of {num_bytes:,} bytes")
    size = integer(body["bytes"])
    if sum(segment.num_bytes for segment in segments) != size:
        raise ValueError(f"the digests of {body['name']!r} do not cover it")
    name = names.checked(_text(body["name"]))
    return DataFile(name=name, rank=integer(body["rank"]), num_bytes=size, segments=tuple(segments))


def _tensor_to_json(entry: TensorEntry) -> Json:
    return {"chunks": pieces.to_json(entry.chunks), "dtype": entry.dtype, "shape": list(entry.shape)}


def _tensors_from_json(bodies: dict[str, Json], begins: tuple[int, ...] | None) -> dict[str, TensorEntry]:
    """Return the tensors; those that lie in one piece, by far the most, in one quick loop."""
    tensors: dict[str, TensorEntry] = {}
    new = tuple.__new__  # what their own constructors call, at a third of the time
    for name, body in bodies.items():
        dtype, sizes, chunks = body["dtype"], body["shape"], body["chunks"]
        num_dims = len(sizes)
        if len(chunks) == 1 and len(chunks[0]) == 4 and dtype in ITEM_BYTES and num_dims <= MAX_DIMS:
            file, offset, start, size = chunks[0]
            shape = tuple(sizes)
            plain = type(file) is int and type(offset) is int and file >= 0 and 0 <= offset < 1 << 62
            for each in shape:
                plain = plain and type(each) is int and 0 < each < 1 << 62
            if plain and size == sizes and start == _ZEROS[num_dims]:
                chunk = new(Chunk, (file, offset, _ORIGINS[num_dims], shape))
                tensors[name] = new(TensorEntry, (dtype, shape, (chunk,)))
                continue
        tensors[name] = _tensor_from_json(body, begins)
    return tensors


def _tensor_from_json(body: Json, begins: tuple[int, ...] | None) -> TensorEntry:
    dtype, shape = body["dtype"], pieces.sizes(body["shape"])
    # An empty tensor, too, has strides, which have to fit.
    if len(shape) > MAX_DIMS or (0 in shape and math.prod(size or 1 for size in shape) >= 1 << 56):
        raise ValueError(f"a tensor of shape {shape!s:.80}")
    if dtype not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {dtype!r:.40}")
    return TensorEntry(dtype, shape, pieces.from_json(body["chunks"], num_dims=len(shape), begins=begins))


def _object_from_json(body: Json) -> ObjectEntry:
    if not isinstance(body["per_rank"], bool) or not isinstance(body["trees"], list):
        raise ValueError("a state key's entry is malformed")
    return ObjectEntry(kind=_text(body["kind"]), trees=tuple(body["trees"]), per_rank=body["per_rank"])


def _float_to_json(value: float) -> Json:
    return value if math.isfinite(value) else repr(value)


def _moment(value: Any) -> float:
    moment = float(value)
    if not math.isfinite(moment):
        raise ValueError(f"{moment} is no time")
    return moment


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no text")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.40} is no mapping")
    return value

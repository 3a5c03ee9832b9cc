"""Tensors as bytes: dtypes by name, what can be stored, and the part of a tensor that this rank holds."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from distckpt.errors import UnsupportedStateError
from distckpt.spread import Mesh, Spread, is_even, mesh_of, writers

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "C128": torch.complex128,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NOT_NUMPYS = frozenset({torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2})
_MOST_NUMPY_DIMS = 32

# The meshes seen last, each held so that its id stays its own: to compare two of many ranks takes as long as both are.
_meshes: dict[int, tuple[DeviceMesh, _Place]] = {}
_MOST_MESHES = 64

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class _Place(NamedTuple):
    """Where a mesh stands: the job's mesh that it was cut from, or itself.

    Attributes:
        root: That mesh.
        plain: The same as numbers; None if its ranks stand in no such order.
        dims: Of the root's dimensions, which are the mesh's own, in their order; along the others lie others like it.
    """

    root: DeviceMesh
    plain: Mesh | None
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A box of a tensor.

    Attributes:
        start: Its first index in each dimension.
        shape: Its size in each dimension.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]


def check_storable(tensor: torch.Tensor, key: str) -> None:
    """Refuse a tensor whose bytes cannot be stored and given back exactly.

    Raises:
        UnsupportedStateError: It is sparse, quantized, without data, of an unknown dtype or subclass; names the key.

    Ranks: any.
    """
    problem = None
    if not isinstance(tensor, DTensor) and type(tensor) not in _PLAIN:
        problem = f"is a {type(tensor).__module__}.{type(tensor).__qualname__}, a tensor subclass that is not known"
    elif tensor.layout != torch.strided:
        problem = f"is a sparse tensor ({tensor.layout})"
    elif tensor.is_quantized or tensor.dtype not in DTYPE_NAMES:
        problem = f"has dtype {tensor.dtype}, which is not stored"
    elif tensor.is_meta:
        problem = "is on the meta device and has no data"
    elif isinstance(tensor, DTensor) and any(isinstance(placement, Partial) for placement in tensor.placements):
        problem = "is a DTensor with a partial placement: a sum that is not done"
    if problem is not None:
        raise UnsupportedStateError(key=key, problem=problem, fix="convert it to a plain dense tensor in state_dict()")


def whole(tensor: torch.Tensor) -> Box:
    """Return the box that is all of a tensor.

    Ranks: any.
    """
    return Box(start=(0,) * tensor.dim(), shape=tuple(tensor.shape))


def is_everywhere(tensor: torch.Tensor) -> bool:
    """Say whether every rank of the job holds all of the tensor.

    Ranks: any.
    """
    if not isinstance(tensor, DTensor):
        return True
    everyone = _place(tensor.device_mesh).root.size() == torch.distributed.get_world_size()
    return everyone and all(isinstance(placement, Replicate) for placement in tensor.placements)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor as a plain tensor without gradient, sharing its memory.

    Ranks: any.
    """
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.detach() if part.requires_grad else part


def local_box(tensor: torch.Tensor) -> Box | None:
    """Return where this rank's part lies in the whole tensor; None if this rank holds nothing of it.

    Ranks: any.
    """
    if not isinstance(tensor, DTensor):
        return whole(tensor)
    place = _place(tensor.device_mesh)
    coordinate = place.root.get_coordinate()
    if coordinate is None:
        return None
    spread = _spread_by(place.plain, _placements(tensor, place), tensor.shape)
    if spread is not None:
        start, shape = spread.box_at(tuple(coordinate))
    else:
        shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tensor.numel() and 0 in shape:
        return None
    return Box(start=tuple(start), shape=tuple(shape))


def spread_of(tensor: torch.Tensor) -> Spread | None:
    """Return how a tensor is cut over its mesh, as every rank can tell of every other; None if that cannot be said.

    Ranks: any.
    """
    if not isinstance(tensor, DTensor) or not tensor.numel():
        return None
    place = _place(tensor.device_mesh)
    spread = _spread_by(place.plain, _placements(tensor, place), tensor.shape)
    coordinate = place.root.get_coordinate()
    if spread is not None and coordinate is not None:
        _, shape = spread.box_at(tuple(coordinate))
        if 0 not in shape and shape != tuple(local(tensor).shape):  # somebody has cut it by hand
            return None
    return spread


@lru_cache(maxsize=1 << 14)
def _spread_by(mesh: Mesh | None, placements: tuple[Placement, ...], shape: torch.Size) -> Spread | None:
    """Return how a tensor of this shape is cut; the same on each rank."""
    if mesh is None:
        return None
    splits: list[tuple[int, int]] = []
    strided: list[tuple[int, int]] = []
    for mesh_dim, placement in enumerate(placements):
        if type(placement) is Shard and 0 <= placement.dim < len(shape):
            splits.append((mesh_dim, placement.dim))
        elif type(placement) is _StridedShard and placement.split_factor == _cut_behind(
            mesh.sizes, placements, mesh_dim
        ):
            strided.append((mesh_dim, placement.dim))
        elif type(placement) is not Replicate:
            return None
    # FSDP over tensor parallelism: what is strided is cut last. Where that is uneven, pieces are no boxes.
    spread = Spread(mesh, tuple(shape), (*splits, *reversed(strided)))
    return spread if not strided or is_even(spread) else None


def _cut_behind(sizes: Sequence[int], placements: Sequence[Placement], mesh_dim: int) -> int:
    """Return into how many parts the later dimensions of a mesh cut the dimension that one of them cuts."""
    parts = 1
    dim = getattr(placements[mesh_dim], "dim", None)
    for size, placement in zip(sizes[mesh_dim + 1 :], placements[mesh_dim + 1 :], strict=True):
        if isinstance(placement, (Shard, _StridedShard)) and placement.dim == dim:
            parts *= size
    return parts


def _place(mesh: DeviceMesh) -> _Place:
    """Return where a mesh stands."""
    known = _meshes.get(id(mesh))
    if known is None:
        if len(_meshes) >= _MOST_MESHES:
            _meshes.clear()
        known = _meshes[id(mesh)] = (mesh, _placed(mesh))
    return known[1]


def _placed(mesh: DeviceMesh) -> _Place:
    """Find the mesh that one was cut from, as FSDP's `mesh["dp"]` is from one that has a "tp", too."""
    alone = _Place(mesh, _numbered(mesh), tuple(range(mesh.ndim)))
    root: DeviceMesh = getattr(mesh, "_get_root_mesh", lambda: mesh)()
    coordinate = root.get_coordinate() if root is not mesh else None
    if coordinate is None:
        return alone
    names, own_names = root.mesh_dim_names or (), mesh.mesh_dim_names or ()
    if own_names and set(own_names) <= set(names):
        dims = tuple(names.index(name) for name in own_names)
    else:
        own = set(mesh.mesh.flatten().tolist())
        steps: list[Any] = [(*coordinate[:dim], slice(None), *coordinate[dim + 1 :]) for dim in range(root.ndim)]
        lines = [root.mesh[step] for step in steps]
        dims = tuple(dim for dim, line in enumerate(lines) if line.numel() > 1 and own.issuperset(line.tolist()))
    place: list[Any] = [slice(None) if dim in dims else index for dim, index in enumerate(coordinate)]
    # Where dimensions were made into one, or stand in another order, what stands beside the mesh is not known.
    is_cut = dims == tuple(sorted(dims)) and torch.equal(root.mesh[tuple(place)], mesh.mesh)
    return _Place(root, _numbered(root), dims) if is_cut else alone


def _placements(tensor: DTensor, place: _Place) -> tuple[Placement, ...]:
    """Return how a tensor lies on the mesh that its own was cut from: what stands beside each other holds the same."""
    if len(place.dims) == place.root.ndim:
        return tensor.placements
    placements: list[Placement] = [Replicate()] * place.root.ndim
    for dim, placement in zip(place.dims, tensor.placements, strict=True):
        placements[dim] = placement
    return tuple(placements)


def _numbered(mesh: DeviceMesh) -> Mesh | None:
    ranks = mesh.mesh.cpu()
    first = int(ranks.flatten()[0])
    steps = [
        int(ranks.select(dim, 1).flatten()[0]) - first if ranks.shape[dim] > 1 else 0 for dim in range(ranks.dim())
    ]
    plain = mesh_of(first, tuple(ranks.shape), tuple(steps))
    if plain is None:
        return None
    expected = torch.full_like(ranks, first)
    for dim, (size, step) in enumerate(zip(plain.sizes, plain.steps, strict=True)):
        along = torch.arange(size, dtype=ranks.dtype) * step
        expected += along.view([-1 if each == dim else 1 for each in range(ranks.dim())])
    return plain if torch.equal(expected, ranks) else None


def writes_replica(tensor: DTensor, name: str) -> bool:
    """Say whether, of the ranks that hold the same part of `tensor`, this one has to write it.

    Every rank answers for itself: among replicas the one whose place in the mesh fits the name's checksum is chosen.

    Ranks: any.
    """
    place = _place(tensor.device_mesh)
    coordinate = place.root.get_coordinate()
    if coordinate is None:
        return False
    sizes = tuple(place.root.shape)
    replicas = [dim for dim, each in enumerate(_placements(tensor, place)) if isinstance(each, Replicate)]
    return all(coordinate[dim] == place for dim, place in writers(name, replicas, sizes).items())


def memory(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, sharing its memory.

    Ranks: any.
    """
    if tensor.numel() == 0:
        return memoryview(bytearray())
    if tensor.dtype in _NOT_NUMPYS or tensor.dim() > _MOST_NUMPY_DIMS:
        return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]  # in less than half the time


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of any dense tensor, copied to contiguous CPU memory unless they lie there.

    Ranks: any; blocks on a copy from the device.
    """
    return memory(tensor.detach().resolve_conj().resolve_neg().cpu().contiguous())


def tensor_to_json(tensor: torch.Tensor) -> list[Any]:
    """Return a small tensor as JSON, for another rank.

    Ranks: any; blocks on a copy from the device.
    """
    return [DTYPE_NAMES[tensor.dtype], list(tensor.shape), base64.b64encode(host_bytes(tensor)).decode()]


def tensor_from_json(body: list[Any]) -> torch.Tensor:
    """Return the tensor that `tensor_to_json` described, on the CPU.

    Ranks: any.
    """
    dtype, shape, text = body
    data = bytearray(base64.b64decode(text))
    flat = torch.frombuffer(data, dtype=DTYPES[dtype]) if data else torch.empty(0, dtype=DTYPES[dtype])
    return flat.reshape(shape)

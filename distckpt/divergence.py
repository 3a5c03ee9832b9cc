"""Silent divergence and bad numbers: which replicas differ between ranks, and which tensors hold NaN or infinities.

Under data parallelism every rank holds the same parameters, bit for bit; a rank that does not has gone wrong in
silence. At a save each rank digests a window of what it holds, and the windows are compared; the next save takes the
next window, so that a known number of saves covers every byte.
Invariant: nothing is changed, and what is compared are bytes: a NaN equals the same NaN, and 0.0 is not -0.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from distckpt.checksum import digest
from distckpt.state import FlatObject
from distckpt.tensors import host_bytes, is_everywhere, local

BUDGET_BYTES = 64 << 20  # digested at each save: 2 ms of a CPU, a hundredth of a second's copy from a GPU
_WIDENED = {torch.float8_e4m3fn: torch.float16, torch.float8_e5m2: torch.float16}  # torch takes no norm of these


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A part of one tensor: elements `begin` to `end` of it as this rank holds it, flattened."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A tensor that is not the same on all ranks.

    Attributes:
        name: The entry's name.
        ranks: Those that hold something else than most ranks; of two equally large groups, than the one with rank 0.
    """

    name: str
    ranks: tuple[int, ...]


def replicas(objects: Iterable[FlatObject]) -> dict[str, torch.Tensor]:
    """Return the tensors of modules and optimizers of which every rank holds its own copy, all meant to be the same.

    Left out are buffers, of which rank 0's count; what is each rank's own; and what is distributed over ranks.

    Ranks: any.
    """
    return {
        entry.name: local(entry.tensor)
        for flat in objects
        if flat.kind in ("module", "optimizer") and not flat.per_rank
        for entry in flat.entries
        if entry.owner is None and is_everywhere(entry.tensor)
    }


def num_turns(tensors: Mapping[str, torch.Tensor], *, budget_bytes: int = BUDGET_BYTES) -> int:
    """Return in how many turns `sample` has covered every byte; at least 1.

    Ranks: any.
    """
    return max(1, math.ceil(sum(tensor.nbytes for tensor in tensors.values()) / budget_bytes))


def sample(tensors: Mapping[str, torch.Tensor], *, turn: int, budget_bytes: int = BUDGET_BYTES) -> list[Window]:
    """Return what to compare at this save: about `budget_bytes` of all, the same choice on every rank.

    Laid end to end in the order of their names, the tensors are cut into `num_turns` windows of one size; turn 0 takes
    the first of them, and so on, round and round. So any `num_turns` turns in a row cover every byte.

    Args:
        tensors: By name; the same names, shapes and dtypes on every rank.
        turn: A number that every rank knows and that grows by one from save to save: step // every, or a count.
        budget_bytes: How much to take at most, but for the elements that lie on an edge.

    Ranks: any.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    turns = num_turns(tensors, budget_bytes=budget_bytes)
    first, last = (total * (turn % turns + more) // turns for more in (0, 1))
    windows, offset = [], 0
    for name in sorted(tensors):
        tensor = tensors[name]
        begin = (max(first, offset) - offset) // tensor.element_size()
        end = -(-(min(last, offset + tensor.nbytes) - offset) // tensor.element_size())
        if begin < end:
            windows.append(Window(name=name, begin=begin, end=end))
        offset += tensor.nbytes
    return windows


def digests(tensors: Mapping[str, torch.Tensor], windows: Sequence[Window]) -> dict[str, str]:
    """Return the digest of each window's bytes, by the tensor's name.

    Ranks: any; blocks on one copy from each device.
    """
    found: dict[str, str] = {}
    on_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    with torch.no_grad():
        for window in windows:
            flat = tensors[window.name].resolve_conj().resolve_neg().reshape(-1)[window.begin : window.end]
            if flat.device.type == "cpu":
                found[window.name] = digest(host_bytes(flat))
            else:
                on_device.setdefault(flat.device, []).append((window.name, flat.view(torch.uint8)))
        for parts in on_device.values():
            # One copy for all: thousands of small ones would each wait for the device.
            data, offset = host_bytes(torch.cat([part for _, part in parts])), 0
            for name, part in parts:
                found[name] = digest(data[offset : offset + part.numel()])
                offset += part.numel()
    return found


def combined(found: Mapping[str, str]) -> str:
    """Return one digest for all: ranks exchange this, and the single ones only where it differs.

    Ranks: any.
    """
    return digest("".join(f"{name} {found[name]}\n" for name in sorted(found)).encode())


def differences(by_rank: Sequence[Mapping[str, str]]) -> list[Difference]:
    """Return the tensors that are not the same on all ranks, with the ranks that are in the minority.

    Args:
        by_rank: What `digests` returned on each rank; a name that a rank lacks counts as different there.

    Ranks: any.
    """
    found = []
    for name in sorted({name for one in by_rank for name in one}):
        groups: dict[str | None, list[int]] = {}
        for rank, one in enumerate(by_rank):
            groups.setdefault(one.get(name), []).append(rank)
        if len(groups) > 1:
            most = max(groups.values(), key=lambda ranks: (len(ranks), -ranks[0]))
            odd = sorted(rank for ranks in groups.values() if ranks is not most for rank in ranks)
            found.append(Difference(name=name, ranks=tuple(odd)))
    return found


def non_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity, in the mapping's order.

    A norm of each tensor is taken on its device, all in a few fused calls; a NaN or an infinity goes through it. A norm
    may also overflow, so the few that it points at are looked at again, element by element.

    Source: for 300 MB of float32 on one core, 8 ms in 300 tensors and 37 ms in 20,000; `isfinite` on each takes 141 and
        220 ms, the norm of the largest element 192 and 215.

    Ranks: any; blocks on one answer from each device.
    """
    groups: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            part = local(tensor)
            if part.numel() and not part.is_meta and (part.is_floating_point() or part.is_complex()):
                real = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
                groups.setdefault((real.device, real.dtype), {})[name] = real
        suspects = {name for group in groups.values() for name in _with_odd_norm(group)}
        parts = {name: part for group in groups.values() for name, part in group.items()}
        return [name for name in tensors if name in suspects and not _is_finite(parts[name])]


def _with_odd_norm(group: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of those, all of one dtype on one device, whose norm is no finite number."""
    parts = list(group.values())
    if parts[0].dtype in _WIDENED:
        # One at a time, so that not all of them are there twice.
        norms = [torch.linalg.vector_norm(part.to(_WIDENED[part.dtype])) for part in parts]
    else:
        norms = list(torch._foreach_norm(parts, 2))
    is_odd = (~torch.stack(norms).isfinite()).cpu()
    return [name for name, odd in zip(group, is_odd.tolist(), strict=True) if odd]


def _is_finite(part: torch.Tensor) -> bool:
    wide = part.to(_WIDENED[part.dtype]) if part.dtype in _WIDENED else part
    return bool(wide.isfinite().all())

"""What a machine with a GPU can do: copy rates between device and host, pinned and pageable, and its disk.

    python -m benchmarks.gpu_limits --device cuda

On a CPU, where it is only tried out, "device" is ordinary memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch

from benchmarks import options
from benchmarks.ceilings import RawBytes, timed
from benchmarks.disk import forget, remove
from benchmarks.kernel import counters, is_cold
from benchmarks.machine import file_system
from benchmarks.options import Options
from benchmarks.report import Report
from benchmarks.rounds import Cell, interleave
from benchmarks.targets import Column
from benchmarks.team import Team

ABOUT = "GB/s between device, host and disk"
NUM_BYTES = {"tiny": 8 << 20, "moderate": 1 << 30, "full": 4 << 30}
NUM_PIECES = 500  # as many tensors as a model may have, beside one piece
WARM_UPS = 1


def measure(options: Options, team: Team) -> None:
    """Measure, and report."""
    num_bytes = NUM_BYTES[options.size]
    cells = {**copy_cells(num_bytes, options), **disk_cells(num_bytes, options)}
    for cell in cells.values():
        for _ in range(WARM_UPS):
            cell()
    report = Report(
        benchmark="gpu_limits",
        about=ABOUT,
        facts={
            "size": options.size,
            "bytes": num_bytes,
            "device": options.device,
            "file_system": file_system(options.directory),
        },
        columns=[Column(title="GB/s", measure="gb_per_s"), Column(title="s", measure="copy_s")],
        run=interleave(cells, team=team, rules=options.rules),
        limits=tuple(cells),
    )
    if team.rank == 0:
        report.give(options.results)


def copy_cells(num_bytes: int, options: Options) -> dict[str, Cell]:
    """Return the copies: to and from the device, with memory that is pinned and that is not, whole and in pieces."""
    on_gpu = options.device == "cuda"
    device = torch.ones(num_bytes, dtype=torch.uint8, device=options.device)
    other = torch.ones_like(device)
    pageable = torch.ones(num_bytes, dtype=torch.uint8)
    pinned = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    piece = num_bytes // NUM_PIECES

    def copies(to: torch.Tensor, source: torch.Tensor, *, in_pieces: bool = False) -> Cell:
        targets, sources = ([to], [source]) if not in_pieces else (list(to.split(piece)), list(source.split(piece)))

        def work() -> None:
            torch._foreach_copy_(targets, sources, non_blocking=True)
            if on_gpu:
                torch.cuda.synchronize()

        return lambda: rate(timed(work), num_bytes)

    def fresh() -> Mapping[str, float]:
        return rate(timed(lambda: device.to("cpu", copy=True)), num_bytes)

    return {
        "device to pinned": copies(pinned, device),
        f"device to pinned, {NUM_PIECES} pieces": copies(pinned, device, in_pieces=True),
        "device to pageable": copies(pageable, device),
        "device to fresh pages": fresh,
        "pinned to device": copies(device, pinned),
        f"pinned to device, {NUM_PIECES} pieces": copies(device, pinned, in_pieces=True),
        "pageable to device": copies(device, pageable),
        "device to device": copies(other, device),
        "host to host": copies(pageable, pinned),
    }


def disk_cells(num_bytes: int, options: Options) -> dict[str, Cell]:
    """Return the raw writes, each with an fsync, and a raw read with a cold and a warm cache."""
    raw = RawBytes(num_bytes)
    written, source = options.directory / "raw", options.directory / "source"
    raw.write_buffered(source)
    into = bytearray(num_bytes)

    def write(method: str) -> Cell:
        def cell() -> Mapping[str, float]:
            seconds = timed(lambda: getattr(raw, method)(written))
            remove(written)
            return rate(seconds, num_bytes)

        return cell

    def read(*, cold: bool) -> Cell:
        def work() -> None:
            with source.open("rb", buffering=0) as file:
                file.readinto(into)

        def cell() -> Mapping[str, float]:
            if cold:
                forget(source)
            before = counters()
            seconds = timed(work)
            is_from_device = is_cold((counters() - before).read_bytes, num_bytes)
            return rate(seconds, num_bytes) if is_from_device == cold else {}

        return cell

    methods = ("write_buffered", "write_reserved", "write_direct")
    writes = {f"disk, {method.replace('_', ' ')}": write(method) for method in methods}
    return {**writes, "disk, cold read": read(cold=True), "disk, warm read": read(cold=False)}


def rate(seconds: float, num_bytes: int) -> Mapping[str, float]:
    """Return a copy's measures."""
    return {"copy_s": seconds, "gb_per_s": num_bytes / seconds / 1e9}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    return options.run(measure, module="benchmarks.gpu_limits", about=ABOUT, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())

"""The kernel's own counters of this process: bytes from and to the device, bytes on its sockets, processor time.

What a program says about itself may be wrong; these are not.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

_TCP_INFO_BYTES = 136  # as far as tcpi_bytes_received in linux/tcp.h
_TCP_INFO_BYTES_AT = 120  # tcpi_bytes_acked, then tcpi_bytes_received, 64 bits each


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What this process has used so far; the difference of two is what happened between them.

    Attributes:
        read_bytes: Bytes that the device had to deliver; what the page cache served does not count.
        written_bytes: Bytes that were sent to the device, or will be.
        cpu_s: Processor seconds of all threads, in user and system mode, and of children that have ended.
        wire_bytes: Bytes that were sent over this process's open TCP sockets and received from them.
    """

    read_bytes: int
    written_bytes: int
    cpu_s: float
    wire_bytes: int

    def __sub__(self, other: Counters) -> Counters:
        return Counters(
            read_bytes=self.read_bytes - other.read_bytes,
            written_bytes=self.written_bytes - other.written_bytes,
            cpu_s=self.cpu_s - other.cpu_s,
            wire_bytes=self.wire_bytes - other.wire_bytes,
        )


def counters() -> Counters:
    """Return what this process has used so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    io = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Counters(
        read_bytes=io["read_bytes"],
        written_bytes=io["write_bytes"] - io["cancelled_write_bytes"],
        cpu_s=sum(usage.ru_utime + usage.ru_stime for usage in usages),
        wire_bytes=_wire_bytes(),
    )


def _wire_bytes() -> int:
    """Return what went over the TCP sockets that are open now; sockets of two ranks on one node count on both."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not str(link.readlink()).startswith("socket:"):
                continue
            duplicate = os.dup(int(link.name))
        except OSError:
            continue  # it was closed meanwhile
        with socket.socket(fileno=duplicate) as sock:
            try:
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            except OSError:
                continue  # no TCP
        if len(info) >= _TCP_INFO_BYTES:
            total += sum(struct.unpack_from("QQ", info, _TCP_INFO_BYTES_AT))
    return total


def is_cold(read_bytes: int, num_bytes: int) -> bool:
    """Say whether a read of `num_bytes` really came from the device: at least 98 % of them, says the kernel."""
    return read_bytes >= 0.98 * num_bytes


def reset_most_memory() -> None:
    """Give memory that is free back to the kernel, and let `most_memory_bytes` begin anew."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def most_memory_bytes() -> int:
    """Return the most memory that this process has had at once since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [peak] = [line for line in lines if line.startswith("VmHWM")]
    return int(peak.split()[1]) * 1024

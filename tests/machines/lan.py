"""A local network in user space: a switch between TAP devices, whose links can be cut, slowed and made to lose frames.

Each machine's network card is a TAP device, and whatever its kernel sends comes through here as Ethernet frames. So
TCP on these links is the real one, with its own retransmissions and timeouts, on any kernel that has TUN/TAP.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import random
import selectors
import struct
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
_FRAME_BYTES = 65536
_NO_ADDRESS = b"\xff" * 6


def open_tap(name: str) -> int:
    """Make a TAP device and return what its frames are read from and written to; it lives until that is closed."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    except OSError:
        os.close(fd)
        raise
    return fd


@dataclass(slots=True, kw_only=True)
class Link:
    """How the link of one machine is; may be changed at any time.

    Attributes:
        fd: Its TAP device.
        is_cut: Whether nothing comes through, in either direction.
        loss: The share of the frames that get lost, in either direction.
        delay_s: How long frames from this machine are under way.
        bytes_per_s: How many bytes of this machine come through in a second; None for as many as can be.
        free_at: When the last frame that was sent has left.
    """

    fd: int
    is_cut: bool = False
    loss: float = 0.0
    delay_s: float = 0.0
    bytes_per_s: float | None = None
    free_at: float = 0.0


class Switch:
    """Carries frames between links, on a thread of its own, until it is closed.

    Args:
        seed: Decides which frames get lost.

    Attributes:
        num_lost: How many frames did.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.num_lost = 0
        self._random = random.Random(seed)
        self._links: dict[int, Link] = {}
        self._homes: dict[bytes, int] = {}
        self._on_the_way: list[tuple[float, int, int, bytes]] = []
        self._order = itertools.count()
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._wake_read, self._wake_write = os.pipe()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._work, name="switch", daemon=True)
        self._thread.start()

    def attach(self, fd: int) -> Link:
        """Plug in a TAP device; it is the switch's from now on."""
        link = Link(fd=fd)
        with self._lock:
            self._links[fd] = link
            self._selector.register(fd, selectors.EVENT_READ)
        os.write(self._wake_write, b"+")
        return link

    def detach(self, link: Link) -> None:
        """Pull a TAP device out, and close it."""
        with self._lock:
            self._forget(link.fd)

    def close(self) -> None:
        """Stop, and close all devices."""
        os.write(self._wake_write, b"x")
        self._thread.join()
        with self._lock:
            for fd in list(self._links):
                self._forget(fd)
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forget(self, fd: int) -> None:
        if self._links.pop(fd, None) is not None:
            self._selector.unregister(fd)
            self._homes = {address: home for address, home in self._homes.items() if home != fd}
            os.close(fd)

    def _work(self) -> None:
        while True:
            with self._lock:
                due = self._on_the_way[0][0] - time.monotonic() if self._on_the_way else None
            ready = self._selector.select(None if due is None else max(due, 0.0))
            for key, _ in ready:
                if key.fd == self._wake_read:
                    if b"x" in os.read(self._wake_read, 64):
                        return
                    continue
                with self._lock:
                    self._take_from(key.fd)
            with self._lock:
                self._deliver()

    def _take_from(self, fd: int) -> None:
        """Take what a machine sends, and put it on its way."""
        link = self._links.get(fd)
        while link is not None:
            try:
                frame = os.read(fd, _FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError:  # the device went with its machine
                self._forget(fd)
                return
            if link.is_cut or self._is_lost(link):
                continue
            now = time.monotonic()
            link.free_at = max(link.free_at, now)
            if link.bytes_per_s is not None:
                link.free_at += len(frame) / link.bytes_per_s
            self._homes[frame[6:12]] = fd
            heapq.heappush(self._on_the_way, (link.free_at + link.delay_s, next(self._order), fd, frame))

    def _deliver(self) -> None:
        """Bring the frames that are due to where they belong: to their address, or, if that is not known, to all."""
        now = time.monotonic()
        while self._on_the_way and self._on_the_way[0][0] <= now:
            _, _, source, frame = heapq.heappop(self._on_the_way)
            home = self._homes.get(frame[:6])
            for fd in [home] if home is not None else list(self._links):
                link = self._links.get(fd)
                if fd == source or link is None or link.is_cut or self._is_lost(link):
                    continue
                try:
                    os.write(fd, frame)
                except BlockingIOError:
                    self.num_lost += 1  # as a full queue does it
                except OSError:
                    self._forget(fd)

    def _is_lost(self, link: Link) -> bool:
        lost = link.loss > 0 and self._random.random() < link.loss
        self.num_lost += lost
        return lost

"""A link as long and as narrow as one to a distant object store, between a client and a server on this machine.

    python -m benchmarks.slow_link http://127.0.0.1:7480 --latency-ms 30 --connection-mb-s 90

Each connection has a rate of its own in either direction, and waits one round trip when it is made and whenever the
conversation turns round. Bytes pass inside the kernel (splice), so the link itself costs next to no processor time.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

PIPE_BYTES = 1 << 20
SLICE_BYTES = 256 << 10


class Link:
    """One connection, relayed.

    Args:
        client: The accepted socket.
        server: Where to connect to.
        latency_s: A round trip, in seconds.
        bytes_per_s: The rate of either direction; 0 for no limit.
    """

    def __init__(self, client: socket.socket, server: tuple[str, int], *, latency_s: float, bytes_per_s: float) -> None:
        time.sleep(latency_s)
        self._client = client
        self._server = socket.create_connection(server)
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._last = ""
        for sock in (self._client, self._server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def relay(self) -> None:
        """Pass bytes both ways until both sides have hung up."""
        back = threading.Thread(target=self._pass, args=(self._server, self._client, "answer"), daemon=True)
        back.start()
        self._pass(self._client, self._server, "request")
        back.join()
        self._client.close()
        self._server.close()

    def _pass(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        readable, writable = os.pipe()
        fcntl.fcntl(writable, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        due = time.monotonic()
        try:
            while num_bytes := os.splice(source.fileno(), writable, SLICE_BYTES):
                now = time.monotonic()
                if self._last != direction:
                    if direction == "answer":
                        time.sleep(self._latency_s)
                        now = time.monotonic()
                    self._last = direction
                if self._bytes_per_s:
                    due = max(due, now - 0.01) + num_bytes / self._bytes_per_s
                    if due > now:
                        time.sleep(due - now)
                left = num_bytes
                while left:
                    left -= os.splice(readable, sink.fileno(), left)
        except OSError:
            pass
        finally:
            os.close(readable)
            os.close(writable)
            with suppress(OSError):
                sink.shutdown(socket.SHUT_WR)


def main(arguments: list[str] | None = None) -> int:
    """Relay connections until the process is ended; the first line says where it listens."""
    parser = argparse.ArgumentParser(description="a long and narrow link to a server")
    parser.add_argument("server", help="the server's URL")
    parser.add_argument("--latency-ms", type=float, default=30.0, help="a round trip")
    parser.add_argument("--connection-mb-s", type=float, default=90.0, help="each connection's rate; 0 is no limit")
    parsed = parser.parse_args(arguments)
    url = urlsplit(parsed.server)
    server = (str(url.hostname), url.port or 80)
    latency_s, bytes_per_s = parsed.latency_ms / 1e3, parsed.connection_mb_s * 1e6
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        while True:
            client, _ = listening.accept()
            threading.Thread(
                target=lambda client=client: Link(  # type: ignore[misc]
                    client, server, latency_s=latency_s, bytes_per_s=bytes_per_s
                ).relay(),
                daemon=True,
            ).start()


if __name__ == "__main__":
    sys.exit(main())

"""An HTTP proxy in front of an S3 server that misbehaves on demand, on real sockets."""

from __future__ import annotations

import http.client
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import urlsplit

Action = Literal[
    "answer",  # answer with `status` and `code`, and do not ask the server
    "lose-answer",  # let the server do it, and hang up instead of answering
    "truncate",  # hang up after half of the answer's body
    "ignore-range",  # ask for the whole object
    "ignore-condition",  # drop If-None-Match
]


@dataclass(slots=True, kw_only=True)
class Fault:
    """What goes wrong with the next `times` requests of `method` whose path and query contain `where`."""

    method: str
    action: Action
    where: str = ""
    times: int = 1
    status: int = 503
    code: str = "ServiceUnavailable"
    only_conditional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One request that came in."""

    method: str
    target: str
    headers: dict[str, str] = field(repr=False)


class FaultProxy:
    """The proxy; a context manager. `seen` lists the requests in order."""

    def __init__(self, upstream: str) -> None:
        self.seen: list[Seen] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        address = urlsplit(upstream)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def relay(self) -> None:
                proxy._relay(self, str(address.hostname), int(address.port or 80))

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = relay

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def reset(self) -> None:
        """Forget the faults, and what was seen."""
        with self._lock:
            self.seen.clear()
            self._faults.clear()

    def fail(self, fault: Fault) -> None:
        """Let this go wrong from now on."""
        with self._lock:
            self._faults.append(fault)

    def count(self, method: str, where: str = "") -> int:
        """Return how many requests of `method` came in whose path and query contain `where`."""
        with self._lock:
            return sum(seen.method == method and where in seen.target for seen in self.seen)

    def _next_fault(self, seen: Seen) -> Fault | None:
        with self._lock:
            self.seen.append(seen)
            for fault in self._faults:
                if fault.times and fault.method == seen.method and fault.where in seen.target:
                    if fault.only_conditional and "if-none-match" not in seen.headers:
                        continue
                    fault.times -= 1
                    return fault
        return None

    def _relay(self, handler: BaseHTTPRequestHandler, host: str, port: int) -> None:
        headers = {key.lower(): value for key, value in handler.headers.items()}
        body = _body(handler, headers)
        fault = self._next_fault(Seen(method=handler.command, target=handler.path, headers=headers))
        action = fault.action if fault else None
        if fault is not None and action == "answer":
            _answer(handler, fault)
            return
        if action == "ignore-range":
            headers.pop("range", None)
        if action == "ignore-condition":
            headers.pop("if-none-match", None)
        connection = http.client.HTTPConnection(host, port, timeout=30)
        try:
            connection.request(handler.command, handler.path, body=body, headers=headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if action == "lose-answer":
            handler.close_connection = True
            return
        handler.send_response_only(answer.status, answer.reason)
        for key, value in answer.getheaders():
            if key.lower() not in {"transfer-encoding", "connection"}:
                handler.send_header(key, value)
        if answer.getheader("Content-Length") is None:
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data[: len(data) // 2] if action == "truncate" else data)
        if action == "truncate":
            handler.close_connection = True


def _body(handler: BaseHTTPRequestHandler, headers: dict[str, str]) -> bytes:
    if headers.get("expect", "").lower() == "100-continue":
        headers.pop("expect")
    return handler.rfile.read(int(headers.get("content-length", 0)))


def _answer(handler: BaseHTTPRequestHandler, fault: Fault) -> None:
    text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>made to fail</Message></Error>".encode()
    handler.send_response_only(fault.status, "made to fail")
    handler.send_header("Content-Type", "application/xml")
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(text)

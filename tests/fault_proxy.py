"""An HTTP proxy in front of an S3 server that misbehaves on demand, on real sockets."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import urlsplit

NUM_PIECES = 8

Action = Literal[
    "answer",  # answer with `status` and `code`, and do not ask the server
    "cut-request",  # hang up after half of the request's body; the server does not see it
    "lose-answer",  # let the server do it, and hang up instead of answering
    "truncate",  # hang up after half of the answer's body, or of its head if it has none
    "delay",  # let the server do it, and answer `delay_s` later
    "trickle",  # answer in small pieces, over `delay_s`
    "ignore-range",  # ask for the whole object
    "ignore-condition",  # drop If-None-Match
    "call",  # nothing but to call `first` and `then`
]


@dataclass(slots=True, kw_only=True)
class Fault:
    """What goes wrong with `times` requests of `method` (any, if empty) whose path and query contain `where`.

    The first `skip` such requests go well. `first` is called before the server is asked, `then` once it has done
    it, before the client is answered.
    """

    action: Action
    method: str = ""
    where: str = ""
    times: int = 1
    skip: int = 0
    status: int = 503
    code: str = "ServiceUnavailable"
    delay_s: float = 0.0
    only_conditional: bool = False
    first: Callable[[], None] = lambda: None
    then: Callable[[], None] = lambda: None


@dataclass(slots=True, kw_only=True)
class Seen:
    """One request that came in, the sizes of its body and of its answer's, and the answer's status; 0 without one."""

    method: str
    target: str
    headers: dict[str, str] = field(repr=False)
    num_bytes: int = 0
    num_answered: int = 0
    status: int = 0


class FaultProxy:
    """The proxy; a context manager. `seen` lists the requests in order."""

    def __init__(self, upstream: str) -> None:
        self.seen: list[Seen] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
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
        self._stopped.set()
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

    def num_uploaded(self) -> int:
        """Return how many bytes came in as bodies of requests."""
        with self._lock:
            return sum(seen.num_bytes for seen in self.seen)

    def num_downloaded(self) -> int:
        """Return how many bytes went out as bodies of answers to GET."""
        with self._lock:
            return sum(seen.num_answered for seen in self.seen if seen.method == "GET")

    def _next_fault(self, seen: Seen) -> Fault | None:
        with self._lock:
            self.seen.append(seen)
            for fault in self._faults:
                if fault.times and fault.method in ("", seen.method) and fault.where in seen.target:
                    if fault.only_conditional and "if-none-match" not in seen.headers:
                        continue
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def _relay(self, handler: BaseHTTPRequestHandler, host: str, port: int) -> None:
        headers = {key.lower(): value for key, value in handler.headers.items()}
        # A client that takes this for a proxy sends whole URLs; whom they are meant for is in the header, too.
        target = urlsplit(handler.path)._replace(scheme="", netloc="").geturl()
        seen = Seen(method=handler.command, target=target, headers=dict(headers))
        fault = self._next_fault(seen)
        action = fault.action if fault else None
        body = _body(handler, headers, is_cut=action == "cut-request")
        seen.num_bytes = len(body)
        if action == "cut-request" or len(body) < int(headers.get("content-length", 0)):  # the client may hang up, too
            handler.close_connection = True
            return
        if fault is not None and action == "answer":
            seen.status = fault.status
            _answer(handler, fault)
            return
        if action == "ignore-range":
            headers.pop("range", None)
        if action == "ignore-condition":
            headers.pop("if-none-match", None)
        connection = http.client.HTTPConnection(host, port, timeout=30)
        try:
            if fault is not None:
                fault.first()
            connection.request(handler.command, target, body=body, headers=headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if fault is not None:
            fault.then()
        if action == "lose-answer":
            handler.close_connection = True
            return
        if fault is not None and action == "delay":
            self._stopped.wait(fault.delay_s)
        seen.status, seen.num_answered = answer.status, len(data)
        _hand_on(handler, answer, data, is_cut=action == "truncate", pause=self._pause(fault))

    def _pause(self, fault: Fault | None) -> Callable[[], None]:
        """Return what is called between the pieces of an answer."""
        if fault is None or fault.action != "trickle":
            return lambda: None
        return lambda: self._stopped.wait(fault.delay_s / NUM_PIECES) and None


def _hand_on(
    handler: BaseHTTPRequestHandler,
    answer: http.client.HTTPResponse,
    data: bytes,
    *,
    is_cut: bool,
    pause: Callable[[], None],
) -> None:
    """Give the client the server's answer, or half of it."""
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
    lines += [f"{k}: {v}" for k, v in answer.getheaders() if k.lower() not in {"transfer-encoding", "connection"}]
    if answer.getheader("Content-Length") is None and answer.status != 204:
        lines.append(f"Content-Length: {len(data)}")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    if handler.command == "HEAD":
        data = b""
    if is_cut:
        handler.close_connection = True
        handler.wfile.write(head + data[: len(data) // 2] if data else head[: len(head) // 2])
        return
    handler.wfile.write(head)
    size = max(1, -(-len(data) // NUM_PIECES))
    for begin in range(0, len(data), size):
        handler.wfile.write(data[begin : begin + size])
        pause()


def _body(handler: BaseHTTPRequestHandler, headers: dict[str, str], *, is_cut: bool) -> bytes:
    if headers.get("expect", "").lower() == "100-continue":
        headers.pop("expect")
    num_bytes = int(headers.get("content-length", 0))
    return handler.rfile.read(num_bytes // 2 if is_cut else num_bytes)


def _answer(handler: BaseHTTPRequestHandler, fault: Fault) -> None:
    text = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>made to fail</Message></Error>".encode()
    handler.send_response_only(fault.status, "made to fail")
    handler.send_header("Content-Type", "application/xml")
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(text)

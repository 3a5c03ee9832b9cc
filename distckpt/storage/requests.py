"""Requests to an S3 server by s3fs's client, tried again as `retries` says, no more at once than `window` lets.

s3fs does what users know it for: settings, credentials, regions, requester pays, encryption. Its own retries and
botocore's are switched off, so that one place counts tries and sees throttling.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem

from distckpt.storage.connection import Connection
from distckpt.storage.failures import server_code
from distckpt.storage.jobs import Job, run
from distckpt.storage.parts import AT_ONCE
from distckpt.storage.retries import Patience, gave_up, judged
from distckpt.storage.window import Window

T = TypeVar("T")

# At once, as long as the server keeps up. Source: Amazon gives about 90 MB/s to one connection.
MOST_REQUESTS = AT_ONCE
SPARE_CONNECTIONS = 8

logger = logging.getLogger("distckpt")


class Requests:
    """Requests of one storage; any thread may make them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._fs: AbstractFileSystem | None = None
        self._client: Any = None
        self.patience = Patience()
        self.window = Window(MOST_REQUESTS)

    def filesystem(self) -> AbstractFileSystem:
        """Return s3fs's filesystem, with the settings that this class depends on."""
        fs = self._connection.filesystem()
        if fs is not self._fs:
            config = dict(fs.storage_options.get("config_kwargs") or {})  # as the user gave it
            self.patience = Patience.of_settings(config.get("retries"))
            config["retries"] = {"mode": "standard", "total_max_attempts": 1}
            config.setdefault("max_pool_connections", MOST_REQUESTS + SPARE_CONNECTIONS)
            # Data files and manifests have digests that cover every byte, and publish sends an MD5: hashing each body
            # for the signature as well would cost more processor time than all the rest of an upload.
            config["s3"] = {"payload_signing_enabled": False, **(config.get("s3") or {})}
            fs.config_kwargs = config
            fs.retries = 1
            self.window = Window(MOST_REQUESTS)  # of this filesystem's event loop
            self._fs = fs
        return fs

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that makes requests, and return its result."""
        return run(work, self.filesystem().loop)

    def begin(self, work: Coroutine[Any, Any, T], *, on_end: Callable[[], None] | None = None) -> Job[T]:
        """Begin a coroutine that makes requests."""
        return Job(work, self.filesystem().loop, on_end=on_end)

    def call(self, method: str, *, most_tries: int | None = None, **parameters: Any) -> dict[str, Any]:
        """Make one request, from any thread, and return the server's answer."""
        return self.run(self.patiently(lambda: self.once(method, **parameters), most_tries=most_tries))

    def connected(self) -> Any:
        """Return botocore's client, which knows what has become of all settings; made at the first use."""
        self.run(self.ready())
        return self._client

    async def once(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Make one request, once."""
        fs = self.filesystem()
        await self.ready()
        answer: dict[str, Any] = await fs._call_s3(method, **parameters)
        return answer

    async def ready(self) -> None:
        """Make botocore's client, if there is none yet or its connections are lost."""
        fs = self.filesystem()
        await fs.set_session()
        client = fs._s3
        if client is not self._client:
            # Without it, each part would wait for the server's "100 Continue": a round trip for nothing.
            client.meta.events.register("before-sign.s3", _drop_expect, unique_id="distckpt-no-expect")
            self._client = client

    async def patiently(self, attempt: Callable[[], Awaitable[T]], *, most_tries: int | None = None) -> T:
        """Return what `attempt` returns, tried again while that may help, as often as `patience` and `most_tries` say.

        Raises:
            GaveUpError: Trying again did not help within the limits of `patience`.
            Exception: Of `attempt`, if trying again would not help.
        """
        tries = min(self.patience.tries, most_tries or self.patience.tries)
        clock = asyncio.get_running_loop().time
        begin, num_failed, is_renewed = clock(), 0, False
        while True:
            client = self._fs._s3 if self._fs is not None else None
            try:
                async with self.window:
                    result = await attempt()
                    self.window.succeeded()
                    return result
            except Exception as error:
                verdict = judged(error)
                if verdict == "never" or (verdict == "renew" and is_renewed):
                    raise
                num_failed += 1
                pause = self.patience.pause(num_failed)
                elapsed_s = clock() - begin
                if verdict == "renew":
                    await self._renew(client)
                    is_renewed, pause = True, 0.0
                elif num_failed >= tries or elapsed_s + pause > self.patience.limit_s:
                    raise gave_up(error, num_tries=num_failed, elapsed_s=elapsed_s) from error
                if verdict == "busy":
                    self.window.throttled()
                logger.debug("S3 request tried again in %.1f s (%s): %s", pause, verdict, server_code(error))
            await asyncio.sleep(pause)

    @property
    def streams_bodies(self) -> bool:
        """Whether the client sends bodies by aiohttp; botocore's clients can also be told to use httpx."""
        return type(self._client._endpoint.http_session).__name__ == "AIOHTTPSession"

    def renew(self) -> None:
        """Look the credentials up anew; from any thread."""
        self.run(self._renew(self._client))

    def slow_down(self) -> None:
        """Let fewer requests be on their way from now on; from any thread."""
        self.filesystem().loop.call_soon_threadsafe(self.window.throttled)

    async def _renew(self, client: Any) -> None:
        """Look the credentials up anew, once for all requests that failed with the same client."""
        fs = self.filesystem()
        if fs._s3 is client:
            await fs.set_session(refresh=True)

    @property
    def is_amazon(self) -> bool:
        """Whether the server is Amazon's own, which keeps every promise; asks nothing, and connects to nothing new."""
        url = str(getattr(getattr(self._client, "meta", None), "endpoint_url", ""))
        return (urlsplit(url).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _drop_expect(request: Any, **_: Any) -> None:
    del request.headers["Expect"]

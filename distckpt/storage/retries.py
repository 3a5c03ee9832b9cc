"""When to try again: which errors a retry can mend, how long to pause, and when to give up."""

from __future__ import annotations

import errno
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distckpt.storage.failures import STALE_CREDENTIALS, chain, server_code, server_status

Verdict = Literal["busy", "again", "renew", "never"]
"""What an error asks for: fewer requests and another try, another try, fresh credentials, or nothing."""

_BUSY = {
    "429",
    "503",
    "BandwidthLimitExceeded",
    "RequestLimitExceeded",
    "RequestThrottled",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_AGAIN = {
    "BadDigest",  # the bytes were damaged on their way
    "IncompleteBody",
    "InternalError",
    "RequestTimeout",
    "XAmzContentSHA256Mismatch",
}
_LOST = {  # names, for neither botocore nor aiohttp is imported here
    "ClientConnectionError",
    "ClientOSError",
    "ClientPayloadError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "EndpointConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ProxyConnectionError",
    "ReadTimeoutError",
    "ResponseParserError",
    "ResponseStreamingError",
    "ServerDisconnectedError",
}


class BrokenAnswerError(Exception):
    """A good answer whose body is not what was asked for: cut short, or an error's text."""


class GaveUpError(OSError):
    """The last of several tries failed; its error is the cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often one request is tried, and for how long.

    Pauses double from `pause_s` to `longest_pause_s`; each is drawn between half of that and all of it, so that many
    ranks that were refused together do not come back together.

    Attributes:
        tries: How often at most, the first time included.
        limit_s: No try begins later than this many seconds after the first one.
        pause_s: The first pause in seconds.
        longest_pause_s: The longest pause in seconds.
    """

    tries: int = 8
    limit_s: float = 60.0
    pause_s: float = 0.2
    longest_pause_s: float = 8.0

    def pause(self, num_failed: int) -> float:
        """Return how many seconds to wait after that many failures in a row."""
        longest = min(self.longest_pause_s, self.pause_s * 2.0 ** (num_failed - 1))
        return longest * random.uniform(0.5, 1.0)

    @classmethod
    def of_settings(cls, retries: Mapping[str, Any] | None) -> Patience:
        """Return the patience that botocore's setting `retries` asks for; ours where it says nothing."""
        settings = retries or {}
        if "total_max_attempts" in settings:
            return cls(tries=max(1, int(settings["total_max_attempts"])))
        if "max_attempts" in settings:  # botocore's older name, which does not count the first try
            return cls(tries=int(settings["max_attempts"]) + 1)
        return cls()


def judged(error: BaseException) -> Verdict:
    """Say what a failed request asks for."""
    code, status = server_code(error), server_status(error)
    if code in STALE_CREDENTIALS:
        return "renew"
    if code in _BUSY or status in {429, 503}:
        return "busy"
    if code in _AGAIN or (status is not None and status >= 500 and status != 501):
        return "again"
    if code is not None:
        return "never"
    links = list(chain(error))
    if any("CERTIFICATE_VERIFY_FAILED" in str(link) for link in links):
        return "never"
    is_lost = any(
        isinstance(link, BrokenAnswerError | TimeoutError | ConnectionError) or type(link).__name__ in _LOST
        for link in links
    )
    return "again" if is_lost else "never"


def gave_up(error: BaseException, *, num_tries: int, elapsed_s: float) -> GaveUpError:
    """Return the error that says how often something was tried; raise it from `error`."""
    words = " ".join(str(error.args[1] if isinstance(error, OSError) and len(error.args) > 1 else error).split())
    code = server_code(error)
    if code is not None and code not in words:
        words = f"{words} ({code})"
    tries = "once" if num_tries == 1 else f"{num_tries} times in {elapsed_s:.0f} s"
    number = error.errno if isinstance(error, OSError) and error.errno is not None else errno.EIO
    return GaveUpError(number, f"{words or type(error).__name__}; tried {tries}, trying again later may help")

"""What botocore has made of the user's settings, as obstore takes them; or why obstore cannot follow them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from distckpt.storage.parts import USUAL_PART
from distckpt.storage.requests import Requests

SLOWEST = 256 << 10  # bytes a second that one connection must carry, lest its request be given up
_ADDRESSING = {None, "auto", "path", "virtual"}
_SIGNATURES = {"s3v4", "v4"}


def hindrance(fs: Any, client: Any) -> str | None:
    """Return which setting obstore would not follow as s3fs does; None if there is none."""
    config, s3 = client.meta.config, client.meta.config.s3 or {}
    is_secure = str(client.meta.endpoint_url).startswith("https://")
    hindrances = {
        "s3_additional_kwargs": bool(fs.s3_additional_kwargs),
        "requester_pays": bool(fs.requester_pays),
        "version_aware": bool(fs.version_aware),
        "cache_regions": bool(fs.cache_regions),
        "a proxy": bool(config.proxies or getproxies().keys() & {"http", "https", "all"}) and not _is_local(client),
        "a client certificate": bool(config.client_cert),
        "unchecked certificates": is_secure and not (_verify(client) is True or Path(str(_verify(client))).is_file()),
        "missing credentials": client._request_signer._credentials is None,
        f"addressing_style {s3.get('addressing_style')!r}": s3.get("addressing_style") not in _ADDRESSING,
        f"signature_version {config.signature_version!r}": config.signature_version not in _SIGNATURES,
        "signed payloads": s3.get("payload_signing_enabled") is not False,
        "request checksums": config.request_checksum_calculation != "when_required",
        "an accelerated, dual-stack or FIPS endpoint": bool(
            s3.get("use_accelerate_endpoint")
            or s3.get("use_dualstack_endpoint")
            or config.use_dualstack_endpoint
            or config.use_fips_endpoint
        ),
    }
    return next((what for what, is_so in hindrances.items() if is_so), None)


def _verify(client: Any) -> Any:
    return getattr(client._endpoint.http_session, "_verify", None)


def _is_local(client: Any) -> bool:
    return bool(proxy_bypass(urlsplit(client.meta.endpoint_url).hostname or ""))


def make_store(obstore: Any, requests: Requests, client: Any, bucket: str) -> Any:
    """Return obstore's store with s3fs's endpoint, region, addressing, credentials, timeouts and patience."""
    endpoint, config, patience = str(client.meta.endpoint_url), client.meta.config, requests.patience
    is_virtual = _is_virtual(config.s3 or {}, endpoint, bucket)
    if is_virtual:
        scheme, _, host = endpoint.partition("://")
        endpoint = f"{scheme}://{bucket}.{host}"
    credentials = client._request_signer._credentials
    options: dict[str, Any] = {}
    if endpoint.startswith("https://") and _verify(client) is not True:
        options["root_certificate"] = Path(_verify(client)).read_bytes()
    return obstore.S3Store(
        bucket,
        endpoint=endpoint,
        region=client.meta.region_name or "us-east-1",
        virtual_hosted_style_request=is_virtual,
        unsigned_payload=True,
        credential_provider=_provider(requests, credentials),
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=float(config.connect_timeout)),
            "timeout": timedelta(seconds=float(config.read_timeout) + USUAL_PART / SLOWEST),
            "http1_only": True,
            **options,
        },
        retry_config={
            "max_retries": patience.tries - 1,
            "retry_timeout": timedelta(seconds=patience.limit_s),
            "backoff": {
                "init_backoff": timedelta(seconds=patience.pause_s),
                "max_backoff": timedelta(seconds=patience.longest_pause_s),
                "base": 2,
            },
        },
    )


def _is_virtual(settings: dict[str, Any], endpoint: str, bucket: str) -> bool:
    """Say whether the bucket stands in the host's name, as botocore decides it."""
    style = settings.get("addressing_style") or "auto"
    if style != "auto":
        return bool(style == "virtual")
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn")) and "." not in bucket


def _provider(requests: Requests, credentials: Any) -> Callable[[], dict[str, Any]]:
    """Return what obstore asks for credentials: botocore's own, refreshed by botocore."""

    def current() -> dict[str, Any]:
        frozen = requests.run(_frozen(credentials))
        expiry = getattr(credentials, "_expiry_time", None)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expiry if isinstance(expiry, datetime) else None,
        }

    return current


async def _frozen(credentials: Any) -> Any:
    found = credentials.get_frozen_credentials()
    return await found if inspect.isawaitable(found) else found

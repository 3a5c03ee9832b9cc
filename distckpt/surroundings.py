"""The surroundings of a process: which software it has, and where a URL's endpoint and credentials come from.

Invariant: names of places are told, such as variables and files; no secret ever is.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from typing import Any

from distckpt.diagnosis import Finding
from distckpt.version import __version__

PACKAGES = ("torch", "numpy", "fsspec", "s3fs", "botocore", "obstore", "safetensors", "xxhash", "typer", "rich")
_OPTION_KEYS = ("key", "secret", "token", "username", "password")
_METHODS = {
    "env": "the environment's AWS_ACCESS_KEY_ID",
    "shared-credentials-file": "the shared credentials file",
    "config-file": "the configuration file",
    "iam-role": "the role of this machine, from its metadata service",
    "container-role": "the role of this container",
    "assume-role": "a role that a profile assumes",
    "assume-role-with-web-identity": "a role that a web identity assumes",
    "sso": "single sign-on",
    "custom-process": "a process that a profile names",
}


def software() -> Finding:
    """Return the versions of what distckpt stands on."""
    versions = {"distckpt": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    text = "  ".join(f"{name} {version}" for name, version in versions.items())
    return Finding(name="software", verdict="good", text=f"{text}  on {platform.platform()}", facts=versions)


def access(url: str, options: Mapping[str, Any] | None) -> list[Finding]:
    """Return where the endpoint and the credentials of an S3 URL come from; nothing for other URLs."""
    if not re.match(r"s3a?://", url, re.IGNORECASE):
        return []
    given = dict(options or {})
    return [_endpoint(given), _credentials(given)]


def _endpoint(options: Mapping[str, Any]) -> Finding:
    client = options.get("client_kwargs") or {}
    places = {
        "--storage-options": options.get("endpoint_url") or client.get("endpoint_url"),
        "the environment's AWS_ENDPOINT_URL_S3": os.environ.get("AWS_ENDPOINT_URL_S3"),
        "the environment's AWS_ENDPOINT_URL": os.environ.get("AWS_ENDPOINT_URL"),
        "the profile in AWS's configuration file": _profile(options).get("endpoint_url"),
    }
    for place, found in places.items():
        if found:
            shown = re.sub(r"//[^/@]*@", "//", str(found)).partition("?")[0]
            return Finding(
                name="endpoint", verdict="good", text=f"{shown}, from {place}", facts={"endpoint": shown, "from": place}
            )
    return Finding(name="endpoint", verdict="good", text="AWS itself: no other one is set", facts={"from": None})


def _session(options: Mapping[str, Any]) -> Any:
    """Return botocore's view of AWS's variables and files.

    Raises:
        ValueError: It cannot make sense of them.
    """
    import botocore.exceptions  # type: ignore[import-untyped]
    import botocore.session  # type: ignore[import-untyped]

    try:
        session = botocore.session.Session(profile=options.get("profile"))
        session.get_scoped_config()
    except (botocore.exceptions.BotoCoreError, OSError) as error:
        raise ValueError(str(error)) from error
    return session


def _profile(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the profile that counts."""
    try:
        return dict(_session(options).get_scoped_config())
    except ValueError:
        return {}


def _credentials(options: Mapping[str, Any]) -> Finding:
    client = options.get("client_kwargs") or {}
    if options.get("anon"):
        return Finding(name="credentials", verdict="good", text="none: --storage-options ask for anonymous access")
    if any(options.get(name) for name in _OPTION_KEYS) or client.get("aws_access_key_id"):
        text = "from --storage-options, which others can read in the list of processes"
        return Finding(name="credentials", verdict="warning", text=text, facts={"from": "--storage-options"})
    try:
        found = _session(options).get_credentials()
    except Exception as error:  # noqa: BLE001  whatever a process or a role's server makes of it
        return Finding(name="credentials", verdict="bad", text=f"could not be looked up: {type(error).__name__}")
    if found is None:
        text = "none were found: not in the environment, AWS's files, nor from this machine's role"
        return Finding(name="credentials", verdict="bad", text=text, facts={"from": None})
    place = _METHODS.get(found.method, str(found.method))
    return Finding(name="credentials", verdict="good", text=f"from {place}", facts={"from": found.method})

"""Settings of S3: servers, buckets and credentials that are not there, what is sent by default, and which client."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import s3fs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fault_proxy import Fault, FaultProxy
from fsspec.config import conf
from places import IMPATIENT, TRIES
from s3_server import S3Server, point_aws_at, running_s3_server

from distckpt.errors import ConfigError, StorageError
from distckpt.storage import ObjectStorage, Storage, open_storage
from distckpt.storage.connection import Connection
from distckpt.storage.parts import LEAST_PART
from distckpt.storage.requests import Requests
from distckpt.storage.settings import make_store

LIMIT = 1 << 20


@pytest.fixture
def storage(proxy: FaultProxy, proxy_filesystem: s3fs.S3FileSystem, s3_bucket: str) -> Storage:
    return ObjectStorage(proxy_filesystem, f"{s3_bucket}/run", f"s3://{s3_bucket}/run")


def test_missing_bucket_is_told_by_list_put_and_publish(s3_bucket: str) -> None:
    storage = open_storage(f"s3://{s3_bucket}-missing/run")
    for verb in (storage.list, lambda: storage.put("f", [b"1"]), lambda: storage.publish("f", b"1")):
        with pytest.raises(StorageError, match=r"NoSuchBucket\b.*\nFix: create the bucket") as caught:
            verb()
        assert caught.value.errno == errno.ENOENT
        assert not isinstance(caught.value, FileNotFoundError)


@pytest.fixture
def nowhere(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give a URL at an endpoint where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        yield f"s3://{s3_bucket}/run"


@pytest.mark.slow
def test_an_endpoint_where_nobody_listens_fails_in_well_under_a_minute(nowhere: str) -> None:
    start = time.monotonic()
    with pytest.raises(StorageError, match="Could not connect"):
        open_storage(nowhere).put("f", [b"1"])  # with its own patience
    assert time.monotonic() - start < 30


def test_an_endpoint_where_nobody_listens_is_told_by_every_verb(nowhere: str) -> None:
    impatient = open_storage(nowhere, storage_options=IMPATIENT)
    for verb in (
        lambda: impatient.put("f", [b"1"]),
        impatient.list,
        lambda: impatient.publish("f", b"1"),
        lambda: impatient.delete(["f"]),
    ):
        with pytest.raises(
            StorageError, match=r"Could not connect to the endpoint URL.*\nFix: check that AWS_ENDPOINT_URL"
        ):
            verb()


def test_a_server_that_stays_busy_is_given_up_after_a_fixed_number_of_tries(
    storage: Storage, proxy: FaultProxy
) -> None:
    proxy.fail(Fault(method="PUT", action="answer", times=1000, status=503, code="SlowDown"))
    with pytest.raises(StorageError, match=r"SlowDown.*\nFix: the server is overloaded"):
        storage.put("f", [b"1"])
    assert proxy.count("PUT") == TRIES


def test_missing_credentials_are_told(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    storage = open_storage(f"s3://{s3_bucket}/run")
    for verb in (storage.list, lambda: storage.put("f", [b"1"]), lambda: storage.publish("f", b"1")):
        with pytest.raises(StorageError, match=r"credentials\nFix: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            verb()


@pytest.mark.parametrize(
    ("code", "fix"),
    [("InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID"), ("ExpiredToken", "renew"), ("AccessDenied", "grant")],
)
def test_refused_credentials_are_told_and_no_secret_is(
    storage: Storage, proxy: FaultProxy, code: str, fix: str
) -> None:
    proxy.fail(Fault(method="PUT", action="answer", times=100, status=403, code=code))
    with pytest.raises(StorageError, match=rf"\({code}\).*\nFix: {fix}") as caught:
        storage.put("f", [b"1"])
    assert caught.value.errno == errno.EACCES
    assert "testing-secret" not in str(caught.value) + repr(caught.value.facts) + repr(storage)


def test_parts_are_neither_signed_nor_announced_unless_asked_for(s3_bucket: str, proxy: FaultProxy) -> None:
    data = bytes(LEAST_PART + 1)
    for options, is_signed in [({}, False), ({"config_kwargs": {"s3": {"payload_signing_enabled": True}}}, True)]:
        storage = open_storage(f"s3://{s3_bucket}/run", storage_options={"engine": "s3fs", **options})
        proxy.reset()
        storage.put("f", [data], num_bytes=len(data))
        parts = [seen.headers for seen in proxy.seen if "partNumber=" in seen.target]
        assert len(parts) == 2
        assert all((headers["x-amz-content-sha256"] != "UNSIGNED-PAYLOAD") == is_signed for headers in parts)
        assert not any("expect" in headers for headers in parts)
        assert storage.read_all("f", limit_bytes=len(data)) == data


def test_an_engine_that_nobody_knows_is_refused(s3_bucket: str) -> None:
    with pytest.raises(ConfigError, match="engine 'curl' is unknown"):
        open_storage(f"s3://{s3_bucket}/run", storage_options={"engine": "curl"})


def test_obstore_is_used_by_itself_and_not_where_it_could_not_follow_the_settings(
    s3_bucket: str, proxy: FaultProxy
) -> None:
    pytest.importorskip("obstore")
    cases: list[tuple[dict[str, Any], bool]] = [
        ({}, True),
        ({"engine": "s3fs"}, False),
        ({"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}}, False),
        ({"config_kwargs": {"request_checksum_calculation": "when_supported"}}, False),
        ({"config_kwargs": {"s3": {"addressing_style": "path"}}}, True),
    ]
    for options, is_used in cases:
        open_storage(f"s3://{s3_bucket}/run", storage_options=options).put("f", [b"1"])
        assert ("object_store" in proxy.seen[-1].headers["user-agent"]) == is_used, options
    signed = {"engine": "obstore", "config_kwargs": {"s3": {"payload_signing_enabled": True}}}
    with pytest.raises(ConfigError, match="obstore cannot be used with signed payloads"):
        open_storage(f"s3://{s3_bucket}/run", storage_options=signed).put("f", [b"1"])


@pytest.mark.usefixtures("lax_server")
@pytest.mark.parametrize("engine", ["s3fs", "obstore"])
def test_expired_credentials_are_looked_up_anew_and_the_request_is_tried_again(
    s3_bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    pytest.importorskip(engine)
    storage = open_storage(f"s3://{s3_bucket}/run", storage_options={"engine": engine})
    storage.put("f", [b"1"])
    proxy.fail(Fault(method="PUT", action="answer", status=400, code="ExpiredToken"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
    storage.put("g", [b"1"])
    assert ["renewed" in seen.headers["authorization"] for seen in proxy.seen] == [False, False, True]


def test_credentials_that_stay_expired_are_looked_up_once_more_for_each_call(s3_bucket: str, proxy: FaultProxy) -> None:
    storage = open_storage(f"s3://{s3_bucket}/run", storage_options={"engine": "s3fs"})
    proxy.fail(Fault(method="PUT", action="answer", times=4, status=400, code="ExpiredToken"))
    for num_puts in (2, 4):
        with pytest.raises(StorageError, match=r"ExpiredToken.*\nFix: renew"):
            storage.put("g", [b"1"])
        assert proxy.count("PUT") == num_puts
    storage.put("g", [b"1"])


def test_a_storage_option_that_nobody_knows_is_told(s3_bucket: str) -> None:
    storage = open_storage(f"s3://{s3_bucket}/run", storage_options={"sekret": "hidden-value"})
    with pytest.raises(StorageError, match=r"sekret.*\nFix: check the names in storage_options") as caught:
        storage.list()
    assert "hidden-value" not in str(caught.value)


def test_credentials_and_endpoint_may_come_as_storage_options(
    s3_bucket: str, s3_server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(variable)
    options = {"key": s3_server.key, "secret": s3_server.secret, "endpoint_url": proxy.endpoint}
    given = dict(options)
    storage = open_storage(f"s3://{s3_bucket}/run", storage_options=options)
    storage.put("f", [b"1"])
    assert f"Credential={s3_server.key}/" in proxy.seen[-1].headers["authorization"]
    assert options == given


def test_a_profile_brings_credentials_and_endpoint(
    s3_bucket: str, s3_server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(variable)
    config = tmp_path / "config"
    config.write_text(
        f"[profile mine]\naws_access_key_id = {s3_server.key}\naws_secret_access_key = {s3_server.secret}\n"
        f"endpoint_url = {proxy.endpoint}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    open_storage(f"s3://{s3_bucket}/run", storage_options={"profile": "mine"}).put("f", [b"1"])
    monkeypatch.setenv("AWS_PROFILE", "mine")
    open_storage(f"s3://{s3_bucket}/run").put("g", [b"1"])
    assert [seen.method for seen in proxy.seen] == ["PUT", "PUT"]
    assert all(f"Credential={s3_server.key}/" in seen.headers["authorization"] for seen in proxy.seen)


def test_fsspecs_own_configuration_counts(s3_bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    configured = {"endpoint_url": proxy.endpoint, "config_kwargs": {"user_agent_extra": "of-fsspecs-configuration"}}
    monkeypatch.setitem(conf, "s3", configured)
    storage = open_storage(f"s3://{s3_bucket}/run", storage_options={"engine": "s3fs"})
    storage.put("f", [b"1"])
    assert "of-fsspecs-configuration" in proxy.seen[0].headers["user-agent"]
    assert proxy.seen[0].headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD", "our own defaults count too"


@pytest.mark.usefixtures("lax_server")
@pytest.mark.parametrize("style", ["path", "virtual"])
def test_a_bucket_may_stand_in_the_path_or_in_the_hosts_name(s3_bucket: str, proxy: FaultProxy, style: str) -> None:
    """The names are Amazon's; requests go to the proxy all the same, which is given to the client as one."""
    host = "s3.us-east-1.amazonaws.com"
    settings = {"s3": {"addressing_style": style}, "proxies": {"http": proxy.endpoint}}
    options = {"endpoint_url": f"http://{host}", "config_kwargs": settings}
    storage = open_storage(f"s3://{s3_bucket}/run", storage_options=options)
    storage.put("f", [b"1"])
    storage.publish("m.json", b"{}")
    assert storage.read_all("f", limit_bytes=LIMIT) == b"1"
    assert [info.name for info in storage.list()] == ["f", "m.json"]
    in_host, in_path = (f"{s3_bucket}.", "") if style == "virtual" else ("", f"/{s3_bucket}")
    assert {seen.headers["host"] for seen in proxy.seen} == {f"{in_host}{host}"}
    assert urlsplit(proxy.seen[0].target).path == f"{in_path}/run/f"


@pytest.mark.parametrize(
    ("style", "endpoint", "is_virtual"),
    [
        (None, "https://s3.eu-central-1.amazonaws.com", True),
        (None, "https://storage.example.test", False),
        ("path", "https://s3.eu-central-1.amazonaws.com", False),
        ("virtual", "https://storage.example.test", True),
    ],
)
def test_obstore_is_told_where_the_bucket_stands(style: str | None, endpoint: str, is_virtual: bool) -> None:
    stores = pytest.importorskip("obstore.store")
    options: dict[str, Any] = {"endpoint_url": endpoint, "key": "k", "secret": "s", "skip_instance_cache": True}
    config = {} if style is None else {"s3": {"addressing_style": style}}
    requests = Requests(Connection(s3fs.S3FileSystem(**options, config_kwargs=config)))
    made = make_store(stores, requests, requests.connected(), "bucket")
    host = urlsplit(endpoint).hostname
    assert made.config["virtual_hosted_style_request"] == str(is_virtual).lower()
    assert urlsplit(made.config["endpoint"]).hostname == (f"bucket.{host}" if is_virtual else host)


def test_public_objects_are_read_without_credentials(
    s3_bucket: str, s3_filesystem: s3fs.S3FileSystem, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_filesystem.call_s3("put_object", Bucket=s3_bucket, Key="run/f", Body=b"public", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    storage = open_storage(f"s3://{s3_bucket}/run", storage_options={"anon": True})
    assert storage.read_all("f", limit_bytes=LIMIT) == b"public"
    into = bytearray(3)
    storage.read("f", 3, memoryview(into))
    assert into == b"lic"
    assert not any("authorization" in seen.headers for seen in proxy.seen)


def test_checksums_that_older_servers_refuse_are_not_sent_unless_asked_for(
    s3_bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sends_checksum(options: dict[str, Any]) -> bool:
        open_storage(f"s3://{s3_bucket}/run", storage_options=options).put("f", [b"1"])
        return any("checksum" in header or header == "x-amz-trailer" for header in proxy.seen[-1].headers)

    assert not sends_checksum({})
    assert sends_checksum({"config_kwargs": {"request_checksum_calculation": "when_supported"}})
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    assert sends_checksum({})


def test_checksums_that_are_asked_for_go_with_every_part(s3_bucket: str, proxy: FaultProxy) -> None:
    data = bytes(range(256)) * (LEAST_PART // 200)
    options = {"config_kwargs": {"request_checksum_calculation": "when_supported"}}
    storage = open_storage(f"s3://{s3_bucket}/run", storage_options=options)
    storage.put("f", [data], num_bytes=len(data))
    parts = [seen.headers for seen in proxy.seen if "partNumber=" in seen.target]
    assert len(parts) == 2
    assert all(any(header.startswith("x-amz-checksum-") for header in headers) for headers in parts)
    assert storage.read_all("f", limit_bytes=len(data)) == data


# --- HTTPS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1 that nobody has signed, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.TraditionalOpenSSL
    no_password = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, no_password))
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def secure_server(certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    cert, key = certificate
    with running_s3_server(tmp_path_factory.mktemp("secure"), "-c", str(cert), "-k", str(key)) as server:
        yield server


@pytest.mark.parametrize("engine", ["s3fs", "obstore"])
def test_a_server_with_a_certificate_authority_of_its_own_is_trusted_if_it_is_named(
    secure_server: S3Server, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    pytest.importorskip(engine)
    point_aws_at(secure_server, monkeypatch)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    url, data = f"s3://bucket-{engine}/run", bytes(range(256)) * (LEAST_PART // 200)
    stranger = open_storage(url, storage_options={"engine": "s3fs", **IMPATIENT})
    with pytest.raises(StorageError, match="CERTIFICATE_VERIFY_FAILED"):
        stranger.list()
    options = {"engine": engine, "client_kwargs": {"verify": str(certificate[0])}}
    fs = s3fs.S3FileSystem(client_kwargs=options["client_kwargs"], skip_instance_cache=True)
    fs.mkdir(f"bucket-{engine}")
    storage = open_storage(url, storage_options=options)
    storage.put("f", [data], num_bytes=len(data))
    into = bytearray(len(data))
    storage.read("f", 0, memoryview(into))
    assert into == data

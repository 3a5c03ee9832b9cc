"""Whoever can move bytes to an S3 server and back: distckpt's storage, the clients below it, and DCP's own writer.

Each one has the bytes in memory, and wants them back in memory that is there: what a checkpoint needs.
"""

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIECE_BYTES = 4 << 20  # distckpt hands out a file in segments of this size
PART_BYTES = 16 << 20
NUM_THREADS = 8
REGION = "us-east-1"

Move = Callable[[Mapping[str, memoryview]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mover:
    """One contender; both of its functions are given memory by key.

    Attributes:
        upload: Writes an object for each key.
        download: Fills the memory from the objects.
    """

    upload: Move
    download: Move


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the objects go.

    Attributes:
        bucket: The bucket.
        endpoint: The server's URL, or a link's to it.
        scratch: A folder in memory, for those who can only send files.
    """

    bucket: str
    endpoint: str
    scratch: Path


def each(work: Callable[[str, memoryview], object], objects: Mapping[str, memoryview]) -> None:
    """Do something with each object, several at once, as a process with several ranks' files would."""
    with ThreadPoolExecutor(min(NUM_THREADS, len(objects))) as pool:
        for _ in pool.map(work, objects.keys(), objects.values()):
            pass


def distckpt_mover(place: Place, engine: str) -> Mover:
    """distckpt's storage, as a save and a restore use it."""
    from distckpt.storage import open_storage

    options = {"engine": engine, "endpoint_url": place.endpoint}
    storage = open_storage(f"s3://{place.bucket}/distckpt-{engine}", storage_options=options)

    def put(key: str, view: memoryview) -> None:
        pieces = (view[begin : begin + PIECE_BYTES] for begin in range(0, len(view), PIECE_BYTES))
        storage.put(key, pieces, num_bytes=len(view))

    def get(objects: Mapping[str, memoryview]) -> None:
        size, num_readers = storage.capabilities.read_bytes, storage.capabilities.num_readers
        tasks = [(key, begin, view) for key, view in objects.items() for begin in range(0, len(view), size)]
        with ThreadPoolExecutor(num_readers) as pool:
            for _ in pool.map(lambda task: storage.read(task[0], task[1], task[2][task[1] : task[1] + size]), tasks):
                pass

    return Mover(upload=lambda objects: each(put, objects), download=get)


def s3fs_movers(place: Place) -> dict[str, Mover]:
    """The ways that s3fs itself has."""
    import s3fs

    def made() -> Any:
        config = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        return s3fs.S3FileSystem(endpoint_url=place.endpoint, config_kwargs=config, skip_instance_cache=True)

    fs = made()
    root = f"{place.bucket}/s3fs"

    def pipe(key: str, view: memoryview) -> None:
        fs.pipe_file(f"{root}/{key}", bytes(view))

    def ranges(key: str, view: memoryview) -> None:
        begins = list(range(0, len(view), PART_BYTES))
        ends = [min(begin + PART_BYTES, len(view)) for begin in begins]
        found = fs.cat_ranges([f"{root}/{key}"] * len(ends), begins, ends, on_error="raise")
        for begin, end, data in zip(begins, ends, found, strict=True):
            view[begin:end] = data

    def put_file(key: str, view: memoryview) -> None:
        local = place.scratch / key
        local.write_bytes(view)
        fs.put_file(str(local), f"{root}/{key}")
        local.unlink()

    def get_file(key: str, view: memoryview) -> None:
        local = place.scratch / key
        fs.get_file(f"{root}/{key}", str(local))
        with local.open("rb") as file:
            file.readinto(view)
        local.unlink()

    def write(key: str, view: memoryview) -> None:
        with fs.open(f"{root}/{key}", "wb", block_size=PART_BYTES) as file:
            file.write(view)

    def read(key: str, view: memoryview) -> None:
        with fs.open(f"{root}/{key}", "rb", block_size=PART_BYTES) as file:
            file.readinto(view)

    return {
        "s3fs pipe_file, cat_ranges": Mover(upload=lambda o: each(pipe, o), download=lambda o: each(ranges, o)),
        "s3fs put_file, get_file": Mover(upload=lambda o: each(put_file, o), download=lambda o: each(get_file, o)),
        "s3fs open": Mover(upload=lambda o: each(write, o), download=lambda o: each(read, o)),
    }


class _View(io.RawIOBase):
    """Memory as the file that boto3 wants to read from or write to."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._place = view, 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        piece = self._view[self._place : self._place + len(into)]
        into[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)

    def write(self, data: Any) -> int:
        self._view[self._place : self._place + len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, len(self._view))[whence]
        return self._place

    def tell(self) -> int:
        return self._place


def boto3_mover(place: Place) -> Mover:
    """boto3's transfer manager, with unsigned payloads and no checksums, as its fastest."""
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    config = Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": False},
        max_pool_connections=32,
    )
    client = boto3.client("s3", endpoint_url=place.endpoint, region_name=REGION, config=config)
    transfer = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=10)

    def put(key: str, view: memoryview) -> None:
        client.upload_fileobj(_View(view), place.bucket, f"boto3/{key}", Config=transfer)

    def get(key: str, view: memoryview) -> None:
        client.download_fileobj(place.bucket, f"boto3/{key}", _View(view), Config=transfer)

    return Mover(upload=lambda o: each(put, o), download=lambda o: each(get, o))


def crt_mover(place: Place) -> Mover:
    """Amazon's CRT client, which is in C, below boto3's transfer manager."""
    import botocore.session
    from s3transfer.crt import (
        BotocoreCRTCredentialsWrapper,
        BotocoreCRTRequestSerializer,
        CRTTransferManager,
        create_s3_crt_client,
    )

    session = botocore.session.get_session()
    credentials = BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
    client = create_s3_crt_client(
        REGION,
        crt_credentials_provider=credentials,
        use_ssl=place.endpoint.startswith("https://"),
        part_size=PART_BYTES,
    )
    serializer = BotocoreCRTRequestSerializer(session, {"region_name": REGION, "endpoint_url": place.endpoint})
    manager = CRTTransferManager(client, serializer)

    def put(key: str, view: memoryview) -> None:
        manager.upload(_View(view), place.bucket, f"crt/{key}").result()

    def get(key: str, view: memoryview) -> None:
        manager.download(place.bucket, f"crt/{key}", _View(view)).result()

    return Mover(upload=lambda o: each(put, o), download=lambda o: each(get, o))


def obstore_mover(place: Place) -> Mover:
    """obstore, with unsigned payloads."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        place.bucket,
        endpoint=place.endpoint,
        region=REGION,
        unsigned_payload=True,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "600s"},
    )

    def put(key: str, view: memoryview) -> None:
        obstore.put(store, f"obstore/{key}", view, chunk_size=PART_BYTES, max_concurrency=12)

    def get(key: str, view: memoryview) -> None:
        begins = list(range(0, len(view), PART_BYTES))
        ends = [min(begin + PART_BYTES, len(view)) for begin in begins]
        found = obstore.get_ranges(store, f"obstore/{key}", starts=begins, ends=ends, coalesce=0)
        for begin, end, data in zip(begins, ends, found, strict=True):
            view[begin:end] = memoryview(data)

    return Mover(upload=lambda o: each(put, o), download=lambda o: each(get, o))


def connector_mover(place: Place) -> Mover:
    """s3torchconnector, which sits on Amazon's CRT client."""
    from s3torchconnector._s3client import S3Client, S3ClientConfig

    client = S3Client(REGION, endpoint=place.endpoint, s3client_config=S3ClientConfig(force_path_style=True))

    def put(key: str, view: memoryview) -> None:
        with client.put_object(place.bucket, f"connector/{key}") as writer:
            for begin in range(0, len(view), PART_BYTES):
                writer.write(view[begin : begin + PART_BYTES])

    def get(key: str, view: memoryview) -> None:
        num_read = 0
        reader = client.get_object(place.bucket, f"connector/{key}")
        while num_read < len(view) and (count := reader.readinto(view[num_read:])):
            num_read += count

    return Mover(upload=lambda o: each(put, o), download=lambda o: each(get, o))


def dcp_mover(place: Place) -> Mover:
    """DCP's FsspecWriter and FsspecReader over s3fs: a checkpoint with a tensor for each object."""
    import torch
    import torch.distributed.checkpoint as dcp
    from s3fs import S3FileSystem
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

    os.environ["AWS_ENDPOINT_URL"] = place.endpoint
    S3FileSystem.clear_instance_cache()  # else DCP goes on with the one of the table before, past this link
    url = f"s3://{place.bucket}/dcp"

    def state(objects: Mapping[str, memoryview]) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {key: torch.frombuffer(view, dtype=torch.uint8) for key, view in objects.items()}

    return Mover(
        upload=lambda o: dcp.save(state(o), storage_writer=FsspecWriter(url, thread_count=8, overwrite=True)) and None,
        download=lambda o: dcp.load(state(o), storage_reader=FsspecReader(url)),
    )


def open_movers(place: Place, only: Sequence[str] | None) -> tuple[dict[str, Mover], dict[str, str]]:
    """Return the contenders by name, and why others are absent."""
    makers: dict[str, tuple[str, Callable[[], Mover]]] = {
        "distckpt": ("s3fs", lambda: distckpt_mover(place, "s3fs")),
        "distckpt, obstore": ("obstore", lambda: distckpt_mover(place, "obstore")),
        **{name: ("s3fs", lambda mover=mover: mover) for name, mover in s3fs_movers(place).items()},  # type: ignore[misc]
        "boto3 transfer manager": ("boto3", lambda: boto3_mover(place)),
        "CRT client": ("awscrt", lambda: crt_mover(place)),
        "obstore": ("obstore", lambda: obstore_mover(place)),
        "s3torchconnector": ("s3torchconnector", lambda: connector_mover(place)),
        "DCP FsspecWriter, FsspecReader": ("torch", lambda: dcp_mover(place)),
    }
    movers, absent = {}, {}
    for name, (package, make) in makers.items():
        if only is not None and name not in only:
            continue
        if importlib.util.find_spec(package) is None:
            absent[name] = f"{package} is not installed"
        else:
            movers[name] = make()
    return movers, absent

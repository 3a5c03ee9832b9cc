"""S3 in processes: Ctrl-C in the middle of an upload, children that were forked, and many managers at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import s3fs
import torch
from fault_proxy import Fault, FaultProxy

import distckpt
from distckpt.storage.parts import LEAST_PART

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 60.0
END_LIMIT_S = 60.0

UPLOAD = """
import sys
from distckpt.storage import open_storage
storage = open_storage(sys.argv[1], storage_options={"engine": sys.argv[2]})
part, num_parts = bytes(int(sys.argv[3])), 6
try:
    storage.put("step-000000000001/a/f", [part] * num_parts, num_bytes=len(part) * num_parts)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("engine", ["s3fs", "obstore"])
def test_ctrl_c_in_the_middle_of_an_upload_leaves_nothing_on_the_server(
    proxy: FaultProxy, s3_filesystem: s3fs.S3FileSystem, s3_bucket: str, engine: str
) -> None:
    pytest.importorskip(engine)
    proxy.fail(Fault(method="PUT", where="partNumber=2", action="delay", delay_s=5))
    command = [sys.executable, "-c", UPLOAD, f"s3://{s3_bucket}/run", engine, str(LEAST_PART)]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while proxy.count("PUT", "partNumber=2") == 0 and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=END_LIMIT_S)
        finally:
            process.kill()
    assert said.strip() == "interrupted"
    assert s3_filesystem.list_multipart_uploads(s3_bucket) == []
    assert s3_filesystem.find(s3_bucket) == []


def test_any_number_of_managers_of_one_process_save_and_restore_at_once(s3_bucket: str) -> None:
    def work(number: int) -> bool:
        url = f"s3://{s3_bucket}/run-{number}"
        with distckpt.CheckpointManager(url, signals=()) as manager:
            manager.save(1, {"weight": torch.full((100,), float(number))})
            manager.wait()
            state = {"weight": torch.zeros(100)}
            manager.restore(state)
        return state["weight"].tolist() == [float(number)] * 100

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")  # that is what is tested
@pytest.mark.parametrize("engine", ["s3fs", "obstore"])
def test_a_child_that_is_forked_in_the_middle_of_an_upload_uploads_too(
    proxy: FaultProxy, s3_filesystem: s3fs.S3FileSystem, s3_bucket: str, engine: str
) -> None:
    pytest.importorskip(engine)
    options, data = {"engine": engine}, bytes(LEAST_PART) + b"end"
    storage = distckpt.storage.open_storage(f"s3://{s3_bucket}/run", storage_options=options)
    children: list[int] = []

    def fork() -> None:
        children.append(os.fork())
        if children[0] == 0:
            try:
                storage.put("child", [data], num_bytes=len(data))
                os._exit(0)
            finally:
                os._exit(1)

    def chunks_that_fork() -> Iterator[bytes]:
        yield data[:LEAST_PART]
        fork()
        yield data[LEAST_PART:]

    storage.put("parent", chunks_that_fork(), num_bytes=len(data))
    _, status = os.waitpid(children[0], 0)
    assert os.waitstatus_to_exitcode(status) == 0
    for name in ("parent", "child"):
        assert s3_filesystem.cat_file(f"{s3_bucket}/run/{name}") == data
    assert s3_filesystem.list_multipart_uploads(s3_bucket) == []

"""The conditional PUT of the commit, against an S3 server that honours it."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from conftest import S3
from services import LOOPBACK, free_ports

from covtanet import storage


@pytest.fixture
def strict(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """moto's server, as a process of its own; the storage module's client is that server's meanwhile."""
    (port,) = free_ports(1)
    url = f"http://{LOOPBACK}:{port}"
    with (tmp_path / "moto.log").open("wb") as out:
        command = [Path(sys.executable).with_name("moto_server"), "-H", LOOPBACK, "-p", str(port)]
        server = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(url, timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        boto3.client("s3").create_bucket(Bucket="bucket")
        storage._client.cache_clear()
        yield "s3://bucket"
    finally:
        storage._client.cache_clear()
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_of_many_drivers_one_publishes_and_all_know(strict: str, tmp_path: Path) -> None:
    assert storage.honours_create(f"{strict}/ledger")
    assert list(storage.list_names(f"{strict}/ledger")) == [], "the probe is left behind"
    uri, files = f"{strict}/ledger/date=2026-11-23/run.parquet", []
    for number in range(8):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(b"%d" % number * 1000)
    with ThreadPoolExecutor(len(files)) as pool:
        published = list(pool.map(lambda path: storage.create(path, uri), files))
    assert published.count(True) == 1
    assert storage.read_bytes(uri) == files[published.index(True)].read_bytes()


def test_a_store_that_lets_a_put_replace_a_file_is_found_out(s3: S3) -> None:
    assert not storage.honours_create(f"{s3.uri}/probe")  # rclone ignores the condition

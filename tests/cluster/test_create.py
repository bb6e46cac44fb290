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
from typing import Any

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.awsrequest import AWSRequest
from running import S3

from covtanet import storage, tracking
from covtanet.errors import CheckpointError
from covtanet.model.model_files import MODEL_FILES, model_digest
from covtanet.storage import s3 as s3_store
from infra.local.services import LOOPBACK, free_ports


@pytest.fixture
def strict(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """moto's server, as a process of its own; the storage module's client is that server's
    meanwhile.
    """
    (port,) = free_ports(1)
    url = f"http://{LOOPBACK}:{port}"
    with (tmp_path / "moto.log").open("wb") as out:
        moto = Path(sys.executable).with_name("moto_server")
        command = [str(moto), "-H", LOOPBACK, "-p", str(port)]
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
        s3_store.client.cache_clear()
        yield "s3://bucket"
    finally:
        s3_store.client.cache_clear()
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_create_lets_one_of_many_drivers_publish(strict: str, tmp_path: Path) -> None:
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


# S3 takes no part below 5 MiB but the last.
IN_PARTS = TransferConfig(multipart_threshold=6 << 20, multipart_chunksize=5 << 20)
LARGE_BYTES = 11 << 20


def test_create_of_large_object_does_not_replace(
    strict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request that joins the parts is conditional, and a refused upload leaves no parts.

    One after the other: moto looks at the condition and joins the parts in two steps.
    """
    monkeypatch.setattr(s3_store, "MULTIPART", IN_PARTS)
    uri, files = f"{strict}/ledger/manifest.parquet", []
    for number in range(2):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(bytes([number]) * LARGE_BYTES)
    assert [storage.create(path, uri) for path in files] == [True, False]
    info = storage.describe(uri)
    assert info is not None
    assert info.version.endswith("-3")  # the ETag of an object of three parts
    assert storage.read_bytes(uri) == files[0].read_bytes()
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket="bucket")


@pytest.mark.parametrize("server", ["strict", "s3"])
def test_large_upload_replaces_object_whole(
    server: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "MULTIPART", IN_PARTS)
    request.getfixturevalue(server)
    path, uri = tmp_path / "large", "s3://bucket/in-parts/large"
    storage.write_bytes(uri, b"before")
    path.write_bytes(os.urandom(LARGE_BYTES))
    storage.upload(path, uri)
    info = storage.describe(uri)
    assert info is not None
    assert info.num_bytes == LARGE_BYTES
    assert b"".join(storage.read_chunks(uri, info)) == path.read_bytes()


def test_store_with_unconditional_multipart_is_detected(
    strict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server sees the condition of a PUT, but not that of the request that joins parts."""

    def without_condition(request: AWSRequest, **_: object) -> None:
        del request.headers["If-None-Match"]

    new_client = s3_store._new_client

    def forgetful_client() -> Any:
        made = new_client()
        made.meta.events.register("before-sign.s3.CompleteMultipartUpload", without_condition)
        return made

    monkeypatch.setattr(s3_store, "_new_client", forgetful_client)
    assert not storage.honours_create(f"{strict}/probe")
    assert list(storage.list_names(f"{strict}/probe")) == [], "the probe is left behind"


def test_bucket_root_is_listed_up_to_max_objects(strict: str) -> None:
    for index in range(3):
        storage.write_bytes(f"{strict}/x/{index}", b"x")
    assert storage.describe(strict) is None
    assert not storage.exists(strict)
    with pytest.raises(storage.TooManyObjectsError, match="more than 2 objects"):
        list(storage.walk(strict, max_objects=2))


def test_store_without_conditional_put_is_detected(s3: S3) -> None:
    assert not storage.honours_create(f"{s3.uri}/probe")  # rclone ignores the condition


def test_model_download_writes_two_files_only(
    strict: str, model_folder: Path, tmp_path: Path
) -> None:
    """Whatever keys lie under the model's prefix: '..', an absolute path, a million others."""
    client, outside = boto3.client("s3"), tmp_path / "outside"
    outside.mkdir()
    for path in model_folder.iterdir():
        client.put_object(Bucket="bucket", Key=f"m/{path.name}", Body=path.read_bytes())
    up = "../" * len(tmp_path.parts)
    for key in (
        f"m/{up}{str(outside)[1:]}/dotted",
        f"m/{outside}/absolute",
        *(f"m/more/{n}" for n in range(20)),
    ):
        client.put_object(Bucket="bucket", Key=key, Body=b"x")
    listed: list[str] = []
    s3_store.client().meta.events.register(
        "before-call.s3.ListObjectsV2", lambda **_: listed.append("listed")
    )
    found = tracking.resolve_model(f"{strict}/m", tmp_path / "model")
    assert found.digest == model_digest(model_folder)
    assert sorted(path.name for path in (tmp_path / "model").rglob("*")) == [
        "model.json",
        "weights.safetensors",
    ]
    assert list(outside.iterdir()) == []
    assert listed == []


def test_model_without_description_or_too_large_is_refused(strict: str, tmp_path: Path) -> None:
    client = boto3.client("s3")
    client.put_object(Bucket="bucket", Key="none/weights.safetensors", Body=b"x")
    with pytest.raises(CheckpointError, match=r"no model\.json"):
        tracking.resolve_model(f"{strict}/none", tmp_path / "none")
    client.put_object(
        Bucket="bucket", Key="large/model.json", Body=bytes(MODEL_FILES["model.json"] + 1)
    )
    with pytest.raises(CheckpointError, match=r"model\.json has more than \d+ bytes"):
        tracking.resolve_model(f"{strict}/large", tmp_path / "large")


def test_failed_deletes_raise_with_their_count(
    strict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of objects under a lock: the answer to the whole call is 200, and names them."""
    client = boto3.client("s3")
    client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
    version = client.put_object(Bucket="locked", Key="work/rows/1", Body=b"x")["VersionId"]
    client.put_object_legal_hold(Bucket="locked", Key="work/rows/1", LegalHold={"Status": "ON"})
    real = s3_store.client()

    def with_version(**arguments: object) -> object:
        arguments["Delete"] = {
            "Objects": [{"Key": "work/rows/1", "VersionId": version}],
            "Quiet": True,
        }
        return client.delete_objects(**arguments)

    monkeypatch.setattr(real, "delete_objects", with_version)
    with pytest.raises(OSError, match="1 of 1 objects could not be deleted: AccessDenied"):
        storage.delete_folder("s3://locked/work")

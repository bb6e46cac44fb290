"""Storage faults on a real S3 server: broken streams, changed objects, expired credentials."""

import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from running import S3
from sound_input import named, plain_nifti, slices

from covtanet import storage
from covtanet.archive import manifest
from covtanet.ct import dicom_headers
from covtanet.ct.window import WindowConfig
from covtanet.ledger.finished_rows import num_finished
from covtanet.screening import stages
from covtanet.screening.config import ScreeningConfig
from covtanet.storage import s3 as s3_store
from infra.local.jobs import start_job
from infra.local.services import LOOPBACK, LOOPBACK_SECRET, start_s3

CONFIG, WINDOW = ScreeningConfig(engine="eager"), WindowConfig(size_px=128)
OBJECT_BYTES = 3 << 20
# Within the second of three chunks.
CUT_AT = 3 << 19
MAX_HEAD_BYTES = 64 << 10


@dataclass
class CuttingProxy:
    """A TCP proxy before the S3 server that closes connections in the middle of a body.

    num_cuts: how many bodies are still to be cut, behind their first ``cut_at`` bytes. after_cut:
    called before the client knows of it. ranges: the Range header of each request, or empty.
    """

    upstream: tuple[str, int]
    num_cuts: int
    cut_at: int = CUT_AT
    after_cut: Callable[[], None] = lambda: None
    ranges: list[str] = field(default_factory=list)

    def serve(self, client: socket.socket) -> None:
        """Relay one connection's requests, which have no body, until a side closes it."""
        with client, socket.create_connection(self.upstream) as server:
            while head := read_head(client):
                found = re.search(rb"\r\nRange: *(\S+)", head, re.IGNORECASE)
                self.ranges.append(found[1].decode() if found else "")
                server.sendall(head)
                if not self.relay_answer(server, client):
                    return

    def relay_answer(self, server: socket.socket, client: socket.socket) -> bool:
        """Send an answer on; returns whether it was sent whole."""
        head = read_head(server)
        client.sendall(head)
        found = re.search(rb"\r\nContent-Length: *(\d+)", head, re.IGNORECASE)
        num_bytes = int(found[1]) if found else 0
        is_cut = self.num_cuts > 0 and num_bytes > self.cut_at
        left = self.cut_at if is_cut else num_bytes
        while left and (data := server.recv(min(left, 1 << 16))):
            client.sendall(data)
            left -= len(data)
        if is_cut:
            self.num_cuts -= 1
            self.after_cut()
        return not is_cut


def read_head(connection: socket.socket) -> bytes:
    """Read a request's or an answer's head, byte by byte; empty if the connection is closed."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and len(head) < MAX_HEAD_BYTES:
        data = connection.recv(1)
        if not data:
            return b""
        head += data
    return head


@dataclass
class SwitchingProxy:
    """A TCP proxy whose server can be exchanged for another one between two requests."""

    upstream: tuple[str, int]

    def serve(self, client: socket.socket) -> None:
        """Relay one request and its answer; the server is asked to close the connection then."""
        head = read_head(client)
        with client, socket.create_connection(self.upstream) as server:
            server.sendall(head.removesuffix(b"\r\n") + b"Connection: close\r\n\r\n")
            rest = threading.Thread(target=relay, args=(client, server), daemon=True)
            rest.start()
            relay(server, client)
            rest.join()


def relay(source: socket.socket, target: socket.socket) -> None:
    """Send on what comes until the source closes, and read on if the target takes no more.

    A client whose bytes nobody reads would be reset before it has read the answer.
    """
    is_open = True
    with suppress(OSError):
        while data := source.recv(1 << 16):
            try:
                if is_open:
                    target.sendall(data)
            except OSError:
                is_open = False
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextmanager
def listening(proxy: CuttingProxy | SwitchingProxy) -> Iterator[int]:
    """Serve a proxy on a free port of loopback."""
    with socket.create_server((LOOPBACK, 0)) as listener:

        def accept() -> None:
            with suppress(OSError):  # the listener is closed at the end
                while True:
                    client, _ = listener.accept()
                    threading.Thread(target=serve, args=(client,), daemon=True).start()

        def serve(client: socket.socket) -> None:
            with suppress(OSError):  # the client may have gone
                proxy.serve(client)

        threading.Thread(target=accept, daemon=True).start()
        yield int(listener.getsockname()[1])


@pytest.fixture
def through(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[CuttingProxy], Any]]:
    """Point the storage module at a proxy."""

    @contextmanager
    def point_at(proxy: CuttingProxy) -> Iterator[None]:
        with listening(proxy) as port:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{LOOPBACK}:{port}")
            s3_store.client.cache_clear()
            yield

    yield point_at
    s3_store.client.cache_clear()


def upstream_of(environment: Mapping[str, str]) -> tuple[str, int]:
    host, port = environment["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    return host, int(port)


@pytest.fixture
def stored(s3: S3) -> tuple[str, bytes, storage.ObjectInfo]:
    """An object of three chunks: its URI, its bytes and how it is listed."""
    uri, data = f"{s3.uri}/streams/{secrets.token_hex(8)}", secrets.token_bytes(OBJECT_BYTES)
    storage.write_bytes(uri, data)
    info = storage.describe(uri)
    assert info is not None
    return uri, data, info


def test_broken_stream_is_resumed_by_range(
    s3: S3,
    stored: tuple[str, bytes, storage.ObjectInfo],
    through: Callable[[CuttingProxy], Any],
) -> None:
    """The second request begins behind the bytes that were handed on; nothing comes twice."""
    uri, data, info = stored
    proxy = CuttingProxy(upstream_of(s3.environment), num_cuts=1)
    with through(proxy):
        chunks = list(storage.read_chunks(uri, info))
    assert b"".join(chunks) == data
    ends = np.cumsum([len(chunk) for chunk in chunks]).tolist()
    resumed_at = max(end for end in ends if end <= CUT_AT)
    assert resumed_at >= storage.CHUNK_BYTES
    assert proxy.ranges == ["", f"bytes={resumed_at}-"]
    assert proxy.num_cuts == 0


@pytest.mark.parametrize("num_bytes", [OBJECT_BYTES, OBJECT_BYTES + 1])
def test_object_overwritten_during_broken_stream_fails_as_changed(
    num_bytes: int,
    s3: S3,
    stored: tuple[str, bytes, storage.ObjectInfo],
    through: Callable[[CuttingProxy], Any],
) -> None:
    """Half of one object and half of another are no series, even if they have the same size."""
    uri, _, info = stored
    key = uri.removeprefix(f"{s3.uri}/")
    server = boto3.client("s3", endpoint_url=s3.environment["AWS_ENDPOINT_URL"])

    def overwrite() -> None:
        server.put_object(Bucket="bucket", Key=key, Body=bytes(num_bytes))

    proxy = CuttingProxy(upstream_of(s3.environment), num_cuts=1, after_cut=overwrite)
    with (
        through(proxy),
        pytest.raises(storage.ObjectChangedError, match="differs from its entry in the listing"),
    ):
        list(storage.read_chunks(uri, info))
    assert len(proxy.ranges) == 2


def test_stream_that_always_breaks_fails_as_storage(
    s3: S3,
    stored: tuple[str, bytes, storage.ObjectInfo],
    through: Callable[[CuttingProxy], Any],
) -> None:
    uri, _, info = stored
    proxy = CuttingProxy(upstream_of(s3.environment), num_cuts=100, cut_at=1000)
    with through(proxy), pytest.raises(OSError, match="the object store does not answer"):
        list(storage.read_chunks(uri, info))
    assert len(proxy.ranges) == s3_store.MAX_ATTEMPTS


@pytest.mark.parametrize("num_cuts", [1, 100])
def test_first_bytes_of_an_answer_that_breaks_off_are_read_again(
    num_cuts: int,
    s3: S3,
    stored: tuple[str, bytes, storage.ObjectInfo],
    through: Callable[[CuttingProxy], Any],
) -> None:
    uri, content, _ = stored
    proxy = CuttingProxy(upstream_of(s3.environment), num_cuts=num_cuts, cut_at=1000)
    with through(proxy):
        if num_cuts == 1:
            assert storage.read_bytes(uri, 16384) == content[:16384]
        else:
            with pytest.raises(OSError, match="the object store does not answer"):
                storage.read_bytes(uri, 16384)
    assert len(proxy.ranges) == min(1 + num_cuts, s3_store.MAX_ATTEMPTS)


def rows_of(archive: str) -> list[dict[str, Any]]:
    """The manifest rows of an archive in S3."""
    found = []
    for folder, objects in storage.walk(archive):
        series, _ = manifest.scan_folder(
            folder,
            objects,
            lambda path, size: storage.read_bytes(f"{archive}/{path}", size),
            dicom_headers.read_identities,
        )
        found += [each.to_row() for each in series]
    return found


def prepare_from(archive: str, row: dict[str, Any]) -> dict[str, Any]:
    decoder = stages.in_process(WINDOW, CONFIG)
    prepared = stages.prepare_series(
        row,
        archive=archive,
        window=WINDOW,
        config=CONFIG,
        decoder=decoder,
    )
    return dict(prepared.record.to_columns())


@pytest.mark.parametrize("num_more", [0, 100])
def test_s3_object_changed_since_listing_fails_as_changed(num_more: int, s3: S3) -> None:
    """Overwritten by one of the same size, which only the ETag tells, or of another."""
    archive = f"{s3.uri}/changed-{num_more}"
    for name, data in named(slices()).items():
        storage.write_bytes(f"{archive}/series/{name}", data)
    (row,) = rows_of(archive)
    changed = slices()[3][:-1] + b"\x7f" + bytes(num_more)
    storage.write_bytes(f"{archive}/series/IM0003.dcm", changed)
    record = prepare_from(archive, row)
    assert (record["status"], record.get("reason")) == ("failed", "changed")


@pytest.fixture
def expiring(
    s3: S3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[], None]]:
    """An S3 server of its own whose keys can be made to expire.

    Another one with other keys over the same folder answers then. The storage module and new jobs
    find it by the environment.
    """
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    start = partial(start_s3, tmp_path / "s3", tmp_path / "s3.log")
    first, second = start(secret=LOOPBACK_SECRET), start(secret="another")
    proxy = SwitchingProxy(upstream_of(first.environment))
    try:
        with listening(proxy) as port:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{LOOPBACK}:{port}")
            s3_store.client.cache_clear()
            yield lambda: setattr(proxy, "upstream", upstream_of(second.environment))
    finally:
        s3_store.client.cache_clear()
        first.stop()
        second.stop()


def test_refused_credentials_raise_access_error(
    expiring: Callable[[], None],
) -> None:
    """Listed with good keys, read with keys that the server takes no longer."""
    storage.write_bytes("s3://bucket/archive/a.nii", plain_nifti())
    (row,) = rows_of("s3://bucket/archive")
    assert prepare_from("s3://bucket/archive", row)["reason"] is None
    expiring()
    with pytest.raises(
        storage.AccessError,
        match="refuses the credentials: SignatureDoesNotMatch",
    ):
        prepare_from("s3://bucket/archive", row)


@pytest.mark.slow  # a Ray of its own; at the level of one series the tests above hold it
def test_expired_credentials_return_1_and_commit_nothing(
    expiring: Callable[[], None],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    """The keys expire half-way: the job says so and ends, instead of failing series by series."""
    for index in range(40):
        storage.write_bytes(f"s3://bucket/archive/{index:02d}.nii", plain_nifti())
    config = tmp_path / "screening.toml"
    config.write_text('[screening]\nengine = "eager"\n')
    own_ray = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    job = start_job(
        own_ray, "screen.py", "--archive", "s3://bucket/archive", "--ledger", "s3://bucket/ledger",
        "--model", str(model_folder), "--config", str(config),
    )  # fmt: skip
    ledger = tmp_path / "s3" / "bucket" / "ledger"
    try:
        job.wait_for(lambda: any(ledger.glob("_work/*/rows/*.parquet")))
        expiring()
        code = job.finish()
    finally:
        job.kill()
    assert code == 1, job.output
    assert "AccessError; the same command continues" in job.output, job.output[-2000:]
    assert "exit code 1:" in job.lines[-1]
    assert "Traceback" not in job.output
    assert not list(ledger.glob("date=*/*.parquet"))
    (work,) = ledger.glob("_work/*")
    assert num_finished(str(work)) < 40

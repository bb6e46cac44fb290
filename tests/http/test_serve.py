"""The endpoint over real HTTP, with Ray, S3 and a registry."""

import contextlib
import io
import json
import socket
import time
import zipfile
from typing import Any, get_args

import pyarrow.parquet as pq
import pydicom
import pytest
import serving_runs
from nights import NIGHT, NIGHT_HEADERS, SubmittedBatch
from running import Cluster
from screening_runs import Screening
from sound_input import gz, plain_nifti, slices

from covtanet.ledger.diff import differences
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs
from infra.local.endpoint import Endpoint
from serve.middleware import SECURITY_HEADERS
from serve.routes.page import PageFile

UPLOAD_TIMEOUT_S = 120


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def test_study_over_http_has_the_values_of_the_screening_job(
    endpoint: Endpoint, screening: Screening
) -> None:
    """A NIfTI file and a zip of DICOM objects as bodies, and both by URI, against the job's
    rows."""
    rows = [row for row in screening.clean.to_pylist() if row["status"] == "screened"]
    for kind in ("nifti", "dicom"):
        job = next(row for row in rows if row["source_format"] == kind)
        source = screening.bucket / job["source_uri"].removeprefix("s3://bucket/")
        if kind == "nifti":
            body = source.read_bytes()
        else:
            body = zipped(
                {f"a/{path.name}": path.read_bytes() for path in sorted(source.iterdir())}
            )
        for path, sent in (
            ("/v1/studies", body),
            ("/v1/studies:by-uri", json.dumps({"uri": job["source_uri"]}).encode()),
        ):
            status, answer, _ = endpoint.ask(
                "POST", path, sent, {"Content-Type": "application/json"}
            )
            assert status == 200, answer
            serving_runs.check_equals_row(answer, job, is_uploaded=path == "/v1/studies")


def test_request_without_or_with_a_wrong_token_returns_401_or_403(endpoint: Endpoint) -> None:
    for method, path in (
        ("POST", "/v1/studies"),
        ("POST", "/v1/studies:by-uri"),
        ("GET", "/v1/models"),
        ("GET", "/v1/batches"),
        ("GET", f"/v1/batches/{'0' * 16}/ledger"),
        ("GET", "/metrics"),
    ):
        body = b'{"uri": "s3://bucket/archive/x"}' if method == "POST" else None
        for header, status in (("", 401), ("Basic x", 401), ("Bearer wrong", 403)):
            headers = {"Authorization": header, "Content-Type": "application/json"}
            received, answer, _ = endpoint.ask(method, path, body, headers)
            assert (received, set(answer)) == (status, {"reason", "message"}), (path, header)
    for path in ("/healthz", "/readyz", "/"):
        assert endpoint.ask("GET", path, headers={"Authorization": ""})[0] == 200


def test_token_is_checked_before_the_body_is_read(endpoint: Endpoint) -> None:
    """The body is announced and never sent; the answer 401 comes all the same."""
    for path in ("/v1/studies", "/v1/studies:by-uri", "/v1/batches"):
        connection = endpoint.announce(100 << 20, path, {"Content-Type": "application/json"})
        with contextlib.closing(connection), connection.getresponse() as answer:
            assert answer.status == 401, path


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"no study at all", 415, "unsupported_media"),
        (b"", 415, "unsupported_media"),
        (gz(plain_nifti())[:-40], 422, "truncated"),
        (zipped({"a.txt": b"text"}), 422, "no_series"),
        (zipped({"../a.dcm": b"x"}), 422, "bad_zip"),
        (zipped({"a.nii.gz": gz(plain_nifti())}), 422, "bad_zip"),
        (zipped({"a/b.zip": b"PK"}), 422, "bad_zip"),
        (zipped({"zeros": bytes(64 << 20)}), 413, "too_large"),
        (zipped({"a": slices()[0]})[:-30], 422, "bad_zip"),
    ],
)
def test_body_that_is_not_a_study_is_refused_with_a_reason(
    endpoint: Endpoint, body: bytes, status: int, reason: str
) -> None:
    received, answer, _ = endpoint.ask("POST", "/v1/studies", body)
    assert (received, answer["reason"]) == (status, reason), answer
    assert "Traceback" not in str(answer)


def test_uri_outside_the_allowed_locations_returns_403(endpoint: Endpoint) -> None:
    for uri in (
        "s3://bucket/archives/x",
        "s3://other/archive",
        "file:///etc/passwd",
        "/etc/passwd",
        "http://127.0.0.1/",
        "s3://bucket/archive/../secret",
        "s3://user@bucket/archive/x",
        "s3://bucket/archive/x?versionId=1",
        "s3://bucket/archive//x",
        "s3://bucket/archive/%2e%2e/x",
    ):
        for path, body in (("/v1/studies:by-uri", {"uri": uri}), ("/v1/batches", {"archive": uri})):
            status, answer, _ = endpoint.ask(
                "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            assert (status, answer["reason"]) == (403, "place_not_allowed"), uri


def test_submitted_batch_is_accepted_once_and_committed(submitted_batch: SubmittedBatch) -> None:
    """The same key returns the same batch, another request under that key 422, an early GET 404."""
    status, answer = submitted_batch.submitted
    assert status == 202
    assert submitted_batch.repeated[1]["batch_id"] == answer["batch_id"]
    assert submitted_batch.conflicting[0] == 422
    status, answer = submitted_batch.early_ledger
    assert (status, answer["reason"]) == (404, "not_there")
    assert submitted_batch.state["state"] == "committed", submitted_batch.state


def test_ledger_of_a_batch_equals_that_of_the_screening_job(
    endpoint: Endpoint, batch: str, screening: Screening
) -> None:
    path, body, kind = f"/v1/batches/{batch}", json.dumps(NIGHT).encode(), NIGHT_HEADERS
    state = endpoint.ask("GET", path)[1]
    assert state["series"] == sum(state["counts"].values()) == screening.clean.num_rows
    assert endpoint.ask("POST", "/v1/batches", body, kind)[1]["state"] == "committed"
    table = pq.read_table(io.BytesIO(endpoint.ask("GET", f"{path}/ledger")[1]))
    assert differences(screening.clean, table) == []
    rows = endpoint.ask("GET", f"{path}/ledger", headers={"Accept": "application/json"})[1]
    assert [row["series_key"] for row in rows] == table["series_key"].to_pylist()
    text = endpoint.ask("GET", f"{path}/ledger", headers={"Accept": "text/csv"})[1].decode()
    assert len(text.splitlines()) == table.num_rows + 1
    screened = next(row for row in rows if row["status"] == "screened")
    folder = f"{path}/series/{screened['series_key']}"
    for name in ("preview.png", "viewer.png"):
        status, data, _ = endpoint.ask("GET", f"{folder}/{name}")
        assert (status, data[:8]) == (200, b"\x89PNG\r\n\x1a\n")
    status, layout, _ = endpoint.ask("GET", f"{folder}/viewer.json")
    assert (status, set(layout)) == (200, {"tiles", "columns", "low_hu", "high_hu"})
    assert endpoint.ask("GET", f"{path}/series/{'0' * 32}/preview.png")[0] == 404
    assert batch in [each["batch_id"] for each in endpoint.ask("GET", "/v1/batches")[1]]
    assert endpoint.ask("GET", f"/v1/batches/{'f' * 16}")[0] == 404


def test_study_after_a_caller_hung_up_gets_its_own_rows(
    endpoint: Endpoint,
) -> None:
    """For both decoders; make faults repeats it with a slow store and eight callers."""
    study = gz(plain_nifti())
    alone = endpoint.ask("POST", "/v1/studies", study)[1]["series"]
    (config,) = list(configs(2, 17, 256, 80))[1:]
    other = zipped(
        {f"{index}.dcm": data for index, data in enumerate(dicom_objects(make_phantom(config), 17))}
    )
    names = (
        "status",
        "series_uid",
        "num_slices",
        "lesion_volume_ml",
        "p_infected",
        "source_digest",
    )
    for _ in range(4):
        connection = endpoint.announce(len(other))
        connection.send(other)
        time.sleep(0.2)
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        deadline = time.monotonic() + 60
        while (found := endpoint.ask("POST", "/v1/studies", study))[0] == 503:
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        assert [[row[name] for name in names] for row in found[1]["series"]] == [
            [row[name] for name in names] for row in alone
        ]


def many_series(count: int) -> bytes:
    """A zip of series of one object each."""
    dataset = pydicom.dcmread(io.BytesIO(slices()[0]))
    members = {}
    for index in range(count):
        dataset.SeriesInstanceUID = f"1.2.3.{index + 1}"
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        members[f"{index}.dcm"] = buffer.getvalue()
    return zipped(members)


def test_study_with_too_many_series_returns_413(endpoint: Endpoint) -> None:
    archive = json.dumps({"uri": "s3://bucket/archive"}).encode()
    for path, body in (("/v1/studies", many_series(100)), ("/v1/studies:by-uri", archive)):
        status, answer, _ = endpoint.ask("POST", path, body, {"Content-Type": "application/json"})
        assert (status, answer["reason"]) == (413, "too_large"), (path, answer)


def test_third_open_batch_of_a_caller_returns_429(endpoint: Endpoint, batch: str) -> None:
    def post(**asked: object) -> tuple[int, Any, Any]:
        body = json.dumps({"archive": "s3://bucket/archive", **asked}).encode()
        return endpoint.ask("POST", "/v1/batches", body, {"Content-Type": "application/json"})

    def batch_ids() -> set[str]:
        return {state["batch_id"] for state in endpoint.ask("GET", "/v1/batches")[1]}

    ids_before = batch_ids()
    opened = [post(limit=limit) for limit in (1, 2)]
    try:
        assert [status for status, *_ in opened] == [202, 202]
        status, answer, headers = post(limit=3)
        assert (status, answer["reason"]) == (429, "too_many_batches")
        assert int(headers["Retry-After"]) > 0
        assert (
            post(limit=2)[1]["batch_id"] == opened[1][1]["batch_id"]
        )  # one that is open is found, not refused
        # The one that was refused has left neither a record nor a job.
        assert batch_ids() == ids_before | {answer["batch_id"] for _, answer, _ in opened}
    finally:
        for _, answer, _ in opened:
            endpoint.ask("POST", f"/v1/batches/{answer['batch_id']}:cancel")
    deadline = time.monotonic() + 60
    for _, answer, _ in opened:
        while (
            state := endpoint.ask("GET", f"/v1/batches/{answer['batch_id']}")[1]["state"]
        ) != "cancelled":
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
    for asked, status, reason in (
        ({"model": "models:/covtanet/7"}, 403, "model_not_allowed"),
        ({"run_date": "9999-12-31"}, 422, "invalid_request"),
    ):
        found = post(**asked)
        assert (found[0], found[1]["reason"]) == (status, reason), found


def test_every_answer_has_security_headers_and_only_open_routes_need_no_token(
    endpoint: Endpoint,
) -> None:
    """Answers of the proxy itself have the headers too."""
    page_files = {f"/worklist/{name}" for name in get_args(PageFile)}
    open_routes = {"/", "/healthz", "/readyz"} | page_files
    closed = {
        "/openapi.json",
        "/docs",
        "/redoc",
        "/metrics",
        "/v1/models",
        "/v1/batches",
        "/nowhere",
        "/-/routes",
    }
    for path in open_routes | closed:
        status, body, headers = endpoint.ask("GET", path, headers={"Authorization": ""})
        for name, value in SECURITY_HEADERS.items():
            assert headers.get(name) == value, (path, name)
        if path != "/-/routes":  # Serve's own: names of applications
            assert (status == 200) == (path in open_routes), (path, status)
        assert b"cdn." not in (body if isinstance(body, bytes) else str(body).encode())


def test_stalled_uploads_take_no_decoder_and_too_many_return_503(endpoint: Endpoint) -> None:
    """With four stalled bodies a fifth of this caller is refused; all four are served in the
    end."""
    study = gz(plain_nifti())
    slow = [endpoint.announce(len(study)) for _ in range(3)]
    for connection in slow:
        connection.send(study[:100])
    time.sleep(1)
    started = time.monotonic()
    assert endpoint.ask("POST", "/v1/studies", study)[0] == 200
    assert time.monotonic() - started < UPLOAD_TIMEOUT_S / 2
    slow.append(endpoint.announce(len(study)))
    slow[-1].send(study[:100])
    deadline = time.monotonic() + 20
    while (found := endpoint.ask("POST", "/v1/studies", b"no study"))[0] != 503:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    assert found[1]["reason"] == "busy"
    assert int(found[2]["Retry-After"]) >= 1
    for connection in slow:
        connection.send(study[100:])
    statuses = []
    for connection in slow:
        with contextlib.closing(connection), connection.getresponse() as answer:
            statuses.append(answer.status)
    assert statuses == [200] * 4
    assert endpoint.ask("POST", "/v1/studies", study)[0] == 200


def test_replica_that_dies_in_a_request_returns_503_replica_died(
    endpoint: Endpoint, cluster: Cluster
) -> None:
    """The next request is served by a new replica."""
    study = gz(plain_nifti())
    connection = endpoint.announce(len(study))  # the replica waits for its body
    time.sleep(0.5)
    serving_runs.kill(cluster.environment, serving_runs.API)
    with contextlib.closing(connection), connection.getresponse() as answer:
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert json.loads(answer.read())["reason"] == "replica_died"
    deadline = time.monotonic() + 60
    while endpoint.ask("POST", "/v1/studies", study)[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_metrics_count_answers_and_name_no_study(endpoint: Endpoint, batch: str) -> None:
    deadline = time.monotonic() + 30
    names = ("ray_covtanet_http_studies", "ray_covtanet_series", "ray_serve_")
    while not all(name in (text := endpoint.ask("GET", "/metrics")[1].decode()) for name in names):
        assert time.monotonic() < deadline, text[-500:]
        time.sleep(1)
    assert 'status="screened"' in text
    assert "s3://" not in text


def test_openapi_needs_a_token_and_describes_the_routes(endpoint: Endpoint) -> None:
    assert endpoint.ask("GET", "/openapi.json", headers={"Authorization": ""})[0] == 401
    described = endpoint.ask("GET", "/openapi.json")[1]
    assert {"/v1/studies", "/v1/studies:by-uri", "/v1/batches", "/v1/models", "/metrics"} <= set(
        described["paths"]
    )
    body = described["paths"]["/v1/batches"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert body["properties"]["archive"]["examples"]

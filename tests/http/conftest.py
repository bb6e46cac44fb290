"""An endpoint on the cluster of all tests, and a batch that was submitted to it."""

import hashlib
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboard import scraped_metrics
from nights import NIGHT, NIGHT_HEADERS, SubmittedBatch
from pacs import PASSWORD, READER_TOKEN, phantom_series
from running import Cluster
from screening_runs import Screening

from infra.local.endpoint import Endpoint, start_endpoint, write_config
from infra.local.services import free_ports
from infra.pacs.orthanc import INSTALL, Orthanc, is_installed, start_orthanc

# A screening of 25 series on five logical CPUs of a busy machine.
BATCH_TIMEOUT_S = 400


@pytest.fixture(scope="session")
def pacs_port() -> int:
    """The port of the PACS that the endpoint may read, whether one is installed or not."""
    return free_ports(1)[0]


@pytest.fixture(scope="session")
def worklist_pacs_port() -> int:
    """The port of the PACS of the worklist's tests."""
    return free_ports(1)[0]


@pytest.fixture(scope="session")
def pacs(pacs_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """An Orthanc that the endpoint may read, with one phantom."""
    if not is_installed():
        pytest.skip(f"Orthanc is not installed: {INSTALL}")
    server = start_orthanc(tmp_path_factory.mktemp("pacs"), PASSWORD, pacs_port, stable_age_s=1)
    server.load(phantom_series(0))
    yield server
    server.service.stop()


@pytest.fixture(scope="session")
def endpoint(
    screening: Screening, cluster: Cluster, pacs_port: int, worklist_pacs_port: int
) -> Iterator[Endpoint]:
    """The endpoint; while it runs it holds a CPU that screenings would use."""
    folder = Path(cluster.environment["COVTANET_SERVE_CONFIG"]).parent
    token = secrets.token_urlsafe(32)
    servers = [
        f"dicomweb+http://127.0.0.1:{port}/dicom-web" for port in (pacs_port, worklist_pacs_port)
    ]
    places = ("s3://bucket/archive", *servers)
    write_config(
        folder / "serve.toml", token, model=str(screening.folder / "model"),
        ledger="s3://bucket/served", places=places, max_waiting=2, may_store=True,
        config=str(screening.folder / "screening.toml"), max_uploads_per_caller=4,
    )  # fmt: skip
    with (folder / "serve.toml").open("a") as file:
        digest = hashlib.sha256(READER_TOKEN.encode()).hexdigest()
        file.write(
            f'[[callers]]\nname = "reader"\ntoken_sha256 = "{digest}"\nplaces = {list(places)}\n'
        )
    (port,) = free_ports(1)
    started = start_endpoint(cluster.environment, port, folder / "serve.log", token)
    yield started
    started.service.stop()


@pytest.fixture(scope="session")
def submitted_batch(endpoint: Endpoint, cluster: Cluster) -> SubmittedBatch:
    """A batch of the archive, submitted over HTTP, followed until it ends."""

    def post(request: dict[str, str]) -> tuple[int, Any]:
        body = json.dumps(request).encode()
        return endpoint.ask("POST", "/v1/batches", body, NIGHT_HEADERS)[:2]

    submitted = post(NIGHT)
    path = f"/v1/batches/{submitted[1]['batch_id']}"
    metrics: set[str] = set()
    return SubmittedBatch(
        submitted=submitted,
        repeated=post(NIGHT),
        conflicting=post({"archive": "s3://bucket/archive/nifti"}),
        early_ledger=endpoint.ask("GET", f"{path}/ledger")[:2],
        state=_last_state(endpoint, path, Path(cluster.environment["RAY_TMP"]), metrics),
        metrics=metrics,
    )


def _last_state(endpoint: Endpoint, path: str, temp_folder: Path, metrics: set[str]) -> Any:
    """Follow a batch to its end; add the names of the metrics that there are meanwhile."""
    deadline = time.monotonic() + BATCH_TIMEOUT_S
    while (state := endpoint.ask("GET", path)[1])["state"] in ("waiting", "running"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the batch has not ended after {BATCH_TIMEOUT_S} s: {state}")
        metrics |= scraped_metrics(temp_folder)
        time.sleep(3)
    return state


@pytest.fixture(scope="session")
def batch(submitted_batch: SubmittedBatch) -> str:
    """The id of the submitted batch, which has ended."""
    return str(submitted_batch.submitted[1]["batch_id"])

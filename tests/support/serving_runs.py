"""A real endpoint with a registry, a slow object store and studies whose answers are known."""

import contextlib
import http.client
import json
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import requests
from saved_models import small_model
from slow_proxy import SlowDoor

from covtanet import storage, tracking
from covtanet.ct import nifti
from covtanet.model.saved_model import SavedModel, save_model
from covtanet.phantoms.encodings import dicom_objects, nifti_grid
from covtanet.phantoms.phantom import PhantomConfig, make_phantom
from covtanet.phantoms.sampling import configs
from infra.local.endpoint import SERVE_ENVIRONMENT, Endpoint, start_endpoint, write_config
from infra.local.ray_processes import ray_processes
from infra.local.services import free_ports

RELOAD_EVERY_S, UPLOAD_TIMEOUT_S, REQUEST_TIMEOUT_S = 2.0, 4.0, 30.0
NUM_CALLERS = 8
SLOW_STUDY, LEDGER = "s3://bucket/slow/study", "s3://bucket/ledger"
BACK_WITHIN_S = 30.0
# Columns in which two answers about one study may differ; source_version is an upload's time on
# disk.
NOT_COMPARED = ("screened_at", "decode_s", "predict_s", "source_version")
# What a single study has in common with the row of a job.
MEASURED = (
    "status",
    "p_infected",
    "diagnosis",
    "p_severe",
    "severity",
    "severity_by_involvement",
    "lesion_volume_ml",
    "lung_volume_ml",
    "involvement",
    "lesion_slices",
    "num_slices",
    "spacing_z_mm",
    "series_uid",
    "model_digest",
    "source_digest",
)
# Over HTTP also these.
VALUES = (*MEASURED, "reason", "config_digest", "software_version")
# Texts in the command lines of Ray Serve's processes.
API = "ServeReplica:default:Api"
SEGMENTER = "ServeReplica:default:Segmenter"
CONTROLLER = "ServeController"


@dataclass
class Serving:
    """An endpoint with a registry, a sound study, and the answer of an undisturbed request.

    expected: the study's probability of infection. others: studies of other callers with the rows
    that are right for them.
    """

    folder: Path
    environment: dict[str, str]
    door: SlowDoor
    endpoint: Endpoint
    study: bytes = b""
    expected: float = 0.0
    others: list[tuple[bytes, Any]] = field(default_factory=list)

    def post(self, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, Any, float]:
        """Post a study; return status, answer and Retry-After, or status 0 if the connection
        breaks.
        """
        try:
            status, answer, received = self.endpoint.ask("POST", "/v1/studies", body, headers)
        except requests.RequestException:
            return 0, {}, 0
        return status, answer, float(received.get("Retry-After") or 0)

    def is_right(self) -> bool:
        """Whether the sound study is answered as without a fault."""
        status, answer, _ = self.post(self.study)
        return status == 200 and abs(answer["series"][0]["p_infected"] - self.expected) < 1e-4

    def back_after(self) -> float:
        """Wait until the sound study is answered as without a fault; return the seconds.

        Raises:
            AssertionError: if that takes too long.
        """
        started = time.monotonic()
        while not self.is_right():
            assert time.monotonic() - started < 2 * BACK_WITHIN_S, "it does not come back"
            time.sleep(0.3)
        return time.monotonic() - started

    def post_slow(self) -> http.client.HTTPConnection:
        """Ask for the study that lies in the slow store, and do not wait for the answer."""
        body = json.dumps({"uri": SLOW_STUDY}).encode()
        headers = {
            "Authorization": f"Bearer {self.endpoint.token}",
            "Content-Type": "application/json",
        }
        connection = self.endpoint.announce(len(body), "/v1/studies:by-uri", headers)
        connection.send(body)
        return connection

    @contextlib.contextmanager
    def slow_store(self, bytes_per_s: float) -> Iterator[None]:
        """Limit the object store's answers."""
        self.door.bytes_per_s = bytes_per_s
        try:
            yield
        finally:
            self.door.bytes_per_s = 0.0

    def processes(self, text: str) -> list[psutil.Process]:
        """Processes of this endpoint's Ray whose command line holds a text."""
        return list(ray_processes(self.environment, text))

    def children(self) -> list[psutil.Process]:
        """Child processes of this endpoint's decoders."""
        children = []
        for process in self.processes(API):
            with contextlib.suppress(psutil.Error):
                for child in process.children(recursive=True):
                    if "sandbox_child" in " ".join(child.cmdline()):
                        children.append(child)
        return children

    def versions(self) -> set[str]:
        """Versions of the model that answer now."""
        _, models, _ = self.endpoint.ask("GET", "/v1/models")
        return {model["version"] for model in models}


def environment_of(folder: Path) -> dict[str, str]:
    """Variables that this endpoint's Ray needs beside the usual ones."""
    return {
        "COVTANET_SERVE_CONFIG": str(folder / "serve.toml"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        **SERVE_ENVIRONMENT,
    }


def register(folder: Path, tracking_uri: str, seed: int, model: SavedModel | None = None) -> str:
    """Register a model, without one an untrained model of the seed; return its version."""
    save_model(folder / f"model{seed}", model or small_model(seed))
    address = tracking.RunAddress(
        uri=tracking_uri,
        experiment="faults",
        name=f"model {seed}",
        key=str(seed),
        artifacts=str(folder / "artifacts"),
    )
    return tracking.register_model(address, folder / f"model{seed}", {})


def start_serving(folder: Path, environment: dict[str, str], door: SlowDoor) -> Serving:
    """Register a champion, start the endpoint, and ask about every study once."""
    mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
    tracking.promote(register(folder, environment["MLFLOW_TRACKING_URI"], 0), {})
    token = secrets.token_urlsafe(32)
    (port,) = free_ports(1)
    write_config(
        folder / "serve.toml", token, model="models:/covtanet@champion", ledger=LEDGER,
        places=("s3://bucket/slow",), reload_every_s=RELOAD_EVERY_S, max_waiting=2,
        upload_timeout_s=UPLOAD_TIMEOUT_S, request_timeout_s=REQUEST_TIMEOUT_S,
    )  # fmt: skip
    endpoint = start_endpoint(environment, port, folder / "serve.log", token)
    serving = Serving(folder=folder, environment=environment, door=door, endpoint=endpoint)
    try:
        _ask_undisturbed(serving)
    except BaseException:
        endpoint.service.stop()
        raise
    return serving


def _ask_undisturbed(serving: Serving) -> None:
    (config,) = list(configs(2, 31, 256, 60))[1:]
    serving.study = _as_nifti(config)
    (row,) = _rows(serving, serving.study)
    serving.expected = row["p_infected"]
    slow, *others = configs(1 + NUM_CALLERS, 47, 128, 24)
    slow_phantom = make_phantom(replace(slow, size_px=256, num_slices=60))
    for index, data in enumerate(dicom_objects(slow_phantom, 47)):
        storage.write_bytes(f"{SLOW_STUDY}/{index:04d}.dcm", data)
    for config in others:
        body = _as_nifti(config)
        serving.others.append((body, compared(_rows(serving, body))))


def _as_nifti(config: PhantomConfig) -> bytes:
    phantom = make_phantom(config)
    return nifti.write(phantom.hu, nifti_grid(phantom))


def _rows(serving: Serving, body: bytes) -> list[dict[str, Any]]:
    status, answer, _ = serving.post(body)
    if status != 200:
        raise RuntimeError(f"an undisturbed request is answered with {status} {answer}")
    rows: list[dict[str, Any]] = answer["series"]
    return rows


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the columns that differ between two answers about one study."""
    return [
        {name: value for name, value in row.items() if name not in NOT_COMPARED} for row in rows
    ]


def check_equals_row(answer: dict[str, Any], row: dict[str, Any], *, is_uploaded: bool) -> None:
    """Check that an answer has one series, with the values of a job's row."""
    (series,) = answer["series"]
    assert answer["model"]["digest"] == row["model_digest"]
    for name in VALUES:
        if name == "source_digest" and is_uploaded:
            continue  # of objects with their names, which an upload does not keep
        expected = row[name]
        if isinstance(expected, float):
            expected = pytest.approx(expected, rel=1e-5)
        assert series[name] == expected, (row["source_format"], name)


def kill(environment: dict[str, str], text: str) -> None:
    """Kill a process of this environment's Ray as a crash would."""
    process = next(ray_processes(environment, text), None)
    assert process is not None, f"no {text} runs"
    process.kill()


def hang_up(connection: http.client.HTTPConnection) -> None:
    """Close a connection as a caller who is gone does."""
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()

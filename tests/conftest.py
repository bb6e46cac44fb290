"""Shared builders: phantoms, a small saved model, a real S3 server, one Ray cluster for all tests that need one."""

import importlib.util
import json
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch

from covtanet.ct.volume import Volume, canonical_volume
from covtanet.model.checkpoint import SavedModel, save_model
from covtanet.model.covtanet import SIZES, CovTANet
from covtanet.model.description import Capabilities, Preprocessing
from covtanet.phantoms.phantom import Phantom, PhantomConfig, make_phantom

if TYPE_CHECKING:
    from endpoint import Endpoint
    from faults import Setting, Training
    from faults_screening import Screening
    from services import Job

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "infra" / "local"), str(ROOT / "jobs"), str(ROOT / "tests")]


def load_job(name: str) -> ModuleType:
    """A module of jobs/, some of whose names stand in infra/local too."""
    spec = importlib.util.spec_from_file_location(f"jobs_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the endpoint last: while it runs it holds a CPU that screenings would use."""
    items.sort(key=lambda item: "endpoint" in getattr(item, "fixturenames", ()))


@pytest.fixture(autouse=True)
def _no_network_in_unit_tests(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit test may not open a socket or sleep."""
    if "unit" not in Path(request.node.path).parts:
        return

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a unit test may not open a socket or sleep")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(time, "sleep", refuse)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random weights, and on one thread: two that wait for each other crawl on a
    machine that does other work too.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mild() -> Phantom:
    """A phantom with a tenth of its lung affected."""
    return make_phantom(
        PhantomConfig(
            seed=5, involvement=0.1, size_px=128, num_slices=24, pixel_mm=2.8, slice_mm=11
        )
    )


@pytest.fixture(scope="session")
def mild_volume(mild: Phantom) -> Volume:
    return canonical_volume(mild.hu, mild.affine)


def small_model(seed: int = 0) -> SavedModel:
    """An untrained small network whose lesion map and diagnosis are not all one class."""
    torch.manual_seed(seed)
    network = CovTANet(SIZES["small"]).eval()
    return SavedModel(
        network=network.requires_grad_(False),
        preprocessing=Preprocessing(size_px=128),
        capabilities=Capabilities(segments=True, diagnoses=True),
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    save_model(folder, small_model())
    return folder


@dataclass(frozen=True)
class S3:
    """A running S3 server with one bucket."""

    uri: str
    folder: Path
    environment: dict[str, str]


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """rclone's S3 server on loopback, with keys; its variables stand in the environment for the session."""
    from services import start_s3

    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    server = start_s3(folder, folder.parent / "s3.log")
    before = dict(os.environ)
    os.environ.update(server.environment)
    yield S3("s3://bucket", folder / "bucket", server.environment)
    os.environ.clear()
    os.environ.update(before)
    server.stop()


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster and the environment in which jobs find it."""

    environment: dict[str, str]

    def start_job(self, script: str, *arguments: str) -> "Job":
        """Start a job as its own process group."""
        from services import start_job

        return start_job(self.environment, script, *arguments)

    def run_job(self, script: str, *arguments: str, expect: int = 0) -> str:
        """Run a job to its end and return what it printed."""
        job = self.start_job(script, *arguments)
        code = job.finish()
        assert code == expect, job.output
        return job.output


@pytest.fixture(scope="session")
def cluster(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One Ray cluster with dashboard on free ports, shared by all tests that need one."""
    from endpoint import SERVE_ENVIRONMENT
    from services import start_ray, write_private

    folder = tmp_path_factory.mktemp("ray")
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    registry = f"sqlite:///{folder}/mlflow.db"
    environment = {
        **s3.environment,
        "MLFLOW_TRACKING_URI": registry,
        "COVTANET_SERVE_CONFIG": str(folder / "serve.toml"),
        **SERVE_ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with (
        tempfile.TemporaryDirectory(prefix="cov") as short,
        tempfile.TemporaryDirectory(prefix="cov") as other,
    ):
        # Somebody else's Ray was here before: whatever looks for "the" Ray of this machine finds two.
        foreign_token = folder / "foreign_token"
        write_private(foreign_token, secrets.token_hex(32))
        foreign = start_ray(folder / "foreign.log", {}, foreign_token, Path(other), num_cpus=1)
        ray = start_ray(folder / "ray.log", environment, folder / "token", Path(short))
        yield Cluster({**os.environ, **ray.environment, "RAY_TMP": short})
        ray.stop()
        foreign.stop()


@pytest.fixture(scope="session")
def setting(s3: S3, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> "Setting":
    """Tiny phantoms in MosMedData's layout in S3, and where trainings of them go."""
    import faults

    from covtanet.phantoms.training_set import write_mosmed

    write_mosmed("s3://bucket/mosmed", faults.PHANTOMS, 2)
    return faults.Setting(
        environment=cluster.environment,
        folder=tmp_path_factory.mktemp("trainings"),
        data="s3://bucket/mosmed",
    )


@pytest.fixture(scope="session")
def trained(setting: "Setting", s3: S3, cluster: Cluster) -> "Training":
    """One of three folds through both phases, undisturbed, in S3 and in the registry that all tests share."""
    training = setting.training("clean")
    training.storage, training.stored = "s3://bucket/training", s3.folder / "training"
    training.environment = cluster.environment
    output = training.run()
    assert "registered covtanet version 1 as challenger" in output
    assert "every lesion mask is of grade CT-1" in output
    return training


def has_manifest(screening: "Screening", name: str) -> bool:
    return bool(list((screening.bucket / name).glob("_work/*/manifest.parquet")))


@pytest.fixture(scope="session")
def screening(s3: S3, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> "Screening":
    """An archive in S3 with damaged series, a model, and the ledger of a run that was planned and not disturbed."""
    from faults_screening import Screening, fill

    folder = tmp_path_factory.mktemp("screening")
    found = Screening(folder=folder, bucket=s3.folder, s3=None, environment=cluster.environment)
    fill(found)
    found.planned = found.run("clean", "--plan")
    assert has_manifest(found, "clean")
    assert found.rows_done("clean") == 0
    assert not found.is_committed("clean")
    output = found.run("clean", "--results", "s3://bucket/clean-results")
    assert "ignored, no series: 1 .txt" in output
    assert "this store lets a PUT replace a file" in output  # rclone does
    found.clean = found.table("clean")
    return found


@pytest.fixture(scope="session")
def endpoint(
    screening: "Screening", cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator["Endpoint"]:
    from endpoint import start_endpoint, write_config
    from services import free_ports

    folder, token = (
        Path(cluster.environment["COVTANET_SERVE_CONFIG"]).parent,
        secrets.token_urlsafe(32),
    )
    write_config(
        folder / "serve.toml", token, model=str(screening.folder / "model"), ledger="s3://bucket/served",
        places=("s3://bucket/archive",), max_waiting=2, config=str(screening.folder / "screening.toml"),
        max_uploads_per_caller=4,
    )  # fmt: skip
    (port,) = free_ports(1)
    started = start_endpoint(cluster.environment, port, folder / "serve.log", token)
    yield started
    started.service.stop()


NIGHT = {"archive": "s3://bucket/archive", "run_date": datetime.now(UTC).date().isoformat()}
NIGHT_HEADERS = {"Content-Type": "application/json", "Idempotency-Key": "one night"}


@pytest.fixture(scope="session")
def batch(endpoint: "Endpoint") -> str:
    """A batch of the archive, submitted over HTTP and committed; its id."""
    body = json.dumps(NIGHT).encode()
    status, submitted, _ = endpoint.ask("POST", "/v1/batches", body, NIGHT_HEADERS)
    assert status == 202
    assert (
        endpoint.ask("POST", "/v1/batches", body, NIGHT_HEADERS)[1]["batch_id"]
        == submitted["batch_id"]
    )
    other = json.dumps({"archive": "s3://bucket/archive/nifti"}).encode()
    assert endpoint.ask("POST", "/v1/batches", other, NIGHT_HEADERS)[0] == 422
    path, deadline = f"/v1/batches/{submitted['batch_id']}", time.monotonic() + 400
    status, early, _ = endpoint.ask("GET", f"{path}/ledger")
    assert (status, early["reason"]) == (404, "not_there")
    while (state := endpoint.ask("GET", path)[1])["state"] in ("waiting", "running"):
        assert time.monotonic() < deadline, state
        time.sleep(1)
    assert state["state"] == "committed", state
    return str(submitted["batch_id"])

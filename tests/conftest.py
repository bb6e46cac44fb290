"""Fixtures of all tests, and the guard that keeps unit tests free of processes, sockets and sleep.

Session fixtures: phantoms, a small saved model, a real S3 server, and one Ray cluster for all tests
that need one. Fixtures assert nothing: they keep what they saw, and a test looks at it.
"""

import multiprocessing.process
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
import torch
from saved_models import small_model

from covtanet.ct.volume import Volume, canonical_volume
from covtanet.model.saved_model import save_model
from covtanet.phantoms.phantom import Phantom, PhantomConfig, make_phantom

# Modules that bring in Ray's client, MLflow or psutil load inside the fixtures that need them: the
# workers of pytest-xdist import this file, and their start would take seconds longer.
if TYPE_CHECKING:
    from running import S3, Cluster
    from screening_runs import Screening
    from training_runs import TrainingRun, TrainingSetup

    from infra.pacs.orthanc import Orthanc


def _refuse(*args: object, **kwargs: object) -> NoReturn:
    raise AssertionError(
        "a unit test may not start a process or Ray, connect or bind a socket, or sleep; "
        "move it to tests/integration"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Refuse processes, Ray, sockets and sleep in tests/unit, in fixtures of any scope too."""
    if "unit" not in item.path.parts:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        # Methods of the classes: a name that a module imported earlier is refused as well.
        patch.setattr(subprocess.Popen, "__init__", _refuse)
        patch.setattr(multiprocessing.process.BaseProcess, "start", _refuse)
        patch.setattr(socket.socket, "connect", _refuse)
        patch.setattr(socket.socket, "bind", _refuse)
        patch.setattr(os, "fork", _refuse)
        patch.setattr(time, "sleep", _refuse)
        patch.setenv("PATH", "")  # no program is found: software_version asks no git
        if "ray" in sys.modules:  # a test that imports it later starts processes, see above
            patch.setattr(sys.modules["ray"], "init", _refuse)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep compiled networks of tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COVTANET_CACHE", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random weights, and on one thread.

    Two threads that wait for each other crawl on a machine that does other work too.
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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    save_model(folder, small_model())
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator["S3"]:
    """rclone's S3 server on loopback, with keys; ``os.environ`` leads to it for the session."""
    from running import S3

    from infra.local.services import start_s3

    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    server = start_s3(folder, folder.parent / "s3.log")
    before = dict(os.environ)
    os.environ.update(server.environment)
    yield S3("s3://bucket", folder / "bucket", server.environment)
    os.environ.clear()
    os.environ.update(before)
    server.stop()


@pytest.fixture(scope="session")
def cluster(s3: "S3", tmp_path_factory: pytest.TempPathFactory) -> Iterator["Cluster"]:
    """One Ray cluster with dashboard on free ports, shared by all tests that need one."""
    from pacs import credentials
    from running import Cluster

    from infra.local.endpoint import SERVE_ENVIRONMENT
    from infra.local.services import start_ray, write_private

    folder = tmp_path_factory.mktemp("ray")
    environment = {
        **s3.environment,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "COVTANET_SERVE_CONFIG": str(folder / "serve.toml"),
        **SERVE_ENVIRONMENT,
        **credentials(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    token = folder / "token"
    foreign_token = folder / "foreign_token"
    write_private(token, secrets.token_hex(32))
    write_private(foreign_token, secrets.token_hex(32))
    with (
        tempfile.TemporaryDirectory(prefix="cov") as short,
        tempfile.TemporaryDirectory(prefix="cov") as foreign_short,
    ):
        # A Ray of another user runs first: code that looks for "the" Ray of this machine sees two.
        foreign = start_ray(
            folder / "foreign.log", {}, foreign_token, Path(foreign_short), num_cpus=1
        )
        ray = start_ray(folder / "ray.log", environment, token, Path(short))
        yield Cluster({**os.environ, **ray.environment, "RAY_TMP": short})
        ray.stop()
        foreign.stop()


@pytest.fixture(scope="session")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Orthanc"]:
    """A real Orthanc with some phantoms, and with series that are not to be screened."""
    from pacs import PASSWORD, fill

    from infra.pacs.orthanc import INSTALL, is_installed, start_orthanc

    if not is_installed():
        pytest.skip(f"Orthanc is not installed: {INSTALL}")
    server = start_orthanc(tmp_path_factory.mktemp("orthanc"), PASSWORD)
    fill(server)
    yield server
    server.service.stop()


@pytest.fixture(scope="session")
def training_setup(
    s3: "S3", cluster: "Cluster", tmp_path_factory: pytest.TempPathFactory
) -> "TrainingSetup":
    """Tiny phantoms in MosMedData's layout in S3, and a folder for trainings of them."""
    from training_runs import PHANTOMS, TrainingSetup

    from covtanet.phantoms.training_set import write_mosmed

    write_mosmed("s3://bucket/mosmed", PHANTOMS, 2)
    return TrainingSetup(
        environment=cluster.environment,
        folder=tmp_path_factory.mktemp("trainings"),
        data="s3://bucket/mosmed",
    )


@pytest.fixture(scope="session")
def trained(training_setup: "TrainingSetup", s3: "S3", cluster: "Cluster") -> "TrainingRun":
    """One of three folds through both phases, undisturbed, in S3 and in the shared registry."""
    training = training_setup.training("clean")
    training.storage = "s3://bucket/training"
    training.stored = s3.folder / "training"
    training.environment = cluster.environment
    training.run()
    return training


@pytest.fixture(scope="session")
def screening(
    s3: "S3", cluster: "Cluster", tmp_path_factory: pytest.TempPathFactory
) -> "Screening":
    """An archive in S3 with damaged series, and the ledger of a run that was planned, then run."""
    from screening_runs import Screening, write_archive_and_model

    screening = Screening(
        folder=tmp_path_factory.mktemp("screening"),
        bucket=s3.folder,
        environment=cluster.environment,
    )
    write_archive_and_model(screening)
    screening.planned = screening.plan("clean")
    screening.clean_output = screening.run("clean", "--results", "s3://bucket/clean-results")
    screening.clean = screening.table("clean")
    return screening

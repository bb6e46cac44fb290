"""Registered models behind a real MLflow server, which hands their files through."""

import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from covtanet import tracking
from covtanet.errors import CheckpointError
from covtanet.model import model_files
from infra.local.services import free_ports, start_mlflow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    (port,) = free_ports(1)
    service = start_mlflow(tmp_path_factory.mktemp("mlflow"), port)
    before, uri = mlflow.get_tracking_uri(), service.environment["MLFLOW_TRACKING_URI"]
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(before)
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # which set_tracking_uri leaves behind
    service.stop()


def test_mlflow_server_returns_both_model_files(
    server: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = tracking.RunAddress(uri=server, experiment="models", name="one", key="one")
    version = tracking.register_model(address, model_folder, {})
    source = mlflow.MlflowClient().get_model_version("covtanet", version).source
    assert source.startswith("mlflow-artifacts:/")
    found = tracking.resolve_model(f"models:/covtanet/{version}", tmp_path / "found")
    assert found.digest == model_files.model_digest(model_folder)
    names = sorted(path.name for path in found.folder.iterdir())
    assert names == ["model.json", "weights.safetensors"]
    monkeypatch.setenv("COVTANET_MODEL_SOURCES", "mlflow-artifacts:/elsewhere")
    with pytest.raises(CheckpointError, match="outside of COVTANET_MODEL_SOURCES"):
        tracking.resolve_model(f"models:/covtanet/{version}", tmp_path / "other")


def test_version_with_missing_or_large_files_is_refused(
    server: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = tracking.RunAddress(uri=server, experiment="models", name="two", key="two")
    version = tracking.register_model(address, model_folder, {})
    client = mlflow.MlflowClient()
    known = client.get_model_version("covtanet", version)
    monkeypatch.setitem(model_files.MODEL_FILES, "weights.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors has more than 100 bytes"):
        tracking.resolve_model(f"models:/covtanet/{version}", tmp_path / "large")
    gone = client.create_model_version(
        "covtanet", f"{known.source}/nothing", known.run_id, tags=known.tags
    )
    with pytest.raises(CheckpointError, match=r"no model\.json or weights"):
        tracking.resolve_model(f"models:/covtanet/{gone.version}", tmp_path / "gone")

"""Both phases on a real Ray cluster, to a registered model that screens."""

from pathlib import Path

import mlflow
import pytest
from conftest import S3, Cluster
from mlflow.tracking import MlflowClient

from covtanet import tracking
from covtanet.data.phantom_archive import configs, write_training_set
from covtanet.errors import CheckpointError
from covtanet.model.checkpoint import load_model

RECIPE = """
[training]
size = "small"
validation_share = 0.34
[training.phase1]
num_epochs = 2
batch_size = 4
learning_rate = 4e-3
[training.phase2]
num_epochs = 3
batch_size = 2
learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def registered(s3: S3, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train on nine tiny phantoms in S3; returns the tracking URI."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "tiny.toml").write_text(RECIPE)
    write_training_set("s3://bucket/training", configs(9, 31, size_px=64, num_slices=10), 2)
    output = cluster.run_job(
        "train.py", "--config", str(folder / "tiny.toml"), "--data", "s3://bucket/training",
        "--storage", "s3://bucket/checkpoints", "--experiment", "test", "--artifacts", str(folder / "artifacts"),
        "--alias", "champion",
    )  # fmt: skip
    assert "registered covtanet version 1 as champion" in output
    return cluster.environment["MLFLOW_TRACKING_URI"]


@pytest.fixture(autouse=True)
def _tracking(registered: str) -> None:
    mlflow.set_tracking_uri(registered)


def test_both_phases_log_every_epoch_once(registered: str) -> None:
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "phase1/val_dice")] == [0, 1]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "phase2/val_loss")] == [0, 1, 2]
    assert run.data.params["phase1.learning_rate"] == "0.004"
    assert run.data.params["size"] == "small"


def test_registered_version_holds_weights_network_and_preprocessing(registered: str, tmp_path: Path) -> None:
    resolved = tracking.resolve_model("models:/covtanet@champion", tmp_path)
    assert sorted(path.name for path in resolved.folder.iterdir()) == ["model.json", "weights.safetensors"]
    model = load_model(resolved.folder, resolved.digest)
    assert resolved.version == "1"
    assert model.preprocessing["window"] == {"low_hu": -1000.0, "high_hu": 400.0, "size_px": 128}
    assert model.provenance["num_volumes"] == 9
    assert model.provenance["recipe"]["phase2"]["num_epochs"] == 3


def test_changed_artifact_is_refused(registered: str, tmp_path: Path) -> None:
    source = MlflowClient().get_model_version("covtanet", "1").source
    description = Path(source.removeprefix("file://")) / "model.json"
    original = description.read_text()
    description.write_text(original.replace("-1000.0", "-900.0"))
    try:
        with pytest.raises(CheckpointError, match="differ from the digest in the registry"):
            tracking.resolve_model("models:/covtanet/1", tmp_path)
    finally:
        description.write_text(original)


def test_registered_model_screens_by_its_alias(registered: str, s3: S3, cluster: Cluster) -> None:
    cluster.run_job(
        "screen.py", "--archive", "s3://bucket/training/volumes", "--ledger", "s3://bucket/by-alias",
        "--model", "models:/covtanet@champion", "--limit", "2", "--results", "s3://bucket/by-alias-results",
    )  # fmt: skip
    import pyarrow.parquet as pq

    (committed,) = (s3.folder / "by-alias").glob("date=*/*.parquet")
    rows = pq.read_table(committed).to_pylist()
    assert [(row["status"], row["model_name"], row["model_version"]) for row in rows] == [
        ("screened", "covtanet", "1")
    ] * 2
    kept = sorted(path.name for path in (s3.folder / "by-alias-results").rglob("*") if path.is_file())
    assert kept == [
        "lesion_mask.nii.gz",
        "lesion_mask.nii.gz",
        "lung_mask.nii.gz",
        "lung_mask.nii.gz",
        "preview.png",
        "preview.png",
    ]

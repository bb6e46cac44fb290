"""Training on a real Ray cluster: folds to a registered model that is promoted, screens, and answers as pyfunc."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, S3, Cluster
from mlflow.tracking import MlflowClient

from covtanet import tracking
from covtanet.ct import nifti
from covtanet.data.phantom import make_phantom
from covtanet.data.phantom_archive import configs, dicom_objects, nifti_grid, write_mosmed
from covtanet.errors import CheckpointError
from covtanet.model.checkpoint import load_model, save_model

RECIPE = """
[training]
dataset = "mosmed"
size = "small"
num_folds = 3
folds = [0]
validation_share = 0.3
[training.phase1]
num_epochs = 2
batch_size = 2
learning_rate = 4e-3
[training.phase2]
num_epochs = 3
batch_size = 1
learning_rate = 1e-3
"""
PHASES = {f"V7 fold 0 phase {phase}": list(range(1 + phase)) for phase in (1, 2)}


@pytest.fixture(scope="module")
def registered(s3: S3, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Train one of three folds on tiny phantoms in MosMedData's layout in S3; returns the command's arguments."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "tiny.toml").write_text(RECIPE)
    write_mosmed("s3://bucket/mosmed", configs(15, 31, size_px=64, num_slices=12), 2)
    arguments = [
        "--config", str(folder / "tiny.toml"), "--data", "s3://bucket/mosmed", "--storage", "s3://bucket/training",
        "--experiment", "test", "--artifacts", str(folder / "artifacts"),
    ]  # fmt: skip
    output = cluster.run_job("train.py", *arguments)
    assert "registered covtanet version 1 as challenger" in output
    assert "every lesion mask is of grade CT-1" in output
    return arguments


@pytest.fixture(autouse=True)
def _tracking(registered: list[str], cluster: Cluster) -> None:
    mlflow.set_tracking_uri(cluster.environment["MLFLOW_TRACKING_URI"])


def runs() -> dict[str, Any]:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("test")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def artifacts(run: Any, path: str = "") -> list[str]:
    found = []
    for item in MlflowClient().list_artifacts(run.info.run_id, path):
        found += artifacts(run, item.path) if item.is_dir else [item.path]
    return found


def test_one_parent_and_one_child_per_fold_and_phase_with_every_epoch_once() -> None:
    client, found = MlflowClient(), runs()
    children = {name: run for name, run in found.items() if "phase" in name}
    (parent,) = [run for name, run in found.items() if "phase" not in name]
    assert {
        name: [metric.step for metric in client.get_metric_history(run.info.run_id, "epoch")]
        for name, run in children.items()
    } == PHASES
    for run in children.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        assert any(name.startswith("alpha/") for name in run.data.metrics)
    assert any(name.startswith("system/") for run in children.values() for name in run.data.metrics)
    assert parent.data.params["phase1.learning_rate"] == "0.004"
    assert "data_digest" in parent.data.params


def test_artifacts_hold_configuration_folds_and_pictures() -> None:
    found = runs()
    (parent,) = [run for name, run in found.items() if "phase" not in name]
    assert {"config.json", "folds.json", "roc.png", "confusion.png", "reliability.png"} <= set(artifacts(parent))
    first = artifacts(found["V7 fold 0 phase 1"])
    assert "curves.png" in first
    assert sum(path.startswith("overlays/") for path in first) == 2


def test_folds_split_by_patient_and_stand_with_the_run(s3: S3) -> None:
    (path,) = (s3.folder / "training").glob("test-*/folds.json")
    folds = json.loads(path.read_text())
    assert sorted(folds.values()) == sorted([0, 1, 2] * 5)


def test_the_same_command_finds_all_done_and_registers_nothing_twice(registered: list[str], cluster: Cluster) -> None:
    output = cluster.run_job("train.py", *registered)
    assert "phase 1 epoch" not in output
    assert "registered covtanet version 1 as challenger" in output
    test_one_parent_and_one_child_per_fold_and_phase_with_every_epoch_once()


def test_registered_version_holds_weights_network_and_preprocessing(registered: list[str], tmp_path: Path) -> None:
    resolved = tracking.resolve_model("models:/covtanet@challenger", tmp_path)
    assert sorted(path.name for path in resolved.folder.iterdir()) == ["model.json", "weights.safetensors"]
    model = load_model(resolved.folder, resolved.digest)
    assert model.preprocessing["window"] == {"low_hu": -1000.0, "high_hu": 400.0, "size_px": 128}
    assert model.preprocessing["slice_step_mm"] == 2.5
    assert model.provenance["recipe"]["phase2"]["num_epochs"] == 3
    assert len(model.provenance["seen_sources"]) == model.provenance["num_volumes"] == 10
    tags = MlflowClient().get_model_version("covtanet", "1").tags
    assert tags["covtanet.model_digest"] == resolved.digest
    assert "covtanet.normal_vs_severe_auc" in tags


def test_changed_artifact_is_refused(registered: list[str], tmp_path: Path) -> None:
    source = Path(MlflowClient().get_model_version("covtanet", "1").source.removeprefix("file://"))
    (description,) = source.rglob("model.json")
    original = description.read_text()
    description.write_text(original.replace("-1000.0", "-900.0"))
    try:
        with pytest.raises(CheckpointError, match="differ from the digest in the registry"):
            tracking.resolve_model("models:/covtanet/1", tmp_path)
    finally:
        description.write_text(original)


def test_ablation_rows_share_the_folds_and_fill_table_i(
    registered: list[str], s3: S3, cluster: Cluster, tmp_path: Path
) -> None:
    output = cluster.run_job("train.py", *registered, "--ablation", "V1", "--fold", "1")
    (trained,) = (s3.folder / "training").glob("test-*")
    assert f"s3://bucket/training/{trained.name}" in output
    output = cluster.run_job("evaluate.py", "--model", f"s3://bucket/training/{trained.name}", "--out", str(tmp_path))
    for row in ("V1 | ours, fold 1", "V7 | ours, fold 0", "Unet | ours, fold 1", "TA-SegNet | ours", "CovTANet | ours"):
        assert f"| {row}" in output, row
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["networks"]["V7"]["folds"]) == {"0"}
    assert set(metrics["networks"]["V1"]["folds"]) == {"1"}
    assert metrics["networks"]["V1"]["classification"] == {"num_volumes": 0}
    assert {"table-i.csv", "table-ii.png", "table-iv.csv", "V7-roc.png"} <= {path.name for path in tmp_path.iterdir()}


def test_first_champion_needs_a_reason_and_then_screens_by_its_alias(
    registered: list[str], s3: S3, cluster: Cluster
) -> None:
    output = cluster.run_job("promote.py", "--dataset", "mosmed", "--data", "s3://bucket/mosmed", expect=3)
    assert "there is no champion to compare with" in output
    output = cluster.run_job("promote.py", "--force", "the first one")
    assert "champion is version 1, was none" in output
    assert MlflowClient().get_model_version("covtanet", "1").tags["covtanet.promoted_by_force"] == "the first one"
    cluster.run_job(
        "screen.py", "--archive", "s3://bucket/mosmed/studies/CT-2", "--ledger", "s3://bucket/by-alias",
        "--model", "models:/covtanet@champion", "--limit", "2", "--results", "s3://bucket/by-alias-results",
    )  # fmt: skip
    (committed,) = (s3.folder / "by-alias").glob("date=*/*.parquet")
    rows = pq.read_table(committed).to_pylist()
    assert [(row["status"], row["model_name"], row["model_version"]) for row in rows] == [
        ("screened", "covtanet", "1")
    ] * 2
    kept = sorted(path.name for path in (s3.folder / "by-alias-results").rglob("*") if path.is_file())
    assert kept == sorted(["lesion_mask.nii.gz", "lung_mask.nii.gz", "preview.png"] * 2)


VALUES = (
    "status", "p_infected", "diagnosis", "p_severe", "severity", "severity_by_involvement", "lesion_volume_ml",
    "lung_volume_ml", "involvement", "lesion_slices", "num_slices", "num_slices_segmented", "spacing_z_mm",
    "source_digest", "series_uid", "source_format", "model_digest",
)  # fmt: skip


def test_pyfunc_gives_the_jobs_values_on_a_file_and_on_a_folder(
    registered: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    """The flavour for those who trust their registry, loaded as they would."""
    cluster.run_job("promote.py", "--force", "for this test")
    (config,) = configs(1, 63, size_px=96, num_slices=20)
    phantom, archive = make_phantom(config), tmp_path / "archive"
    (archive / "study").mkdir(parents=True)
    (archive / "a.nii.gz").write_bytes(nifti.write(phantom.hu, nifti_grid(phantom)))
    for index, data in enumerate(dicom_objects(phantom, 63)):
        (archive / "study" / f"{index:03d}").write_bytes(data)
    cluster.run_job(
        "screen.py", "--archive", str(archive), "--ledger", str(tmp_path / "ledger"),
        "--model", "models:/covtanet@champion",
    )  # fmt: skip
    expected = {row["source_format"]: row for row in pq.read_table(tmp_path / "ledger").to_pylist()}
    loaded = mlflow.pyfunc.load_model("models:/covtanet@champion")
    found = loaded.predict([str(archive / "a.nii.gz"), str(archive / "study")])
    assert list(found["source_format"]) == ["nifti", "dicom"]
    for _, row in found.iterrows():
        job = expected[row["source_format"]]
        for name in VALUES:
            same = row[name] == job[name] or (job[name] is None and row[name] is None)
            both = isinstance(job[name], float) and np.isclose(row[name], job[name], rtol=1e-6)
            assert same or both, (name, row[name], job[name])


def register_with_bias(bias: float, cluster: Cluster, folder: Path) -> str:
    """Register the trained model with another bias of its lesion head; returns the version."""
    resolved = tracking.resolve_model("models:/covtanet/1", folder / f"source{bias}")
    model = load_model(resolved.folder)
    model.network.segnet.filter[-1].bias.fill_(bias)
    save_model(folder / f"model{bias}", model)
    address = tracking.RunAddress(
        uri=cluster.environment["MLFLOW_TRACKING_URI"], experiment="altered", name=f"bias {bias}", key=f"bias {bias}",
        artifacts=str(folder / "artifacts"),
    )  # fmt: skip
    return tracking.register_model(address, folder / f"model{bias}", {})


def test_promotion_refuses_a_worse_challenger_and_takes_a_better_one(
    registered: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    """One that calls every pixel a lesion has some Dice, one that calls none has none; all else of them is equal."""
    everything, nothing = (register_with_bias(bias, cluster, tmp_path) for bias in (100.0, -100.0))
    write_mosmed(str(tmp_path / "others"), configs(6, 77, size_px=64, num_slices=12), 2)
    data = ("--dataset", "mosmed", "--data", str(tmp_path / "others"), "--storage", str(tmp_path / "storage"))
    cluster.run_job("promote.py", "--version", everything, "--force", "a start")
    output = cluster.run_job("promote.py", "--version", nothing, *data, expect=4)
    assert f"version {nothing} is worse in dice; champion stays {everything}" in output
    assert tracking.version_of("champion") == everything
    cluster.run_job("promote.py", "--version", nothing, "--force", "to be replaced")
    output = cluster.run_job("promote.py", "--version", everything, *data)
    assert f"champion is version {everything}, was {nothing}" in output
    assert tracking.version_of("champion") == everything


def test_stacks_are_evaluated_on_their_own_and_say_what_is_unknown(
    registered: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    """--images and --masks: a grey stack with lung and lesion labels, and one with a lesion mask alone."""
    (config,) = configs(1, 64, size_px=64, num_slices=12)
    phantom = make_phantom(replace(config, involvement=0.2))
    grey = np.clip((phantom.hu + 1000) / 1400 * 255, 0, 255).astype(np.uint8)
    labels = phantom.lung_mask.astype(np.uint8) + (phantom.lung_mask & phantom.lesion_mask)
    grid, images, masks = nifti_grid(phantom), tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for name, mask in (("a", labels), ("b", phantom.lesion_mask)):
        (images / f"{name}.nii.gz").write_bytes(nifti.write(grey, grid))
        (masks / f"{name}{'_lung-infection' if name == 'a' else '_mask'}.nii.gz").write_bytes(nifti.write(mask, grid))
    output = cluster.run_job(
        "evaluate.py", "--model", "models:/covtanet/1", "--out", str(tmp_path / "out"),
        "--images", str(images), "--masks", str(masks),
    )  # fmt: skip
    assert re.search(r"intensity grey8 +2", output)
    assert "### Table III" in output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["num_volumes_trained_on"] == 0
    assert metrics["networks"]["V7"]["segmentation"]["num_volumes"] == 2
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 2


def test_recipes_are_read_and_the_papers_is_the_papers() -> None:
    """Section III-B: five folds, Adam at 1e-5, times 0.99 every 10 epochs."""
    from covtanet.config import load_config

    recipes = {path.stem: load_config(path).training for path in sorted((ROOT / "recipes").glob("*.toml"))}
    paper = recipes["mosmed"]
    assert paper.folds == (0, 1, 2, 3, 4)
    for phase in (paper.phase1, paper.phase2):
        assert (phase.learning_rate, phase.decay, phase.decay_epochs) == (1e-5, 0.99, 10)
    assert not paper.augment.is_on

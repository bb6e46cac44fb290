"""Training on a real Ray cluster: folds to a registered model that is promoted, screens, and
answers as pyfunc.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient
from repository import ROOT
from running import S3, Cluster
from serving_runs import MEASURED
from training_runs import EPOCHS, TrainingRun

from covtanet import storage, tracking
from covtanet.ct import nifti
from covtanet.errors import CheckpointError
from covtanet.evaluation import rows
from covtanet.model.description import Capabilities, Preprocessing
from covtanet.model.saved_model import load_model, save_model
from covtanet.phantoms.encodings import dicom_objects, nifti_grid
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs
from covtanet.phantoms.training_set import write_mosmed


@pytest.fixture(scope="module")
def registered(trained: TrainingRun) -> list[str]:
    """The registry holds a trained model; returns the arguments of the command that trained it."""
    return trained.arguments


@pytest.fixture(autouse=True)
def _tracking(registered: list[str], cluster: Cluster) -> None:
    mlflow.set_tracking_uri(cluster.environment["MLFLOW_TRACKING_URI"])


def runs() -> dict[str, Any]:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("covtanet")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def artifacts(run: Any, path: str = "") -> list[str]:
    found: list[str] = []
    for item in MlflowClient().list_artifacts(run.info.run_id, path):
        found += artifacts(run, item.path) if item.is_dir else [item.path]
    return found


def test_training_registers_its_model_as_challenger(trained: TrainingRun) -> None:
    assert "registered covtanet version 1 as challenger" in trained.output
    assert "every lesion mask is of grade CT-1" in trained.output


def test_tracker_has_every_epoch_of_every_phase_once() -> None:
    client, found = MlflowClient(), runs()
    children = {name: run for name, run in found.items() if "phase" in name}
    (parent,) = [run for name, run in found.items() if "phase" not in name]
    assert {
        name: [metric.step for metric in client.get_metric_history(run.info.run_id, "epoch")]
        for name, run in children.items()
    } == {f"V7 fold 0 phase {phase}": list(range(EPOCHS[phase - 1])) for phase in (1, 2)}
    for run in children.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        assert any(name.startswith("alpha/") for name in run.data.metrics)
    assert any(name.startswith("system/") for run in children.values() for name in run.data.metrics)
    assert "network" not in parent.data.params  # the experiment's other networks share the run
    assert parent.data.params["phase1.learning_rate"] == "0.004"
    assert "data_digest" in parent.data.params


def test_run_artifacts_hold_configuration_folds_and_pictures() -> None:
    found = runs()
    (parent,) = [run for name, run in found.items() if "phase" not in name]
    assert "folds.json" in artifacts(parent)
    assert {
        f"V7/{name}" for name in ("config.json", "roc.png", "confusion.png", "reliability.png")
    } <= set(artifacts(parent))
    first = artifacts(found["V7 fold 0 phase 1"])
    assert "curves.png" in first
    assert sum(path.startswith("overlays/") for path in first) == 2


def test_folds_are_stored_with_the_training(s3: S3) -> None:
    (path,) = (s3.folder / "training").glob("covtanet-*/folds.json")
    folds = json.loads(path.read_text())
    assert sorted(folds.values()) == sorted([0, 1, 2] * 5)


def test_train_again_registers_no_second_version(registered: list[str], cluster: Cluster) -> None:
    output = cluster.run_job("train.py", *registered)
    assert "phase 1 epoch" not in output
    assert "registered covtanet version 1 as challenger" in output
    test_tracker_has_every_epoch_of_every_phase_once()


def test_registered_version_holds_weights_and_preprocessing(
    registered: list[str], tmp_path: Path
) -> None:
    resolved = tracking.resolve_model("models:/covtanet@challenger", tmp_path)
    assert sorted(path.name for path in resolved.folder.iterdir()) == [
        "model.json",
        "weights.safetensors",
    ]
    model = load_model(resolved.folder, resolved.digest)
    assert model.preprocessing == Preprocessing(
        low_hu=-1000.0, high_hu=400.0, size_px=128, slice_step_mm=2.5, intensities=("hu",)
    )
    assert model.capabilities == Capabilities(segments=True, diagnoses=True)
    assert model.provenance["recipe"]["phase2"]["num_epochs"] == EPOCHS[1]
    assert len(model.provenance["seen_sources"]) == model.provenance["num_volumes"] == 10
    tags = MlflowClient().get_model_version("covtanet", "1").tags
    assert tags["covtanet.model_digest"] == resolved.digest
    assert "covtanet.normal_vs_severe_auc" in tags


def test_artifact_changed_after_registration_is_refused(
    registered: list[str], tmp_path: Path
) -> None:
    source = Path(MlflowClient().get_model_version("covtanet", "1").source.removeprefix("file://"))
    (description,) = source.rglob("model.json")
    original = description.read_text()
    description.write_text(original.replace("-1000.0", "-900.0"))
    try:
        with pytest.raises(CheckpointError, match="differ from the digest in the registry"):
            tracking.resolve_model("models:/covtanet/1", tmp_path)
    finally:
        description.write_text(original)


@pytest.mark.slow  # one more training of two rows
def test_ablation_shares_folds_and_fills_table_i(
    registered: list[str], s3: S3, cluster: Cluster, tmp_path: Path
) -> None:
    output = cluster.run_job("train.py", *registered, "--ablation", "V1", "--fold", "1")
    (trained,) = (s3.folder / "training").glob("covtanet-*")
    assert f"s3://bucket/training/{trained.name}" in output
    output = cluster.run_job(
        "evaluate.py", "--model", f"s3://bucket/training/{trained.name}", "--out", str(tmp_path)
    )
    for row in (
        "V1 | ours, fold 1",
        "V7 | ours, fold 0",
        "Unet | ours, fold 1",
        "TA-SegNet | ours",
        "CovTANet | ours",
    ):
        assert f"| {row}" in output, row
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["networks"]["V7"]["folds"]) == {"0"}
    assert set(metrics["networks"]["V1"]["folds"]) == {"1"}
    assert metrics["networks"]["V1"]["classification"] == {"num_volumes": 0}
    assert {"table-i.csv", "table-ii.png", "table-iv.csv", "V7-roc.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.fixture(scope="module")
def promotions(registered: list[str], cluster: Cluster) -> list[tuple[int, str]]:
    """Exit code and output of the first promotion, without a champion, and of one by force."""
    outcomes = []
    for arguments in (
        ("--dataset", "mosmed", "--data", "s3://bucket/mosmed"),
        ("--force", "the first one"),
    ):
        job = cluster.start_job("promote.py", *arguments)
        outcomes.append((job.finish(), job.output))
    return outcomes


def test_first_promotion_without_champion_needs_force(promotions: list[tuple[int, str]]) -> None:
    (refused_code, refused), (forced_code, forced) = promotions
    assert refused_code == 3, refused
    assert "there is no champion to compare with" in refused
    assert forced_code == 0, forced
    assert "champion is version 1, was none" in forced


@pytest.fixture(scope="module")
def screened(promotions: list[tuple[int, str]], cluster: Cluster, s3: S3) -> list[dict[str, Any]]:
    """Rows of a phantom as a NIfTI file and as a DICOM folder, by the champion's alias."""
    (config,) = configs(1, 63, size_px=96, num_slices=20)
    phantom = make_phantom(config)
    storage.write_bytes("s3://bucket/both/a.nii.gz", nifti.write(phantom.hu, nifti_grid(phantom)))
    for index, data in enumerate(dicom_objects(phantom, 63)):
        storage.write_bytes(f"s3://bucket/both/study/{index:03d}", data)
    cluster.run_job(
        "screen.py", "--archive", "s3://bucket/both", "--ledger", "s3://bucket/by-alias",
        "--model", "models:/covtanet@champion", "--results", "s3://bucket/by-alias-results",
    )  # fmt: skip
    rows: list[dict[str, Any]] = pq.read_table(s3.folder / "by-alias").to_pylist()
    return rows


def test_screening_by_champion_alias_names_its_version(
    screened: list[dict[str, Any]], s3: S3
) -> None:
    assert (
        MlflowClient().get_model_version("covtanet", "1").tags["covtanet.promoted_by_force"]
        == "the first one"
    )
    assert [(row["status"], row["model_name"], row["model_version"]) for row in screened] == [
        ("screened", "covtanet", "1")
    ] * 2
    kept = sorted(
        path.name for path in (s3.folder / "by-alias-results").rglob("*") if path.is_file()
    )
    assert kept == sorted(
        ["lesion_mask.nii.gz", "lung_mask.nii.gz", "preview.png", "viewer.json", "viewer.png"] * 2
    )


VALUES = (*MEASURED, "num_slices_segmented", "source_format")


def test_pyfunc_returns_the_values_of_the_job(screened: list[dict[str, Any]], s3: S3) -> None:
    """The flavour for those who trust their registry, loaded as they would."""
    expected = {row["source_format"]: row for row in screened}
    loaded = mlflow.pyfunc.load_model("models:/covtanet@champion")
    found = loaded.predict(["s3://bucket/both/a.nii.gz", str(s3.folder / "both" / "study")])
    assert list(found["source_format"]) == ["nifti", "dicom"]
    assert list(found["run_id"]) == [None, None]
    for _, row in found.iterrows():
        job = expected[row["source_format"]]
        for name in VALUES:
            if isinstance(job[name], float):
                assert row[name] == pytest.approx(job[name], rel=1e-6), name
            else:
                assert row[name] == job[name], name


def register_with_bias(bias: float, cluster: Cluster, folder: Path) -> str:
    """Register the trained model with another bias of its lesion head; returns the version."""
    resolved = tracking.resolve_model("models:/covtanet/1", folder / f"source{bias}")
    model = load_model(resolved.folder)
    segnet: Any = model.network.segnet
    segnet.filter[-1].bias.fill_(bias)
    save_model(folder / f"model{bias}", model)
    address = tracking.RunAddress(
        uri=cluster.environment["MLFLOW_TRACKING_URI"],
        experiment="altered",
        name=f"bias {bias}",
        key=f"bias {bias}",
        artifacts=str(folder / "artifacts"),
    )
    return tracking.register_model(address, folder / f"model{bias}", {})


@pytest.mark.slow  # two comparisons of models
def test_promotion_takes_only_a_better_challenger(
    registered: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    """One that calls every pixel a lesion has some Dice, one that calls none has none; all else of
    them is equal.
    """
    everything, nothing = (register_with_bias(bias, cluster, tmp_path) for bias in (100.0, -100.0))
    write_mosmed(str(tmp_path / "others"), configs(6, 77, size_px=64, num_slices=14), 2)
    data = (
        "--dataset",
        "mosmed",
        "--data",
        str(tmp_path / "others"),
        "--storage",
        str(tmp_path / "storage"),
    )
    tracking.promote(everything, {})
    output = cluster.run_job("promote.py", "--version", nothing, *data, expect=4)
    assert f"version {nothing} is worse in dice; champion stays {everything}" in output
    tags = MlflowClient().get_model_version("covtanet", nothing).tags
    assert tags["covtanet.compared_dice"].endswith("margin 0.01: worse")
    assert "2 patients, fewer than 20: the interval is wide" in tags["covtanet.compared_dice"]
    assert tracking.version_of("champion") == everything
    tracking.promote(nothing, {})
    output = cluster.run_job("promote.py", "--version", everything, *data)
    assert f"champion is version {everything}, was {nothing}" in output
    assert tracking.version_of("champion") == everything


@pytest.fixture
def grey_stacks(tmp_path: Path) -> tuple[str, str]:
    """Folders of images and masks: a grey stack with lung and lesion labels, and one with a lesion
    mask alone. Grey 0 is -1000 HU, 255 is 400 HU.
    """
    (config,) = configs(1, 64, size_px=64, num_slices=14)
    phantom = make_phantom(replace(config, involvement=0.2))
    grey = np.clip((phantom.hu + 1000) / 1400 * 255, 0, 255).astype(np.uint8)
    labels = phantom.lung_mask.astype(np.uint8) + (phantom.lung_mask & phantom.lesion_mask)
    grid, images, masks = nifti_grid(phantom), tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for name, mask in (("a", labels), ("b", phantom.lesion_mask)):
        (images / f"{name}.nii.gz").write_bytes(nifti.write(grey, grid))
        (masks / f"{name}{'_lung-infection' if name == 'a' else '_mask'}.nii.gz").write_bytes(
            nifti.write(mask, grid)
        )
    return str(images), str(masks)


def test_evaluate_reads_images_and_masks_of_stacks(
    registered: list[str], grey_stacks: tuple[str, str], cluster: Cluster, tmp_path: Path
) -> None:
    """Grey values without a line to HU are counted at the network's input size."""
    images, masks = grey_stacks
    output = cluster.run_job(
        "evaluate.py", "--model", "models:/covtanet/1", "--out", str(tmp_path / "out"),
        "--images", images, "--masks", masks,
    )  # fmt: skip
    assert re.search(r"intensity grey8 +2", output)
    assert "### Table III" in output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["num_volumes_trained_on"] == 0
    segmentation = metrics["networks"]["V7"]["segmentation"]
    assert segmentation["num_volumes"] == 2
    assert segmentation["num_in_source_grid"] == 0
    assert "counted at the network's input size without a lung mask" in output
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 2
    (first, _) = rows.from_parquet((tmp_path / "out" / "rows.parquet").read_bytes())
    # The network's input is 128 x 128.
    assert sum(first[name][0] for name in rows.COUNTS) == 128 * 128


@pytest.mark.slow  # one more evaluation
def test_evaluate_of_grey_values_with_a_line_counts_in_the_source(
    registered: list[str], grey_stacks: tuple[str, str], cluster: Cluster, tmp_path: Path
) -> None:
    images, masks = grey_stacks
    output = cluster.run_job(
        "evaluate.py", "--model", "models:/covtanet/1", "--out", str(tmp_path / "out"),
        "--images", images, "--masks", masks, "--intensity", "grey8:-1000:400",
    )  # fmt: skip
    assert re.search(r"intensity hu +2", output)
    assert "pixels of the source within the lungs, as screening measures" in output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    segmentation = metrics["networks"]["V7"]["segmentation"]
    assert segmentation["num_in_source_grid"] == segmentation["num_volumes"] == 2
    assert "without_lung_mask" in segmentation
    # Both stacks are one phantom: the data set's lung mask plays no part.
    first, second = rows.from_parquet((tmp_path / "out" / "rows.parquet").read_bytes())
    assert first["tp"] == second["tp"]
    assert sum(first[name][0] for name in rows.COUNTS) == 64 * 64
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 2


def test_recipe_of_the_paper_has_its_values() -> None:
    """Section III-B: five folds, Adam at 1e-5, times 0.99 every 10 epochs."""
    from covtanet.config import load_config

    recipes = {
        path.stem: load_config(path).training for path in sorted((ROOT / "recipes").glob("*.toml"))
    }
    paper = recipes["mosmed"]
    assert paper.folds == (0, 1, 2, 3, 4)
    for phase in (paper.phase1, paper.phase2):
        assert (phase.learning_rate, phase.decay, phase.decay_epochs) == (1e-5, 0.99, 10)
    assert not paper.augment.is_on

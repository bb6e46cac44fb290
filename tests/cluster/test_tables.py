"""Networks of the paper's tables by one command, on phantoms, as small as they go."""

import json
from pathlib import Path

import pytest
from running import S3, Cluster
from training_runs import TrainingSetup

from covtanet.model.registry import CLASSIFIERS, SEGMENTERS

RECIPE = """
[training]
dataset = "mosmed"
size = "tiny"
num_folds = 3
folds = [0]
validation_share = 0.3
num_workers = 1
[training.phase1]
num_epochs = 1
batch_size = 2
learning_rate = 1e-3
[training.phase2]
num_epochs = 1
batch_size = 2
learning_rate = 1e-3
"""
# A segmenter and a classifier that reads slices.
SOME = ("Unet", "ResNet-50")
NOT_IN_TABLE_II = {"V7", "MultiResUnet", "Attention-Unet", "Gated-Unet"}
LIMIT_S = 1500


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize("asked", [SOME, ("all",)], ids=["some", "all"])
def test_train_fills_the_rows_of_several_networks(
    training_setup: TrainingSetup, cluster: Cluster, s3: S3, tmp_path: Path, asked: tuple[str, ...]
) -> None:
    recipe, name = tmp_path / "recipe.toml", f"tables-{len(asked)}"
    recipe.write_text(RECIPE)
    arguments = [
        "--config",
        str(recipe),
        "--data",
        training_setup.data,
        "--storage",
        f"s3://bucket/{name}",
        "--experiment",
        name,
        "--artifacts",
        str(tmp_path / "artifacts"),
        *(word for each in asked for word in ("--network", each)),
    ]
    job = cluster.start_job("train.py", *arguments)
    assert job.finish(LIMIT_S) == 0, job.output
    assert "trainings, 2 at a time" in job.output
    (trained,) = (s3.folder / name).glob(f"{name}-*")
    out = tmp_path / "out"
    output = cluster.run_job(
        "evaluate.py", "--model", f"s3://bucket/{name}/{trained.name}", "--out", str(out)
    )
    segmenters, classifiers = {*SEGMENTERS, "V7", "V1"}, {*CLASSIFIERS}
    if asked == SOME:
        segmenters, classifiers = {"V1"}, {"ResNet-50"}
    names = {"Unet" if each == "V1" else each for each in segmenters} - NOT_IN_TABLE_II
    for row in names | classifiers:
        assert f"| {row} | ours, fold 0" in output, row
    networks = json.loads((out / "metrics.json").read_text())["networks"]
    assert set(networks) == segmenters | classifiers
    for each in classifiers:  # which mark no lesion: no figure, rather than a Dice of 0
        assert networks[each]["segmentation"] == {"num_volumes": 0}
        assert networks[each]["classification"]["num_volumes"] == 5
    assert (out / "networks.png").stat().st_size > 10_000

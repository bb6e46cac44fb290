"""Publishing of an experiment: runs, metrics and pictures to MLflow, its model to the registry.

Everything comes from storage, so that an interrupted publication is repeated as a whole.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from covtanet import storage, tracking
from covtanet.evaluation import metrics
from covtanet.evaluation.segmentation import segmentation
from covtanet.experiments.experiment import FOLDS, Experiment
from covtanet.experiments.outcomes import describe_outcome
from covtanet.experiments.results import evaluation_rows, evaluation_uri, model_uri, read_rows
from covtanet.model.model_files import fetch_model
from covtanet.model.saved_model import load_model
from covtanet.report import plots

Row = dict[str, Any]


def publish(experiment: Experiment) -> None:
    """Bring MLflow up to date with storage; publishing twice changes nothing."""
    config = experiment.config
    text = json.dumps(asdict(config), indent=2, sort_keys=True)
    tracking.describe_run(
        experiment.run,
        parameters={**config.identity, "data_digest": experiment.data_digest},
        files={
            f"{config.network}/config.json": text.encode(),
            FOLDS: storage.read_bytes(storage.join(experiment.uri, FOLDS)),
        },
        tags={"covtanet.storage": experiment.uri},
    )
    for fold in config.folds:
        for phase in config.phases:
            described = describe_outcome(experiment, fold, phase)
            if described is not None:
                _publish_phase(experiment, fold, phase, described)
    all_rows = evaluation_rows(experiment.uri)
    rows = [row for row in all_rows if row["network"] == config.network]
    pictures = _pictures(rows, config.network)
    files = {f"{config.network}/{name}": data for name, data in pictures.items()}
    tracking.describe_run(experiment.run, files=files, is_finished=True)


def _publish_phase(
    experiment: Experiment, fold: int, phase: int, described: dict[str, Any]
) -> None:
    address = experiment.child(fold, phase)
    tracking.log_history(tracking.open_run(address), described["history"], address.uri)
    files = {"curves.png": plots.curves(address.name, described["history"])}
    final_metrics: dict[str, float] = {}
    if storage.exists(evaluation_uri(experiment, fold)):
        rows = read_rows(experiment, fold)
        if phase == 1:
            files |= _best_and_worst(experiment, fold, rows)
            overlap = segmentation(rows).get("per_volume", {})
            final_metrics = _flat("test", overlap)
        else:
            files |= _pictures(rows, address.name)
            final_metrics = _pair_metrics(rows)
    tracking.describe_run(
        address,
        parameters={
            "network": experiment.config.network,
            "fold": fold,
            "phase": phase,
            "weights_sha256": described["sha256"],
        },
        metrics=final_metrics,
        files=files,
        is_finished=True,
    )


def _pair_metrics(rows: Sequence[Row]) -> dict[str, float]:
    pairs = metrics.classification(rows)
    flat: dict[str, float] = {}
    for name in metrics.PAIRS:
        flat |= _flat(f"test/{name}", pairs.get(name, {}))
    return flat


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    return {f"{prefix}/{name}": float(value) for name, value in values.items() if value is not None}


def _pictures(rows: Sequence[Row], title: str) -> dict[str, bytes]:
    """Return confusion matrices, ROC and reliability of rows that have a diagnosis."""
    pairs = metrics.classification(rows)
    if not pairs["num_volumes"]:
        return {}
    return {
        "confusion.png": plots.confusion(title, pairs),
        "roc.png": plots.roc(title, rows, pairs),
        "reliability.png": plots.reliability(title, pairs),
    }


def _best_and_worst(experiment: Experiment, fold: int, rows: Sequence[Row]) -> dict[str, bytes]:
    """Return pictures of the volumes with the highest and the lowest Dice."""
    dice = segmentation(rows).get("volume_dice", {})
    ranked = sorted((value, key) for key, value in dice.items() if value is not None)
    if not ranked:
        return {}
    folder = storage.join(experiment.fold_uri(fold), "pictures")
    pictures = {}
    for name, (value, key) in (("worst", ranked[0]), ("best", ranked[-1])):
        data = storage.read_bytes(storage.join(folder, f"{key}.png"))
        pictures[f"overlays/{name}-dice-{value:.3f}.png"] = data
    return pictures


def register(experiment: Experiment) -> tuple[str, str]:
    """Register the experiment's model as challenger, once; return version and digest.

    Choice: that of the lowest fold whose phase 2 is finished. Trainings on the same data then
    leave the same patients unseen, on whom they can be compared; the best fold's model would be
    the luckiest split's.
    """
    folds = range(experiment.config.num_folds)
    fold = next(fold for fold in folds if describe_outcome(experiment, fold, 2) is not None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        fetch = partial(storage.download_files, model_uri(experiment, fold), target=folder)
        fetch_model(folder, fetch)
        digest = load_model(folder).digest
        headline = metrics.headline(read_rows(experiment, fold))
        tags = {
            "covtanet.data_digest": experiment.data_digest,
            "covtanet.experiment": experiment.key,
            "covtanet.network": experiment.config.network,
            "covtanet.fold": str(fold),
        }
        tags |= {f"covtanet.{name}": f"{value:.4f}" for name, value in headline.items()}
        version = tracking.register_model(experiment.run, folder, tags, alias="challenger")
    return version, digest

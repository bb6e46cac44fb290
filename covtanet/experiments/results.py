"""Evaluation results of an experiment's folds: their locations, and all of them together."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from covtanet import storage
from covtanet.evaluation import gallery, rows
from covtanet.experiments.experiment import CONFIG, PREPARED, Experiment

Row = dict[str, Any]
# Results of phase 1 alone have names of their own: a later phase 2 does not replace them.
EVALUATION = "evaluation.parquet"
PHASE1_EVALUATION = "phase1-evaluation.parquet"
MODEL = "model"
PHASE1_MODEL = "phase1-model"
# The network that ranks the slices of a picture: TA-SegNet, its pretrained row first.
LEADERS = ("V8", "V7")


@dataclass(frozen=True, kw_only=True)
class Description:
    """The part of experiment.json that an evaluation shows."""

    name: str
    key: str
    data_uri: str
    data_digest: str
    dataset: str


def is_experiment(uri: str) -> bool:
    """Return whether a location is the folder of an experiment."""
    return storage.exists(storage.join(uri, CONFIG))


def read_description(experiment_uri: str) -> Description:
    """Return the description of an experiment."""
    values = json.loads(storage.read_bytes(storage.join(experiment_uri, CONFIG)))
    return Description(
        name=values["name"],
        key=values["key"],
        data_uri=values["data"],
        data_digest=values["data_digest"],
        dataset=values["config"]["dataset"],
    )


def evaluation_uri(experiment: Experiment, fold: int) -> str:
    """Return the location of a fold's rows."""
    has_both = 2 in experiment.config.phases
    name = EVALUATION if has_both else PHASE1_EVALUATION
    return storage.join(experiment.fold_uri(fold), name)


def model_uri(experiment: Experiment, fold: int) -> str:
    """Return the folder of a fold's model."""
    has_both = 2 in experiment.config.phases
    return storage.join(experiment.fold_uri(fold), MODEL if has_both else PHASE1_MODEL)


def read_rows(experiment: Experiment, fold: int) -> list[Row]:
    """Return the rows of one fold."""
    return rows.from_parquet(storage.read_bytes(evaluation_uri(experiment, fold)))


def evaluation_rows(experiment_uri: str) -> list[Row]:
    """Return all rows of an experiment's folds and networks.

    Rows of both phases replace those of phase 1 alone.
    """
    all_rows = []
    for network in storage.list_names(experiment_uri):
        for fold in storage.list_names(storage.join(experiment_uri, network)):
            all_rows += _rows_of_fold(storage.join(experiment_uri, network, fold))
    return all_rows


def _rows_of_fold(fold_uri: str) -> list[Row]:
    for name in (EVALUATION, PHASE1_EVALUATION):
        uri = storage.join(fold_uri, name)
        if storage.exists(uri):
            return rows.from_parquet(storage.read_bytes(uri))
    return []


def side_by_side(experiment_uri: str, experiment_rows: Sequence[Row]) -> bytes:
    """Return a picture of the networks on the same slices of the test parts, see ``gallery``.

    experiment_rows: as ``evaluation_rows`` gives them. Empty if no network marks lesions.
    """
    models = {}
    segmented = {(row["network"], row["fold"]) for row in experiment_rows if row["tp"] is not None}
    for network, fold in sorted(segmented):
        uri = storage.join(experiment_uri, network, f"fold{fold}")
        # The model that the rows belong to.
        has_both = storage.exists(storage.join(uri, EVALUATION))
        models[network, fold] = storage.join(uri, MODEL if has_both else PHASE1_MODEL)
    trained = {network for network, _ in models}
    leader = next((name for name in (*LEADERS, *sorted(trained)) if name in trained), "")
    prepared_uri = storage.join(experiment_uri.rpartition("/")[0], PREPARED)
    return gallery.side_by_side(experiment_rows, leader, models, prepared_uri)

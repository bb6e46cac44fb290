"""Evaluation on Ray Data: labelled volumes through one model to rows.

Volumes in HU are read from their source and evaluated as screening reads them. Grey values without
a line to HU and single slices joined to a stack, in neither of which screening finds lungs, are
evaluated as they were prepared, at the network's input size. A picture is written of each volume
that has a lesion mask.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import ray.data

from covtanet import drawing, ray_data, storage
from covtanet.data import prepared_file
from covtanet.data.datasets import DataSource
from covtanet.data.prepared import PreparedVolume
from covtanet.data.source import paths_of, read_source
from covtanet.errors import TrainingError, error_location
from covtanet.evaluation.deployed import evaluate_source
from covtanet.evaluation.rows import (
    EVALUATION_SCHEMA,
    INPUT_GRID,
    SOURCE_GRID,
    EvaluatedModel,
    Evaluation,
    evaluate_prepared,
    new_row,
)
from covtanet.inference.predictor import Predictor
from covtanet.machine import num_cores
from covtanet.model.saved_model import SavedModel

logger = logging.getLogger(__name__)

Row = dict[str, Any]
# Distance of slices for a model without a slice_step_mm, as in screening.
DEFAULT_STEP_MM = 2.5


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model to evaluate, its volumes, and the location of pictures."""

    model: SavedModel
    network: str
    fold: int | None
    source: DataSource
    """The data set that the volumes were prepared from."""
    prepared_uri: str
    pictures_uri: str
    """Empty for no pictures."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Rows of the volumes that were evaluated, and failures of the others."""

    rows: list[Row]
    failures: dict[str, str]
    """By volume: the error's type and location in the code, never its text."""


def evaluate(task: Task, volumes: Sequence[PreparedVolume]) -> list[Row]:
    """Return one row per volume; an empty list for no volume.

    Raises:
        TrainingError: a volume could not be evaluated. The metrics would belong to other volumes
            than they say.
    """
    evaluated = evaluate_each(task, volumes)
    if evaluated.failures:
        key, failure = min(evaluated.failures.items())
        raise TrainingError(
            f"{len(evaluated.failures)} volumes could not be evaluated, the first {key}: {failure}"
        )
    return evaluated.rows


def evaluate_each(task: Task, volumes: Sequence[PreparedVolume]) -> Evaluated:
    """Evaluate volumes; one that fails does not stop the others."""
    if not volumes:
        return Evaluated(rows=[], failures={})
    ray_data.configure(preserve_order=True)
    items = [{"volume": prepared_file.to_json(volume)} for volume in volumes]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _Evaluator,
        fn_constructor_kwargs={"task": task},
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        num_gpus=1 if ray.cluster_resources().get("GPU", 0) else 0,
    )
    results = [_plain(row) for row in dataset.take_all()]
    failures = {row["volume"]: row["failure"] for row in results if row["failure"]}
    for key, failure in failures.items():
        logger.error("volume %s: %s", key, failure)
    # Removes the column from every row, and keeps the rows in which it is null.
    rows = [row for row in results if not row.pop("failure")]
    return Evaluated(rows=rows, failures=failures)


def _plain(row: Row) -> Row:
    """Return arrays as lists, and the NaN that Ray Data makes of a null as a null."""
    return {name: _plain_value(value) for name, value in row.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, float) and np.isnan(value):
        return None
    return value


class _Evaluator:
    """One model, loaded once per actor."""

    def __init__(self, task: Task) -> None:
        self.task = task
        predictor = Predictor(task.model, num_threads=num_cores())
        self.model = EvaluatedModel(
            predictor=predictor,
            window=predictor.window,
            readout=task.model.readout,
            slice_step_mm=step_of(task.model),
            segments=task.model.capabilities.segments,
        )
        self.labelled = {volume.volume_path: volume for volume in task.source.volumes}

    def __call__(self, row: Row) -> Row:
        return guarded(prepared_file.from_json(row["volume"]), self.evaluate)

    def evaluate(self, volume: PreparedVolume) -> Row:
        """Return a volume's row; its picture is written."""
        # No lungs are found without HU, nor in slices of several patients.
        is_readable = volume.intensity == "hu" and volume.is_continuous
        evaluation = self._from_source(volume) if is_readable else self._from_prepared(volume)
        if evaluation.truth is not None and self.task.pictures_uri:
            assert evaluation.lesion_mask is not None
            errors = drawing.errors(evaluation.intensity, evaluation.lesion_mask, evaluation.truth)
            picture_uri = storage.join(self.task.pictures_uri, f"{volume.key}.png")
            storage.write_bytes(picture_uri, drawing.png(errors))
        return evaluation.row

    def _from_source(self, volume: PreparedVolume) -> Evaluation:
        # Screening finds the lungs itself, so that a lung mask of the data set is not read.
        labelled = replace(self.labelled[volume.volume_path], lung_mask_path=None)
        root = self.task.source.root
        contents = {
            path: storage.read_bytes(storage.resolve(root, path)) for path in paths_of(labelled)
        }
        row = new_row(volume, self.task.network, self.task.fold, SOURCE_GRID)
        return evaluate_source(self.model, row, read_source(labelled, contents))

    def _from_prepared(self, volume: PreparedVolume) -> Evaluation:
        data = storage.read_bytes(prepared_file.file_uri(self.task.prepared_uri, volume.key))
        row = new_row(volume, self.task.network, self.task.fold, INPUT_GRID)
        return evaluate_prepared(self.model, row, volume, prepared_file.read_samples(data))


def step_of(model: SavedModel) -> float:
    """Return the smallest distance of the slices that a model reads, in mm."""
    step_mm = model.preprocessing.slice_step_mm
    return DEFAULT_STEP_MM if step_mm is None else step_mm


def guarded(volume: PreparedVolume, evaluate: Callable[[PreparedVolume], Row]) -> Row:
    """Return a volume's row with ``failure`` null, or nulls with the failure's type and location.

    Raises:
        AccessError: storage refuses our credentials, which concerns every volume.
    """
    try:
        return {**evaluate(volume), "failure": None}
    except storage.AccessError:
        raise
    except OSError as error:
        failure = f"storage: {type(error).__name__}"
    except Exception as error:
        failure = f"internal error, {error_location(error)}"
    return {**dict.fromkeys(EVALUATION_SCHEMA.names), "volume": volume.key, "failure": failure}

"""Evaluation on Ray Data: prepared volumes through one model to rows.

A picture is written of each volume that has a lesion mask.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data

from covtanet import drawing, ray_data, storage
from covtanet.data import prepared_file
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import TrainingError, error_location
from covtanet.evaluation.rows import EVALUATION_SCHEMA, evaluate_volume
from covtanet.inference.predictor import Predictor
from covtanet.model.saved_model import SavedModel

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model to evaluate, its prepared volumes, and the location of pictures."""

    model: SavedModel
    network: str
    fold: int | None
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
        self.predictor = Predictor(task.model, num_threads=len(os.sched_getaffinity(0)))

    def __call__(self, row: Row) -> Row:
        return guarded(prepared_file.from_json(row["volume"]), self.evaluate)

    def evaluate(self, volume: PreparedVolume) -> Row:
        """Return a volume's row; its picture is written."""
        task = self.task
        capabilities = task.model.capabilities
        data = storage.read_bytes(prepared_file.file_uri(task.prepared_uri, volume.key))
        samples = prepared_file.read_samples(data)
        evaluation = evaluate_volume(
            self.predictor,
            volume,
            samples,
            task.network,
            task.fold,
            diagnoses=capabilities.diagnoses,
            segments=capabilities.segments,
        )
        if samples.lesion is not None and capabilities.segments and task.pictures_uri:
            errors = drawing.errors(samples.levels, evaluation.lesion_mask, samples.lesion > 0)
            picture_uri = storage.join(task.pictures_uri, f"{volume.key}.png")
            storage.write_bytes(picture_uri, drawing.png(errors))
        return evaluation.row


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

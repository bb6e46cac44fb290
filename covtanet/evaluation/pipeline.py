"""Evaluation on Ray Data: prepared volumes through one model to rows, and a picture of each that has a lesion mask."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data

from covtanet import drawing as overlay
from covtanet import ray_data, storage
from covtanet.data import prepared
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import TrainingError, error_location
from covtanet.evaluation.rows import EVALUATION_SCHEMA, answer
from covtanet.inference.predictor import Predictor
from covtanet.model.checkpoint import SavedModel

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is evaluated, and where pictures go. diagnoses: whether the model's phase 2 was trained.

    segments: whether it marks lesions at all.
    """

    model: SavedModel
    network: str
    fold: int | None
    prepared_uri: str
    pictures_uri: str
    diagnoses: bool = True
    segments: bool = True


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A row per volume that was evaluated. failures: of the others, by key, with type and place but no text."""

    rows: list[Row]
    failures: dict[str, str]


def evaluate(task: Task, volumes: Sequence[PreparedVolume]) -> list[Row]:
    """One row per volume; an empty list for none.

    Raises:
        TrainingError: a volume could not be evaluated, so that the figures would be of other volumes than they say.
    """
    found = evaluate_each(task, volumes)
    if found.failures:
        key, failure = min(found.failures.items())
        raise TrainingError(
            f"{len(found.failures)} volumes could not be evaluated, the first {key}: {failure}"
        )
    return found.rows


def evaluate_each(task: Task, volumes: Sequence[PreparedVolume]) -> Evaluated:
    """Evaluate volumes of which one that fails does not stop the others."""
    if not volumes:
        return Evaluated(rows=[], failures={})
    ray_data.configure(preserve_order=True)
    items = [{"found": prepared.to_json(volume)} for volume in volumes]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _Evaluator,
        fn_constructor_kwargs={"task": task},
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        num_gpus=1 if ray.cluster_resources().get("GPU", 0) else 0,
    )
    found = [_plain(row) for row in rows.take_all()]
    failures = {row["volume"]: row["failure"] for row in found if row["failure"]}
    for key, failure in failures.items():
        logger.error("volume %s: %s", key, failure)
    kept = [row for row in found if not row.pop("failure")]
    return Evaluated(rows=kept, failures=failures)


def _plain(row: Row) -> Row:
    """Arrays back to lists, and what Ray Data made of nulls back to nulls."""
    out = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in row.items()
    }
    return {
        name: None if isinstance(value, float) and np.isnan(value) else value
        for name, value in out.items()
    }


class _Evaluator:
    """One model, loaded once."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.predictor = Predictor(task.model, num_threads=len(os.sched_getaffinity(0)))

    def __call__(self, row: Row) -> Row:
        return guarded(prepared.from_json(row["found"]), self.answer)

    def answer(self, volume: PreparedVolume) -> Row:
        """A volume's row; its picture is written."""
        task = self.task
        samples = prepared.read_samples(
            storage.read_bytes(storage.join(task.prepared_uri, f"{volume.key}.parquet"))
        )
        found = answer(
            self.predictor,
            volume,
            samples,
            task.network,
            task.fold,
            diagnoses=task.diagnoses,
            segments=task.segments,
        )
        if samples.lesion is not None and task.segments and task.pictures_uri:
            picture = overlay.errors(samples.levels, found.lesion_mask, samples.lesion > 0)
            storage.write_bytes(
                storage.join(task.pictures_uri, f"{volume.key}.png"), overlay.png(picture)
            )
        return found.row


def guarded(volume: PreparedVolume, answer: Callable[[PreparedVolume], Row]) -> Row:
    """A volume's row with ``failure`` null, or a row of nulls with type and place of what went wrong.

    Raises:
        AccessError: storage refuses us altogether, which is no matter of one volume.
    """
    try:
        return {**answer(volume), "failure": None}
    except storage.AccessError:
        raise
    except OSError as error:
        failure = f"storage: {type(error).__name__}"
    except Exception as error:  # ours
        failure = f"internal error, {error_location(error)}"
    return {**dict.fromkeys(EVALUATION_SCHEMA.names), "volume": volume.key, "failure": failure}

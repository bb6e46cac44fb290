"""Evaluation on Ray Data: prepared volumes through one model to rows, and a picture of each that has a lesion mask."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data

from covtanet import ray_data, storage
from covtanet.data import prepared
from covtanet.data.prepared import PreparedVolume
from covtanet.evaluation.rows import answer
from covtanet.model.checkpoint import SavedModel
from covtanet.report import overlay
from covtanet.screening.predictor import Predictor

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


def evaluate(task: Task, volumes: Sequence[PreparedVolume]) -> list[Row]:
    """One row per volume; an empty list for none."""
    if not volumes:
        return []
    ray_data.configure(preserve_order=True)
    items = [{"found": prepared.to_json(volume)} for volume in volumes]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _Evaluator,
        fn_constructor_kwargs={"task": task},
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        num_gpus=1 if ray.cluster_resources().get("GPU", 0) else 0,
    )
    return [_plain(row) for row in rows.take_all()]


def _plain(row: Row) -> Row:
    """Arrays back to lists, and what Ray Data made of nulls back to nulls."""
    out = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in out.items()}


class _Evaluator:
    """One model, loaded once."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.predictor = Predictor(task.model, num_threads=len(os.sched_getaffinity(0)))

    def __call__(self, row: Row) -> Row:
        task, volume = self.task, prepared.from_json(row["found"])
        samples = prepared.read_samples(storage.read_bytes(storage.join(task.prepared_uri, f"{volume.key}.parquet")))
        found = answer(
            self.predictor, volume, samples, task.network, task.fold, diagnoses=task.diagnoses, segments=task.segments
        )
        if samples.lesion is not None and task.segments and task.pictures_uri:
            picture = overlay.errors(samples.levels, found.lesion_mask, samples.lesion > 0)
            storage.write_bytes(storage.join(task.pictures_uri, f"{volume.key}.png"), overlay.png(picture))
        return found.row

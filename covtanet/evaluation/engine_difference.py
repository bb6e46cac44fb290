"""Difference of an inference engine from float32 on labelled volumes, measured as screening does.

Volumes are counted in the grid of their source, by the functions of ``evaluation.deployed``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from covtanet.data.labels import severity_of
from covtanet.data.source import SourceVolume
from covtanet.evaluation.deployed import evaluate_source
from covtanet.evaluation.rows import EVALUATION_SCHEMA, SOURCE_GRID, EvaluatedModel, Row
from covtanet.evaluation.segmentation import volume_dice
from covtanet.model.description import EngineDifference

# ``infected_threshold`` and ``severe_threshold`` of screening, unless a site sets others.
THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    """One volume through one engine."""

    dice: float | None
    involvement: float | None
    lesion_px: int
    """Lesion voxels that screening would measure."""
    num_slices: int
    """Slices that were counted."""
    status: tuple[str | None, ...]
    """Reason of a rejection, diagnosis, severity, and severity by involvement."""


def run_engine(model: EvaluatedModel, key: str, source: SourceVolume) -> EngineResult:
    """Screen a labelled volume with the engine of a model."""
    empty = {**dict.fromkeys(EVALUATION_SCHEMA.names), "volume": key, "grid": SOURCE_GRID}
    row = evaluate_source(model, empty, source).row
    return EngineResult(
        dice=volume_dice(row),
        involvement=row["involvement"],
        lesion_px=sum(row["tp"]) + sum(row["fp"]),
        num_slices=len(row["slice"]),
        status=_status_of(row),
    )


def compare_engines(
    results: Sequence[EngineResult], float32: Sequence[EngineResult], data: Sequence[str]
) -> EngineDifference:
    """Return the difference of an engine from float32 on the same volumes, in the same order.

    data: names of their data sets.
    """
    pairs = list(zip(results, float32, strict=True))
    dices = [(a.dice, b.dice) for a, b in pairs if a.dice is not None and b.dice is not None]
    involvements = [
        abs(a.involvement - b.involvement)
        for a, b in pairs
        # Null in one alone counts as a change of status.
        if a.involvement is not None and b.involvement is not None
    ]
    ratios = [a.lesion_px / b.lesion_px for a, b in pairs if b.lesion_px]
    return EngineDifference(
        mean_dice=fmean(dice for dice, _ in dices) if dices else None,
        mean_dice_float32=fmean(dice for _, dice in dices) if dices else None,
        mean_involvement_difference=fmean(involvements) if involvements else None,
        max_involvement_difference=max(involvements, default=None),
        lesion_volume_ratio=fmean(ratios) if ratios else None,
        num_status_changes=sum(_has_changed(a, b) for a, b in pairs),
        num_volumes=len(pairs),
        num_slices=int(np.sum([result.num_slices for result in results])),
        data=tuple(data),
    )


def _has_changed(result: EngineResult, float32: EngineResult) -> bool:
    """Return whether rejection or conclusion differ, or what can be measured at all."""
    measured = [(each.dice is None, each.involvement is None) for each in (result, float32)]
    return result.status != float32.status or measured[0] != measured[1]


def _status_of(row: Row) -> tuple[str | None, ...]:
    """Return what screening concludes from a row, as ``screening.conclusion`` does."""
    diagnosis = severity = by_involvement = None
    if row["involvement"] is not None:
        by_involvement = severity_of(row["involvement"])
    if row["p_infected"] is not None:
        diagnosis = "infected" if row["p_infected"] >= THRESHOLD else "normal"
    if diagnosis == "infected" and row["p_severe"] is not None:
        severity = "severe" if row["p_severe"] >= THRESHOLD else "mild"
    return row["reason"], diagnosis, severity, by_involvement

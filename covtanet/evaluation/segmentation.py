"""Overlap of predicted and true lesion masks: per slice, per volume and pooled, and by lesion size.

A metric that has no denominator is null.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.data.counts import Counts
from covtanet.evaluation.overlap import MEANS, by_lesion_size, overlap
from covtanet.evaluation.rows import COUNTS, SOURCE_GRID, UNMASKED_COUNTS

Row = dict[str, Any]
Metrics = dict[str, Any]

OVERLAP = ("dice", "iou", "sensitivity", "precision", "specificity", "accuracy")
# Lesion pixels as a share of the slice; lengths are unknown in some data sets.
SIZE_BINS = ((0.0, 0.005), (0.005, 0.02), (0.02, 0.05), (0.05, 1.0))
# Lesion pixels of a slice of the source.
SIZE_LIMITS_PX = (0, 50, 128, 512, math.inf)


def segmentation(rows: Sequence[Row]) -> Metrics:
    """Return the overlap of volumes with lesion masks, in [0, 1].

    per_slice: mean over slices, each metric over the slices that have its denominator (Dice: a
    lesion in truth or prediction). per_volume: pixels summed within a volume, mean over volumes.
    pooled: all pixels summed. dice_intervals: Dice with a 95 % interval by bootstrap over patients.
    num_in_source_grid: volumes counted in the grid of their source within the lungs, as screening
    measures; the others were counted at the network's input size without a lung mask.
    without_lung_mask: the same metrics of the former without the lung mask.
    """
    masked = [row for row in rows if row["tp"] is not None]
    if not masked:
        return {"num_volumes": 0}
    in_source = [row for row in masked if row["grid"] == SOURCE_GRID]
    metrics = {
        "num_volumes": len(masked),
        "num_patients": len({_patient(row) for row in masked}),
        "num_in_source_grid": len(in_source),
        "num_rejected": sum(row["reason"] is not None for row in masked),
        **_overlap_of(masked, COUNTS),
        "volume_dice": {row["volume"]: volume_dice(row) for row in masked},
    }
    if in_source:
        metrics["without_lung_mask"] = _overlap_of(in_source, UNMASKED_COUNTS)
    return metrics


def volume_dice(row: Row) -> float | None:
    """Return the Dice of all pixels of one volume; null without a lesion in truth or prediction."""
    tp, fp, fn, tn = (sum(row[name]) for name in COUNTS)
    numerator, denominator = Counts(tp, fp, fn, tn).fractions()["dice"]
    return numerator / denominator if denominator else None


def _patient(row: Row) -> str:
    # Rows of older versions name no patient.
    return str(row["patient"] or row["volume"])


def _overlap_of(rows: Sequence[Row], names: Sequence[str]) -> Metrics:
    """Return the metrics of rows by the counts in these columns."""
    # (4, S) of each volume
    volumes = [np.array([row[name] for name in names], np.int64) for row in rows]
    # (4, slices of all volumes)
    slices = np.concatenate(volumes, axis=1)
    # (4, volumes)
    by_volume = np.stack([volume.sum(axis=1) for volume in volumes], axis=1)
    return {
        "num_slices": int(slices.shape[1]),
        "per_slice": _mean_overlap(slices),
        "per_volume": _mean_overlap(by_volume),
        "pooled": _mean_overlap(slices.sum(axis=1, keepdims=True)),
        "dice_intervals": _intervals(rows, volumes),
        "dice_by_lesion_size": _by_share(slices),
        "dice_by_lesion_px": _by_px(rows, volumes),
    }


def _intervals(rows: Sequence[Row], volumes: Sequence[NDArray[np.int64]]) -> Metrics:
    """Return each mean of Dice with its interval."""
    counts = {}
    patient_of = {}
    for row, volume in zip(rows, volumes, strict=True):
        # (4, S) -> TP, FP and FN of each slice, (S, 3)
        counts[row["volume"]] = volume[:3].T
        patient_of[row["volume"]] = _patient(row)
    means = overlap(counts, patient_of=patient_of)
    return {name: means[name] for name in MEANS}


def _mean_overlap(counts: NDArray[np.int64]) -> Metrics:
    """Return the mean of each metric over the cases that have its denominator.

    counts: TP, FP, FN, TN of every case, (4, cases).
    """
    tp, fp, fn, tn = counts.astype(np.float64)
    fractions = Counts(tp, fp, fn, tn).fractions()
    return {name: _mean_ratio(*fractions[name]) for name in OVERLAP}


def _mean_ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> float | None:
    is_defined = whole > 0
    if not is_defined.any():
        return None
    return float(np.mean(part[is_defined] / whole[is_defined]))


def _by_share(slices: NDArray[np.int64]) -> list[Metrics]:
    """Return Dice by the lesion's share of its slice. slices: (4, S)."""
    # (TP + FN) / all pixels
    share = (slices[0] + slices[2]) / slices.sum(axis=0)
    bins = []
    for low, high in SIZE_BINS:
        inside = slices[:, (share > low) & (share <= high)]
        num_slices = int(inside.shape[1])
        dice = _mean_overlap(inside)["dice"] if num_slices else None
        bins.append({"above": low, "to": high, "num_slices": num_slices, "dice": dice})
    return bins


def _by_px(rows: Sequence[Row], volumes: Sequence[NDArray[np.int64]]) -> list[Metrics]:
    """Return Dice by the lesion's pixels in its slice, of volumes counted in their source."""
    counts: Mapping[str, NDArray[np.int64]] = {
        row["volume"]: volume[:3].T
        for row, volume in zip(rows, volumes, strict=True)
        if row["grid"] == SOURCE_GRID
    }
    if not counts:
        return []
    bins: list[Metrics] = list(map(dict, by_lesion_size(counts, SIZE_LIMITS_PX)))
    # JSON has no infinity.
    bins[-1]["to_px"] = None
    return bins

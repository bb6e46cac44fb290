"""Overlap of predicted and true lesion masks per slice, per volume and pooled, with intervals. numpy only.

Intervals are bootstrapped over patients: slices of one patient are not independent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_BOOTSTRAPS = 2000
CONFIDENCE = 0.95
Counts = NDArray[np.int64]
MEANS = ("per_slice", "per_lesion_slice", "per_volume", "pooled")


def overlap(counts: Mapping[str, Counts], seed: int = 0) -> dict[str, Any]:
    """Dice with intervals, precision and sensitivity of all patients. counts: (S, 3) by patient.

    per_slice: mean over slices with a lesion in truth or prediction, so that a false alarm on a slice
    without lesion counts 0. per_lesion_slice: over slices with a lesion in truth. per_volume: mean
    over patients of the Dice of their pixels. pooled: Dice of all pixels.
    """
    patients = sorted(counts)
    terms = np.stack([_terms(counts[patient]) for patient in patients])
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(patients), (NUM_BOOTSTRAPS, len(patients)))
    point = _means(terms[None])[0]
    resampled = _means(terms[draws])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail], axis=0)
    tp, fp, fn = np.sum([counts[patient].sum(axis=0) for patient in patients], axis=0)
    return {
        "num_patients": len(patients),
        "num_slices": int(sum(len(counts[patient]) for patient in patients)),
        **{
            name: {"dice": _rounded(point[i]), "low": _rounded(low[i]), "high": _rounded(high[i])}
            for i, name in enumerate(MEANS)
        },
        "precision": _rounded(tp / (tp + fp)) if tp + fp else None,
        "sensitivity": _rounded(tp / (tp + fn)) if tp + fn else None,
        "by_patient": {
            patient: {name: _rounded(value) for name, value in zip(MEANS, own, strict=True)}
            for patient, own in zip(patients, _means(terms[:, None]), strict=True)
        },
    }


def by_lesion_size(
    counts: Mapping[str, Counts], limits_px: Sequence[int]
) -> list[dict[str, float | int | None]]:
    """Mean Dice of the slices whose true lesion has more than one limit and at most the next, pixels."""
    slices = np.concatenate(list(counts.values()))
    size = slices[:, 0] + slices[:, 2]
    rows: list[dict[str, float | int | None]] = []
    for low, high in zip(limits_px[:-1], limits_px[1:], strict=True):
        chosen = slices[(size > low) & (size <= high)]
        dice = float(_dice(chosen.astype(np.float64)).mean()) if len(chosen) else None
        rows.append({
            "above_px": low, "to_px": high, "num_slices": len(chosen),
            "dice": None if dice is None else _rounded(dice),
        })  # fmt: skip
    return rows


def _dice(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """2 TP / (2 TP + FP + FN) of rows that have a denominator."""
    dice: NDArray[np.float64] = 2 * counts[:, 0] / (2 * counts[:, 0] + counts[:, 1] + counts[:, 2])
    return dice


def _terms(counts: Counts) -> NDArray[np.float64]:
    """Return one patient's sums, from which every mean follows.

    Dice over marked slices and their number; Dice over lesion slices and their number; the volume's
    Dice and 1; twice TP and the denominator of all its pixels.
    """
    rows = counts.astype(np.float64)
    marked = rows[rows.sum(axis=1) > 0]
    with_lesion = rows[rows[:, 0] + rows[:, 2] > 0]
    tp, fp, fn = rows.sum(axis=0)
    whole = 2 * tp + fp + fn
    volume = (2 * tp / whole, 1.0) if whole else (0.0, 0.0)
    return np.array([
        _dice(marked).sum(), len(marked), _dice(with_lesion).sum(), len(with_lesion), *volume, 2 * tp, whole
    ])  # fmt: skip


def _means(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, MEANS) of (N, patients, terms); NaN without a denominator."""
    sums = terms.sum(axis=1)
    part, whole = sums[:, 0::2], sums[:, 1::2]
    means: NDArray[np.float64] = np.full(part.shape, np.nan)
    np.divide(part, whole, out=means, where=whole > 0)
    return means


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)

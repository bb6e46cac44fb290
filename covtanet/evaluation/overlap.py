"""Overlap of predicted and true lesion masks per slice, per volume and pooled, with intervals.

Intervals are bootstrapped over patients: slices of one patient are not independent. numpy only.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_BOOTSTRAPS = 2000
CONFIDENCE = 0.95
Counts = NDArray[np.int64]
MEANS = ("per_slice", "per_lesion_slice", "per_volume", "pooled")
# A numerator and a denominator of each mean.
NUM_TERMS = 2 * len(MEANS)


def overlap(
    counts: Mapping[str, Counts], seed: int = 0, patient_of: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return Dice with intervals, precision and sensitivity of all volumes.

    counts: TP, FP and FN of every slice, (S, 3) by volume. patient_of: patient of each volume; null
    if every volume is of another patient. Dice ``per_slice`` is the mean over slices with a lesion
    in truth or prediction, so a false alarm on a slice without lesion counts 0;
    ``per_lesion_slice`` the mean over slices with a lesion in truth; ``per_volume`` the mean over
    volumes of the Dice of all their pixels; ``pooled`` the Dice of all pixels.
    """
    volumes = sorted(counts)
    patients = sorted({_patient(volume, patient_of) for volume in volumes})
    terms = np.zeros((len(patients), NUM_TERMS))
    for volume in volumes:
        # Terms are sums, so those of a patient's volumes add up.
        terms[patients.index(_patient(volume, patient_of))] += _terms(counts[volume])
    tp, fp, fn = np.sum([counts[volume].sum(axis=0) for volume in volumes], axis=0)
    return {
        "num_patients": len(patients),
        "num_slices": int(sum(len(rows) for rows in counts.values())),
        **_intervals(terms, seed),
        "precision": _rounded(tp / (tp + fp)) if tp + fp else None,
        "sensitivity": _rounded(tp / (tp + fn)) if tp + fn else None,
        "by_patient": dict(zip(patients, map(_named, _means(terms[:, None])), strict=True)),
    }


def _patient(volume: str, patient_of: Mapping[str, str] | None) -> str:
    return volume if patient_of is None else patient_of[volume]


def _intervals(terms: NDArray[np.float64], seed: int) -> dict[str, dict[str, float | None]]:
    """Return every mean with its interval over resampled patients."""
    # terms[draws]: (NUM_BOOTSTRAPS, patients, 8)
    return _with_bounds(_means(terms[None]), _means(terms[_draws(len(terms), seed)]))


def _draws(num_patients: int, seed: int) -> NDArray[np.int64]:
    """Return the patients of every resample, (NUM_BOOTSTRAPS, patients)."""
    rng = np.random.default_rng(seed)
    # Patients are resampled, not slices: slices of one patient are not independent.
    return rng.integers(0, num_patients, (NUM_BOOTSTRAPS, num_patients))


def _with_bounds(
    values: NDArray[np.float64], resampled: NDArray[np.float64]
) -> dict[str, dict[str, float | None]]:
    """Return each of the MEANS with its interval. values: (1, 4). resampled: (N, 4)."""
    tail = (1 - CONFIDENCE) / 2
    # A mean without a denominator in every resample stays NaN.
    has_mean = ~np.isnan(resampled).all(axis=0)
    bounds = np.full((2, len(MEANS)), np.nan)
    bounds[:, has_mean] = np.nanquantile(resampled[:, has_mean], [tail, 1 - tail], axis=0)
    rows = np.concatenate([values, bounds])
    return {
        name: dict(zip(("dice", "low", "high"), map(_rounded, column), strict=True))
        for name, column in zip(MEANS, rows.T, strict=True)
    }


def overlap_difference(
    counts: Mapping[str, Counts], other: Mapping[str, Counts], seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """Return the Dice of ``counts`` minus that of ``other`` with intervals, paired over patients.

    Both have the same patients; each resample of patients counts for both.

    Raises:
        ValueError: the patients differ.
    """
    if sorted(counts) != sorted(other):
        raise ValueError(f"patients {sorted(counts)} and {sorted(other)} cannot be paired")
    terms = np.stack([_terms(counts[patient]) for patient in sorted(counts)])
    other_terms = np.stack([_terms(other[patient]) for patient in sorted(counts)])
    draws = _draws(len(terms), seed)
    resampled = _means(terms[draws]) - _means(other_terms[draws])
    return _with_bounds(_means(terms[None]) - _means(other_terms[None]), resampled)


def count_rows(rows: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Counts]:
    """Return TP, FP and FN of every slice as arrays, from lists as JSON has them."""
    return {
        patient: np.asarray(slices, np.int64).reshape(-1, 3) for patient, slices in rows.items()
    }


def by_lesion_size(
    counts: Mapping[str, Counts], limits_px: Sequence[float]
) -> list[dict[str, float | int | None]]:
    """Return the mean Dice of slices by the size of their true lesion.

    limits_px: ascending; a row has the slices with more pixels than one limit and at most the next.
    """
    slices = np.concatenate(list(counts.values()))
    # TP + FN: pixels of the true lesion.
    size = slices[:, 0] + slices[:, 2]
    rows: list[dict[str, float | int | None]] = []
    for low, high in itertools.pairwise(limits_px):
        chosen = slices[(size > low) & (size <= high)]
        dice = float(_dice(chosen.astype(np.float64)).mean()) if len(chosen) else np.nan
        num_slices = len(chosen)
        rows.append(
            {"above_px": low, "to_px": high, "num_slices": num_slices, "dice": _rounded(dice)}
        )
    return rows


def _dice(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 2 TP / (2 TP + FP + FN) of rows that have a denominator."""
    dice: NDArray[np.float64] = 2 * counts[:, 0] / (2 * counts[:, 0] + counts[:, 1] + counts[:, 2])
    return dice


def _terms(counts: Counts) -> NDArray[np.float64]:
    """Return one volume's sums, (NUM_TERMS,), from which every mean follows.

    Numerator and denominator in turn: Dice over marked slices and their number; Dice over lesion
    slices and their number; the volume's Dice and 1; twice TP and 2 TP + FP + FN of all pixels.
    """
    rows = counts.astype(np.float64)
    # Slices with a lesion in truth or prediction.
    marked = rows[rows.sum(axis=1) > 0]
    # TP + FN above 0.
    with_lesion = rows[rows[:, 0] + rows[:, 2] > 0]
    tp, fp, fn = rows.sum(axis=0)
    pixels = 2 * tp + fp + fn
    volume = (2 * tp / pixels, 1.0) if pixels else (0.0, 0.0)
    slice_sums = (_dice(marked).sum(), len(marked))
    lesion_sums = (_dice(with_lesion).sum(), len(with_lesion))
    return np.array([*slice_sums, *lesion_sums, *volume, 2 * tp, pixels])


def _means(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the means (N, MEANS) of terms (N, patients, 8); NaN without a denominator."""
    sums = terms.sum(axis=1)
    # Numerators and denominators alternate, see ``_terms``.
    numerator = sums[:, 0::2]
    denominator = sums[:, 1::2]
    means: NDArray[np.float64] = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=means, where=denominator > 0)
    return means


def _named(means: NDArray[np.float64]) -> dict[str, float | None]:
    return dict(zip(MEANS, map(_rounded, means), strict=True))


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)

"""Paired differences of two models' headline metrics, with intervals over patients.

Both models are measured on the same volumes. Patients are resampled, and both models on the same
resample, so that a patient who is difficult for both does not widen the interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.evaluation.metrics import HEADLINE, PAIRS
from covtanet.evaluation.segmentation import volume_dice

Row = dict[str, Any]
Values = NDArray[np.float64]

NUM_BOOTSTRAPS = 2000
CONFIDENCE = 0.95
# Choice: with fewer patients a resample repeats some of them so often that the interval says
# little.
FEW_PATIENTS = 20
# Probability from which a volume counts as positive, as in ``metrics.classification``.
THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class Interval:
    """95 % interval of challenger minus champion."""

    low: float
    high: float
    num_patients: int
    """Patients that were resampled."""

    def __str__(self) -> str:
        text = f"95 % interval {self.low:+.4f} to {self.high:+.4f}, {self.num_patients} patients"
        if self.num_patients < FEW_PATIENTS:
            text += f", fewer than {FEW_PATIENTS}: the interval is wide"
        return text


def intervals(challenger: Sequence[Row], champion: Sequence[Row]) -> dict[str, Interval]:
    """Return the interval of every headline metric that both models have.

    Volumes are matched by source digest, since the models may have prepared them differently.
    """
    by_digest = {row["source_digest"]: row for row in challenger}
    pairs = [
        (by_digest[row["source_digest"]], row)
        for row in champion
        if row["source_digest"] in by_digest
    ]
    if not pairs:
        return {}
    patients = [row["patient"] or row["source_digest"] for _, row in pairs]
    weights = _resample(patients)
    differences = _differences(
        _resampled_metrics([first for first, _ in pairs], weights),
        _resampled_metrics([second for _, second in pairs], weights),
    )
    num_patients = len(set(patients))
    tail = (1 - CONFIDENCE) / 2
    result = {}
    for name, values in differences.items():
        low, high = np.nanquantile(values, [tail, 1 - tail])
        result[name] = Interval(low=float(low), high=float(high), num_patients=num_patients)
    return result


def _resample(patients: Sequence[str]) -> Values:
    """Return how often each volume counts in each resample of patients, (resamples, volumes)."""
    names = sorted(set(patients))
    # A fixed seed: the same rows give the same interval.
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(names), [1 / len(names)] * len(names), NUM_BOOTSTRAPS)
    columns = [names.index(patient) for patient in patients]
    return draws[:, columns].astype(np.float64)


def _differences(
    challenger: Mapping[str, Values], champion: Mapping[str, Values]
) -> dict[str, Values]:
    """Return differences by metric; a metric that no resample gives both models is left out."""
    differences = {}
    for name in champion:
        difference = challenger[name] - champion[name]
        if not np.isnan(difference).all():
            differences[name] = difference
    return differences


def _resampled_metrics(rows: Sequence[Row], weights: Values) -> dict[str, Values]:
    """Return every headline metric of one model in every resample; NaN without a denominator."""
    metrics = {"dice": _weighted_mean(_dice(rows), weights)}
    is_diagnosed = np.array([row["p_infected"] is not None for row in rows])
    for name, (negative, positive, column) in PAIRS.items():
        # As in ``metrics.classification``, a volume without a diagnosis counts in no pair.
        p = np.where(is_diagnosed, np.array([row[column] for row in rows], np.float64), np.nan)
        p_positive = np.where([row["grade"] == positive for row in rows], p, np.nan)
        p_negative = np.where([row["grade"] == negative for row in rows], p, np.nan)
        values = (
            _weighted_mean(_share(p_positive >= THRESHOLD, p_positive), weights),
            _weighted_mean(_share(p_negative < THRESHOLD, p_negative), weights),
            _auc(p_positive, p_negative, weights),
        )
        metrics |= {
            f"{name}_{metric}": value for metric, value in zip(HEADLINE, values, strict=True)
        }
    return metrics


def _dice(rows: Sequence[Row]) -> Values:
    dice = [None if row["tp"] is None else volume_dice(row) for row in rows]
    return np.array(dice, np.float64)


def _share(is_right: NDArray[np.bool_], p: Values) -> Values:
    """Return 1 for right and 0 for wrong; NaN for volumes without a probability."""
    return np.where(np.isnan(p), np.nan, is_right.astype(np.float64))


def _weighted_mean(values: Values, weights: Values) -> Values:
    """Return the mean over volumes that have a value, in every resample.

    values: (volumes,). weights: (resamples, volumes).
    """
    is_defined = ~np.isnan(values)
    total = weights[:, is_defined].sum(axis=1)
    return _ratio(weights[:, is_defined] @ values[is_defined], total)


def _auc(p_positive: Values, p_negative: Values, weights: Values) -> Values:
    """Return the AUC in every resample, as the share of pairs in the right order."""
    is_positive = ~np.isnan(p_positive)
    is_negative = ~np.isnan(p_negative)
    positive = p_positive[is_positive][:, None]
    negative = p_negative[is_negative][None, :]
    # (positives, negatives); ties count one half.
    right = (positive > negative) + 0.5 * (positive == negative)
    # (resamples, positives) and (resamples, negatives)
    positive_weights = weights[:, is_positive]
    negative_weights = weights[:, is_negative]
    num_right = np.einsum("bi,bi->b", positive_weights @ right, negative_weights)
    return _ratio(num_right, positive_weights.sum(axis=1) * negative_weights.sum(axis=1))


def _ratio(part: Values, whole: Values) -> Values:
    ratio = np.full(len(whole), np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio

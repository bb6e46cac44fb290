"""Paired differences of two models' headline metrics, with intervals over patients.

Both models are measured on the same volumes. Patients are resampled, and both models on the same
resample, so that a patient who is difficult for both does not widen the interval.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.evaluation.metrics import HEADLINE, PAIRS
from covtanet.evaluation.overlap import CONFIDENCE, NUM_BOOTSTRAPS
from covtanet.evaluation.segmentation import volume_dice

Row = dict[str, Any]
Values = NDArray[np.float64]

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
    """Patients who have the metric; they are resampled."""

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
    result = _intervals(pairs, _has_mask, _dice_metric)
    for name in PAIRS:
        result |= _intervals(pairs, partial(_is_in_pair, name), partial(_pair_metrics, name))
    return result


def _has_mask(row: Row) -> bool:
    return row["tp"] is not None


def _is_in_pair(name: str, row: Row) -> bool:
    """Return whether a volume counts in a pair of grades, as in ``metrics.classification``."""
    negative, positive, column = PAIRS[name]
    is_diagnosed = row["p_infected"] is not None and row[column] is not None
    return is_diagnosed and row["grade"] in (negative, positive)


def _intervals(
    pairs: Sequence[tuple[Row, Row]],
    counts: Callable[[Row], bool],
    measure: Callable[[Sequence[Row], Values], dict[str, Values]],
) -> dict[str, Interval]:
    """Return the intervals of the metrics that ``measure`` gives of the rows that count."""
    chosen = [pair for pair in pairs if counts(pair[0]) and counts(pair[1])]
    if not chosen:
        return {}
    # Patients that do not count would empty some resamples.
    patients = [row["patient"] or row["source_digest"] for _, row in chosen]
    weights = _resample(patients)
    challenger = measure([first for first, _ in chosen], weights)
    champion = measure([second for _, second in chosen], weights)
    tail = (1 - CONFIDENCE) / 2
    result = {}
    for name in champion:
        differences = challenger[name] - champion[name]
        if not np.isnan(differences).all():
            low, high = np.nanquantile(differences, [tail, 1 - tail])
            result[name] = Interval(
                low=float(low), high=float(high), num_patients=len(set(patients))
            )
    return result


def _resample(patients: Sequence[str]) -> Values:
    """Return how often each volume counts in each resample of patients, (resamples, volumes)."""
    names = sorted(set(patients))
    # A fixed seed: the same rows give the same interval.
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(names), [1 / len(names)] * len(names), NUM_BOOTSTRAPS)
    columns = [names.index(patient) for patient in patients]
    return draws[:, columns].astype(np.float64)


def _dice_metric(rows: Sequence[Row], weights: Values) -> dict[str, Values]:
    """Return the mean Dice per volume in every resample."""
    dice = np.array([volume_dice(row) for row in rows], np.float64)
    return {"dice": _weighted_mean(dice, weights)}


def _pair_metrics(name: str, rows: Sequence[Row], weights: Values) -> dict[str, Values]:
    """Return sensitivity, specificity and AUC of a pair of grades in every resample."""
    _, positive, column = PAIRS[name]
    p = np.array([row[column] for row in rows], np.float64)
    is_positive = np.array([row["grade"] == positive for row in rows])
    is_called = p >= THRESHOLD
    values = (
        _weighted_mean(np.where(is_positive, is_called, np.nan), weights),
        _weighted_mean(np.where(is_positive, np.nan, ~is_called), weights),
        _auc(p, is_positive, weights),
    )
    return {f"{name}_{metric}": value for metric, value in zip(HEADLINE, values, strict=True)}


def _weighted_mean(values: Values, weights: Values) -> Values:
    """Return the mean over volumes that have a value, in every resample; NaN without any.

    values: (volumes,). weights: (resamples, volumes).
    """
    is_defined = ~np.isnan(values)
    total = weights[:, is_defined].sum(axis=1)
    return _ratio(weights[:, is_defined] @ values[is_defined], total)


def _auc(p: Values, is_positive: NDArray[np.bool_], weights: Values) -> Values:
    """Return the AUC in every resample, as the share of pairs in the right order."""
    positive = p[is_positive][:, None]
    negative = p[~is_positive][None, :]
    # (positives, negatives); ties count one half.
    right = (positive > negative) + 0.5 * (positive == negative)
    # (resamples, positives) and (resamples, negatives)
    positive_weights = weights[:, is_positive]
    negative_weights = weights[:, ~is_positive]
    num_right = np.einsum("bi,bi->b", positive_weights @ right, negative_weights)
    return _ratio(num_right, positive_weights.sum(axis=1) * negative_weights.sum(axis=1))


def _ratio(part: Values, whole: Values) -> Values:
    ratio = np.full(len(whole), np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio

"""Metrics of an evaluation: the pairs of Table IV, all metrics by fold, and the headline.

A metric that has no denominator is null.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix, f1_score, roc_auc_score

from covtanet.data.counts import Counts
from covtanet.data.labels import GRADES
from covtanet.evaluation.overlap import CONFIDENCE
from covtanet.evaluation.segmentation import segmentation

Row = dict[str, Any]
Metrics = dict[str, Any]

PAIRS = {
    "normal_vs_mild": ("normal", "mild", "p_infected"),
    "normal_vs_severe": ("normal", "severe", "p_infected"),
    "mild_vs_severe": ("mild", "severe", "p_severe"),
}
# Metrics of a pair by which models are compared, in addition to Dice.
HEADLINE = ("sensitivity", "specificity", "auc")
NUM_BOOTSTRAPS = 1000
NUM_CALIBRATION_BINS = 10


def classification(rows: Sequence[Row], threshold: float = 0.5) -> Metrics:
    """Return the pairs of Table IV, and the calibration of both probabilities.

    A volume without a probability, such as ``p_severe`` of a diagnosis by the involvement, counts
    in no pair that reads it. Mild against severe uses ``p_severe`` of every infected volume,
    whatever its diagnosis.
    """
    graded = [row for row in rows if row["grade"] and row["p_infected"] is not None]
    if not graded:
        return {"num_volumes": 0}
    # By the true grade, not by the predicted diagnosis.
    infected = [row for row in graded if row["grade"] != "normal" and row["p_severe"] is not None]
    is_infected = np.array([row["grade"] != "normal" for row in graded])
    is_severe = np.array([row["grade"] == "severe" for row in infected])
    return {
        "num_volumes": len(graded),
        "num_by_grade": {grade: sum(row["grade"] == grade for row in graded) for grade in GRADES},
        **{name: pair(graded, *grades, threshold) for name, grades in PAIRS.items()},
        "diagnosis_calibration": calibration(is_infected, _column(graded, "p_infected")),
        "severity_calibration": calibration(is_severe, _column(infected, "p_severe")),
    }


def _column(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    return np.array([row[name] for row in rows], np.float64)


def pair(
    rows: Sequence[Row], negative: str, positive: str, column: str, threshold: float
) -> Metrics:
    """Return the metrics of one pair of grades.

    Sensitivity, specificity, accuracy, three kinds of F1, and AUC with its interval.
    """
    graded = [row for row in rows if row["grade"] in (negative, positive)]
    chosen = [row for row in graded if row[column] is not None]
    if not chosen:
        return {"num_volumes": 0}
    truth = np.array([row["grade"] == positive for row in chosen], bool)
    p = _column(chosen, column)
    predicted = p >= threshold
    matrix = confusion_matrix(truth, predicted, labels=[False, True])
    tn, fp, fn, tp = (int(count) for count in matrix.ravel())
    fractions = Counts(tp, fp, fn, tn).fractions()
    names = ("sensitivity", "specificity", "accuracy")
    metrics: Metrics = {"num_volumes": len(truth), "tp": tp, "fp": fp, "fn": fn, "tn": tn}
    for name in names:
        part, whole = fractions[name]
        metrics[name] = part / whole if whole else None
    metrics |= _f1_scores(truth, predicted)
    metrics |= {"auc": None, "auc_low": None, "auc_high": None}
    # An AUC needs both classes.
    if truth.any() and not truth.all():
        metrics["auc"] = float(roc_auc_score(truth, p))
        metrics["auc_low"], metrics["auc_high"] = _interval(truth, p)
    return metrics


def _f1_scores(truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> dict[str, float | None]:
    both = [False, True]
    scores: dict[str, float | None] = {}
    for kind, labels in (("binary", None), ("macro", both), ("weighted", both)):
        score = float(f1_score(truth, predicted, average=kind, labels=labels, zero_division=np.nan))
        scores[f"f1_{kind}"] = None if math.isnan(score) else score
    return scores


def _interval(truth: NDArray[np.bool_], p: NDArray[np.float64]) -> tuple[float, float]:
    """Return the bootstrap interval of the AUC; the same for the same input.

    Each class is resampled separately.
    """
    # A fixed seed: the same rows give the same interval.
    rng = np.random.default_rng(0)
    positive = p[truth]
    negative = p[~truth]
    # The AUC is the share of pairs (positive, negative) in the right order. A resample changes the
    # weights of the pairs alone, so that all resamples together are two products of matrices.
    # (positives, negatives); ties count one half.
    right = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    weights = [
        rng.multinomial(len(values), [1 / len(values)] * len(values), NUM_BOOTSTRAPS)
        for values in (positive, negative)
    ]
    num_pairs = len(positive) * len(negative)
    aucs = np.einsum("bi,bi->b", weights[0] @ right, weights[1]) / num_pairs
    low, high = np.quantile(aucs, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def calibration(truth: NDArray[np.bool_], p: NDArray[np.float64]) -> Metrics:
    """Return Brier score, expected calibration error, and reliability curve over ten equal bins."""
    if not len(truth) or truth.all() or not truth.any():
        return {"num_volumes": len(truth)}
    observed, predicted = calibration_curve(truth, p, n_bins=NUM_CALIBRATION_BINS)
    # A probability of 1 belongs to the last bin.
    bins = np.minimum((p * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1)
    gaps = []
    for index in np.unique(bins):
        is_inside = bins == index
        gaps.append(is_inside.sum() * abs(truth[is_inside].mean() - p[is_inside].mean()))
    return {
        "num_volumes": len(truth),
        "brier": float(brier_score_loss(truth, p)),
        "expected_calibration_error": float(sum(gaps) / len(truth)),
        "predicted": predicted.tolist(),
        "observed": observed.tolist(),
    }


def by_fold(rows: Iterable[Row], metrics: Callable[[Sequence[Row]], Metrics]) -> dict[int, Metrics]:
    """Return the metrics of each fold; rows without a fold are fold 0."""
    folds: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        folds[row["fold"] or 0].append(row)
    return {fold: metrics(folds[fold]) for fold in sorted(folds)}


def headline(rows: Sequence[Row]) -> dict[str, float]:
    """Return the few metrics by which models are compared, as far as the rows give them."""
    pairs = classification(rows)
    values = {"dice": segmentation(rows).get("per_volume", {}).get("dice")}
    for name in PAIRS:
        values |= {f"{name}_{metric}": pairs.get(name, {}).get(metric) for metric in HEADLINE}
    return {name: value for name, value in values.items() if value is not None}


def summarise(rows: Sequence[Row]) -> Metrics:
    """Return all metrics of an evaluation: per network over all its volumes, and fold by fold."""
    networks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        networks[row["network"]].append(row)
    return {name: _of_network(networks[name]) for name in sorted(networks)}


def _of_network(rows: Sequence[Row]) -> Metrics:
    folds = by_fold(rows, _both)
    return {**_both(rows), "folds": {str(fold): metrics for fold, metrics in folds.items()}}


def _both(rows: Sequence[Row]) -> Metrics:
    return {"segmentation": segmentation(rows), "classification": classification(rows)}

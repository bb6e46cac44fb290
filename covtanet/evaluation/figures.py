"""Figures of an evaluation: segmentation per slice, per volume and pooled; diagnosis and severity as in Table IV.

A figure that has no denominator is null.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix, f1_score, roc_auc_score

from covtanet.evaluation.rows import COUNTS

Row = dict[str, Any]
Figures = dict[str, Any]

OVERLAP = ("dice", "iou", "sensitivity", "precision", "specificity")
PAIRS = {
    "normal_vs_mild": ("normal", "mild", "p_infected"),
    "normal_vs_severe": ("normal", "severe", "p_infected"),
    "mild_vs_severe": ("mild", "severe", "p_severe"),
}
# Lesion pixels as a share of the slice; lengths are unknown in some data sets.
SIZE_BINS = ((0.0, 0.005), (0.005, 0.02), (0.02, 0.05), (0.05, 1.0))
NUM_BOOTSTRAPS, NUM_CALIBRATION_BINS = 1000, 10
CONFIDENCE = 0.95


def segmentation(rows: Sequence[Row]) -> Figures:
    """Overlap figures of volumes with lesion masks, in [0, 1].

    per_slice: mean over slices, each figure over those that have its denominator (Dice: a lesion in truth or
    prediction). per_volume: pixels summed within a volume,
    mean over volumes. pooled: all pixels summed.
    """
    volumes = [
        np.array([row[name] for name in COUNTS], np.int64) for row in rows if row["tp"] is not None
    ]
    if not volumes:
        return {"num_volumes": 0}
    slices = np.concatenate(volumes, axis=1)
    by_volume = np.stack([volume.sum(axis=1) for volume in volumes], axis=1)
    return {
        "num_volumes": len(volumes),
        "num_slices": int(slices.shape[1]),
        "per_slice": _mean_overlap(slices),
        "per_volume": _mean_overlap(by_volume),
        "pooled": _mean_overlap(slices.sum(axis=1, keepdims=True)),
        "dice_by_lesion_size": _by_size(slices),
        "volume_dice": {
            row["volume"]: _ratio(2 * c[0], 2 * c[0] + c[1] + c[2]) for row, c in _totals(rows)
        },
    }


def _totals(rows: Sequence[Row]) -> list[tuple[Row, list[int]]]:
    return [(row, [sum(row[name]) for name in COUNTS]) for row in rows if row["tp"] is not None]


def _mean_overlap(counts: NDArray[np.int64]) -> Figures:
    """Mean of each figure over the cases that have its denominator. counts: (4, cases) of TP, FP, FN, TN."""
    tp, fp, fn, tn = counts.astype(np.float64)
    parts = {
        "dice": (2 * tp, 2 * tp + fp + fn),
        "iou": (tp, tp + fp + fn),
        "sensitivity": (tp, tp + fn),
        "precision": (tp, tp + fp),
        "specificity": (tn, tn + fp),
    }
    return {name: _mean_ratio(part, whole) for name, (part, whole) in parts.items()}


def _mean_ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> float | None:
    known = whole > 0
    return float(np.mean(part[known] / whole[known])) if known.any() else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _by_size(slices: NDArray[np.int64]) -> list[Figures]:
    share = (slices[0] + slices[2]) / slices.sum(axis=0)
    out = []
    for low, high in SIZE_BINS:
        inside = slices[:, (share > low) & (share <= high)]
        dice = _mean_overlap(inside)["dice"] if inside.shape[1] else None
        out.append({"above": low, "to": high, "num_slices": int(inside.shape[1]), "dice": dice})
    return out


def classification(rows: Sequence[Row], threshold: float = 0.5) -> Figures:
    """The pairs of Table IV, and calibration of both probabilities.

    Mild against severe uses ``p_severe`` of every infected volume, whatever its diagnosis.
    """
    graded = [row for row in rows if row["grade"] and row["p_infected"] is not None]
    if not graded:
        return {"num_volumes": 0}
    infected = [row for row in graded if row["grade"] != "normal"]
    return {
        "num_volumes": len(graded),
        "num_by_grade": {
            grade: sum(row["grade"] == grade for row in graded)
            for grade in ("normal", "mild", "severe")
        },
        **{name: pair(graded, *which, threshold) for name, which in PAIRS.items()},
        "diagnosis_calibration": calibration(
            np.array([row["grade"] != "normal" for row in graded]), _column(graded, "p_infected")
        ),
        "severity_calibration": calibration(
            np.array([row["grade"] == "severe" for row in infected]), _column(infected, "p_severe")
        ),
    }


def _column(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    return np.array([row[name] for row in rows], np.float64)


def pair(
    rows: Sequence[Row], negative: str, positive: str, column: str, threshold: float
) -> Figures:
    """One pair of grades: sensitivity and specificity, accuracy, three kinds of F1, AUC with its interval."""
    chosen = [row for row in rows if row["grade"] in (negative, positive)]
    truth = np.array([row["grade"] == positive for row in chosen], bool)
    p = _column(chosen, column)
    predicted = p >= threshold
    if not len(truth):
        return {"num_volumes": 0}
    tn, fp, fn, tp = (
        int(each) for each in confusion_matrix(truth, predicted, labels=[False, True]).ravel()
    )
    scores = {
        f"f1_{kind}": float(
            f1_score(truth, predicted, average=kind, labels=labels, zero_division=np.nan)
        )
        for kind, labels in (
            ("binary", None),
            ("macro", [False, True]),
            ("weighted", [False, True]),
        )
    }
    found: Figures = {
        "num_volumes": len(truth),
        "tp": tp, "fp": fp, "fn": fn, "tn": tn,
        "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
        "accuracy": _ratio(tp + tn, len(truth)),
        **{name: None if math.isnan(value) else value for name, value in scores.items()},
        "auc": None, "auc_low": None, "auc_high": None,
    }  # fmt: skip
    if truth.any() and not truth.all():
        found["auc"] = float(roc_auc_score(truth, p))
        found["auc_low"], found["auc_high"] = _interval(truth, p)
    return found


def _interval(truth: NDArray[np.bool_], p: NDArray[np.float64]) -> tuple[float, float]:
    """Bootstrap interval of the AUC, resampling each class by itself; the same for the same input."""
    rng = np.random.default_rng(0)
    positive, negative = p[truth], p[~truth]
    # The AUC is the share of pairs in the right order; a resample only weighs the pairs anew.
    right = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    weights = [
        rng.multinomial(len(own), [1 / len(own)] * len(own), NUM_BOOTSTRAPS)
        for own in (positive, negative)
    ]
    found = np.einsum("bi,bi->b", weights[0] @ right, weights[1]) / (len(positive) * len(negative))
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def calibration(truth: NDArray[np.bool_], p: NDArray[np.float64]) -> Figures:
    """Brier score, expected calibration error, and the reliability curve over ten equal bins."""
    if not len(truth) or truth.all() or not truth.any():
        return {"num_volumes": len(truth)}
    observed, predicted = calibration_curve(truth, p, n_bins=NUM_CALIBRATION_BINS)
    bins = np.minimum((p * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1)
    gaps = [
        (bins == each).sum() * abs(truth[bins == each].mean() - p[bins == each].mean())
        for each in np.unique(bins)
    ]
    return {
        "num_volumes": len(truth),
        "brier": float(brier_score_loss(truth, p)),
        "expected_calibration_error": float(sum(gaps) / len(truth)),
        "predicted": predicted.tolist(),
        "observed": observed.tolist(),
    }


def by_fold(rows: Iterable[Row], figures: Callable[[Sequence[Row]], Figures]) -> dict[int, Figures]:
    """Figures of each fold; rows without one are fold 0."""
    folds: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        folds[row["fold"] or 0].append(row)
    return {fold: figures(folds[fold]) for fold in sorted(folds)}


def headline(found: Sequence[Row]) -> dict[str, float]:
    """The few figures by which models are compared, as far as the rows give them."""
    overlap = segmentation(found).get("per_volume", {})
    judged = classification(found)
    values = {"dice": overlap.get("dice")} | {
        f"{pair}_{figure}": judged.get(pair, {}).get(figure)
        for pair in PAIRS
        for figure in ("sensitivity", "specificity", "auc")
    }
    return {name: value for name, value in values.items() if value is not None}


def summarise(rows: Sequence[Row]) -> Figures:
    """All figures of an evaluation: per network over all its volumes, and fold by fold."""
    networks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        networks[row["network"]].append(row)
    return {
        name: {
            "segmentation": segmentation(own),
            "classification": classification(own),
            "folds": {
                str(fold): figures
                for fold, figures in by_fold(
                    own,
                    lambda part: {
                        "segmentation": segmentation(part),
                        "classification": classification(part),
                    },
                ).items()
            },
        }
        for name, own in sorted(networks.items())
    }

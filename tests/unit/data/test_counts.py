"""Metrics of counts, by hand; the same for numbers and for arrays."""

import math

import numpy as np
import pytest
import torch

from covtanet.data.counts import Counts
from covtanet.training.metrics import count, metrics_of

# Of 6 lesion pixels 4 are detected, with 3 false alarms, on a slice of 20 pixels.
FRACTIONS = {
    "dice": (8, 13),
    "iou": (4, 9),
    "sensitivity": (4, 6),
    "precision": (4, 7),
    "specificity": (11, 14),
    "accuracy": (15, 20),
}


def test_fractions_of_numbers() -> None:
    assert Counts(4, 3, 2, 11).fractions() == FRACTIONS


def test_fractions_of_arrays_are_those_of_their_elements() -> None:
    tp, fp, fn, tn = np.array([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [11.0, 5.0]])
    fractions = Counts(tp, fp, fn, tn).fractions()
    for name, (part, whole) in FRACTIONS.items():
        assert (fractions[name][0][0], fractions[name][1][0]) == (part, whole)
    assert fractions["dice"][1][1] == 0


def test_metrics_without_denominator_are_nan() -> None:
    metrics = metrics_of(torch.tensor([0.0, 0.0, 0.0, 7.0], dtype=torch.float64))
    assert metrics["specificity"] == metrics["accuracy"] == 1
    for name in ("dice", "iou", "sensitivity", "precision"):
        assert math.isnan(metrics[name]), name


def test_count_leaves_out_elements_beyond_the_mask() -> None:
    predicted = torch.tensor([True, True, False, False])
    truth = torch.tensor([True, False, True, False])
    assert count(predicted, truth).tolist() == [1, 1, 1, 1]
    mask = torch.tensor([True, False, True, False])
    assert count(predicted, truth, mask).tolist() == [1, 0, 1, 0]
    assert metrics_of(count(predicted, truth, mask))["dice"] == pytest.approx(2 / 3)

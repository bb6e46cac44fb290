"""Dice per slice, per volume and pooled, worked by hand."""

import numpy as np
import pytest

from covtanet.evaluation.overlap import (
    by_lesion_size,
    count_rows,
    overlap,
    overlap_difference,
)

# TP, FP, FN of each slice. Dice of a: 0.5, 1.0, false alarm 0, empty slice; of b: 0.8.
A = np.array([[1, 1, 1], [4, 0, 0], [0, 3, 0], [0, 0, 0]])
B = np.array([[2, 1, 0]])


def test_means_of_two_patients_by_hand() -> None:
    """The pixels of a: 2 * 5 / (10 + 4 + 1); of b: 4 / 5; of both: 14 / (14 + 5 + 1)."""
    metrics = overlap({"a": A, "b": B})
    assert metrics["num_patients"] == 2
    assert metrics["num_slices"] == 5
    assert metrics["per_slice"]["dice"] == pytest.approx((0.5 + 1 + 0 + 0.8) / 4, abs=1e-4)
    assert metrics["per_lesion_slice"]["dice"] == pytest.approx((0.5 + 1 + 0.8) / 3, abs=1e-4)
    assert metrics["per_volume"]["dice"] == pytest.approx((10 / 15 + 0.8) / 2, abs=1e-4)
    assert metrics["pooled"]["dice"] == pytest.approx(14 / 20, abs=1e-4)
    assert metrics["precision"] == pytest.approx(7 / 12, abs=1e-4)
    assert metrics["sensitivity"] == pytest.approx(7 / 8, abs=1e-4)


def test_metrics_of_each_patient_by_hand() -> None:
    by_patient = overlap({"a": A, "b": B})["by_patient"]
    assert by_patient["a"]["per_slice"] == pytest.approx(0.5, abs=1e-4)
    assert by_patient["a"]["per_volume"] == pytest.approx(10 / 15, abs=1e-4)
    assert by_patient["b"]["pooled"] == pytest.approx(0.8, abs=1e-4)


def test_interval_of_two_patients_spans_both() -> None:
    """A quarter of the resamples has only a, a quarter only b."""
    volume = overlap({"a": A, "b": B})["per_volume"]
    assert (volume["low"], volume["high"]) == pytest.approx((10 / 15, 0.8), abs=1e-4)


def test_interval_of_one_patient_has_no_width() -> None:
    volume = overlap({"b": B})["per_volume"]
    assert volume["low"] == volume["dice"] == volume["high"]


def test_patient_without_lesion_and_prediction_does_not_enter_the_means() -> None:
    empty = np.zeros((3, 3), int)
    metrics = overlap({"a": A, "empty": empty})
    assert metrics["per_volume"]["dice"] == pytest.approx(10 / 15, abs=1e-4)
    assert metrics["by_patient"]["empty"]["per_volume"] is None


def test_metrics_without_any_lesion_are_null() -> None:
    metrics = overlap({"empty": np.zeros((3, 3), int)})
    assert metrics["precision"] is None
    assert metrics["sensitivity"] is None
    assert metrics["pooled"] == {"dice": None, "low": None, "high": None}


def test_lesion_size_counts_true_pixels_up_to_the_upper_limit() -> None:
    """True lesions of 2, 4, 0, 0 and 2 pixels: two up to 2 pixels, one up to 4."""
    rows = by_lesion_size({"a": A, "b": B}, (0, 2, 4, 8))
    assert [row["num_slices"] for row in rows] == [2, 1, 0]
    assert rows[0]["dice"] == pytest.approx((0.5 + 0.8) / 2, abs=1e-4)
    assert rows[1]["dice"] == 1.0
    assert rows[2]["dice"] is None


def test_difference_of_two_networks_is_paired_over_patients() -> None:
    """Volumes 10/15 and 0.8 against 0.8 and 0.8; a resample has only a or only b half the time."""
    difference = overlap_difference({"a": A, "b": B}, {"a": B, "b": B})["per_volume"]
    assert difference["dice"] == pytest.approx((10 / 15 - 0.8) / 2, abs=1e-4)
    assert (difference["low"], difference["high"]) == pytest.approx((10 / 15 - 0.8, 0), abs=1e-4)


def test_difference_refuses_unequal_patients() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        overlap_difference({"a": A}, {"b": B})


def test_counts_from_json_keep_patients_without_slices() -> None:
    counts = count_rows({"a": A.tolist(), "b": []})
    assert np.array_equal(counts["a"], A)
    assert counts["b"].shape == (0, 3)

"""Metrics with and without the lung mask, intervals over patients, and their text."""

from typing import Any

import pytest

from covtanet.evaluation import metrics
from covtanet.evaluation.overlap_text import overlap_text
from covtanet.evaluation.rows import (
    COUNTS,
    EVALUATION_SCHEMA,
    INPUT_GRID,
    SOURCE_GRID,
    UNMASKED_COUNTS,
)
from covtanet.evaluation.segmentation import segmentation
from covtanet.report.tables import paper_tables

# TP, FP, FN and TN of a slice: Dice 0.5, 0.8 and 0.
HALF = (20, 20, 20, 940)
GOOD = (80, 20, 20, 880)
MISSED = (0, 0, 600, 400)


def row(
    volume: str,
    patient: str,
    *counts: tuple[int, ...],
    unmasked: tuple[tuple[int, ...], ...] | None = None,
    grid: str = SOURCE_GRID,
) -> dict[str, Any]:
    """Return a row of slices with these counts; without the lung mask the same unless given."""
    columns = dict(zip(COUNTS, map(list, zip(*counts, strict=True)), strict=True))
    if grid == SOURCE_GRID:
        others = zip(*(unmasked or counts), strict=True)
        columns |= dict(zip(UNMASKED_COUNTS, map(list, others), strict=True))
    identity = {"volume": volume, "patient": patient, "network": "V8", "grid": grid, "fold": 0}
    slices = {"slice": list(range(len(counts)))}
    return {**dict.fromkeys(EVALUATION_SCHEMA.names), **identity, **slices, **columns}


def test_metrics_without_lung_mask_stand_beside_those_with_it() -> None:
    """Outside the lungs another 40 false alarms: 2 * 20 / (40 + 20 + 60)."""
    rows = [row("a", "a", HALF, unmasked=((20, 60, 20, 900),))]
    result = segmentation(rows)
    assert result["per_volume"]["dice"] == pytest.approx(0.5)
    assert result["without_lung_mask"]["per_volume"]["dice"] == pytest.approx(1 / 3)
    assert result["num_in_source_grid"] == 1


def test_pixel_accuracy_is_the_share_of_right_pixels() -> None:
    result = segmentation([row("a", "a", HALF), row("b", "b", GOOD)])
    assert result["per_volume"]["accuracy"] == pytest.approx((0.96 + 0.96) / 2)
    assert result["pooled"]["accuracy"] == pytest.approx(0.96)


def test_interval_is_over_patients_not_over_volumes() -> None:
    """Two volumes of one patient are always resampled together: their mean has no width."""
    one_patient = segmentation([row("a1", "a", HALF), row("a2", "a", GOOD)])
    interval = one_patient["dice_intervals"]["per_volume"]
    assert interval == pytest.approx({"dice": 0.65, "low": 0.65, "high": 0.65})
    two_patients = segmentation([row("a", "a", HALF), row("b", "b", GOOD)])
    interval = two_patients["dice_intervals"]["per_volume"]
    assert interval == pytest.approx({"dice": 0.65, "low": 0.5, "high": 0.8})
    assert one_patient["num_patients"] == 1


def test_lesion_size_is_in_pixels_of_the_source() -> None:
    """True lesions of 40, 100 and 600 pixels; slices at the network's input size are left out."""
    rows = [
        row("a", "a", HALF, GOOD, MISSED),
        row("b", "b", HALF, grid=INPUT_GRID),
    ]
    bins = segmentation(rows)["dice_by_lesion_px"]
    assert [(size["above_px"], size["to_px"]) for size in bins] == [
        (0, 50), (50, 128), (128, 512), (512, None),
    ]  # fmt: skip
    assert [size["num_slices"] for size in bins] == [1, 1, 0, 1]
    assert [size["dice"] for size in bins] == [0.5, 0.8, None, 0.0]


def test_text_names_volumes_that_were_counted_at_the_input_size() -> None:
    rows = [row("a", "a", HALF), row("b", "b", GOOD, grid=INPUT_GRID)]
    text = overlap_text(metrics.summarise(rows))
    assert "V8: 1 volumes are grey values without a line to HU or single slices, counted" in text
    assert "| V8 | as in screening | 2 | 2 | 65.0 (50.0 to 80.0) |" in text
    assert "| V8 | none | 2 | 2 | 50.0 (50.0 to 50.0) |" in text
    assert "| V8 | as in screening | 1-50 | 1 | 50.0 |" in text


def test_text_of_grey_values_alone_has_no_lung_mask() -> None:
    text = overlap_text(metrics.summarise([row("b", "b", GOOD, grid=INPUT_GRID)]))
    assert "as in screening" not in text
    assert "| V8 | none | 1 | 1 | 80.0 (80.0 to 80.0) |" in text


def test_text_counts_volumes_that_screening_rejects() -> None:
    rejected = {**row("a", "a", MISSED), "reason": "no_lung"}
    text = overlap_text(metrics.summarise([rejected]))
    assert "V8: screening would reject 1 volumes, all of whose lesion counts as missed." in text


def test_volume_without_probability_of_severity_counts_in_no_pair_of_severity() -> None:
    """As a diagnosis by the involvement, which gives a probability of infection alone."""
    graded = [
        {**row(grade, grade, HALF), "grade": grade, "p_infected": p}
        for grade, p in (("normal", 0.1), ("mild", 0.7), ("severe", 0.9))
    ]
    result = metrics.classification(graded)
    assert result["mild_vs_severe"] == {"num_volumes": 0}
    assert result["normal_vs_mild"]["auc"] == 1.0
    assert result["severity_calibration"] == {"num_volumes": 0}


def test_note_of_the_tables_says_in_which_pixels_lesions_were_counted() -> None:
    in_source = row("a", "a", HALF)
    at_input = row("b", "b", GOOD, grid=INPUT_GRID)
    notes = []
    for rows in ([in_source], [at_input], [in_source, at_input]):
        summary = metrics.summarise(rows)
        (table,) = paper_tables(summary, "data", is_second_data_set=True)
        notes.append(table.note)
    assert notes[0].endswith("; pixels of the source within the lungs, as screening measures.")
    assert notes[1].endswith("; pixels of the network's input, without a lung mask.")
    assert "but for grey values without a line to HU" in notes[2]

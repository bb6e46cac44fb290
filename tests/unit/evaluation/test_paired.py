"""Paired intervals of the difference of two models, worked by hand."""

from typing import Any

import pytest

from covtanet.evaluation import metrics
from covtanet.evaluation.paired import Interval, intervals
from covtanet.evaluation.promotion import Margins, compare
from covtanet.evaluation.rows import EVALUATION_SCHEMA


def row(patient: str, tp: int = 5, p: float = 0.9, grade: str = "mild", scan: str = "") -> Any:
    """Return a volume of one slice with a Dice of ``tp`` / 10."""
    return {
        **dict.fromkeys(EVALUATION_SCHEMA.names),
        "volume": f"{patient}{scan}",
        "source_digest": f"{patient}{scan}",
        "patient": patient,
        "grade": grade,
        "p_infected": p,
        "p_severe": 0.1,
        "slice": [0],
        "tp": [tp],
        "fp": [10 - tp],
        "fn": [10 - tp],
        "tn": [80],
    }


def test_constant_difference_has_no_width_whatever_the_patients() -> None:
    """Patients differ by 0.6, models by 0.1 in each: pairing removes the patients."""
    champion = [row("a", 1), row("b", 4), row("c", 7)]
    challenger = [row("a", 2), row("b", 5), row("c", 8)]
    interval = intervals(challenger, champion)["dice"]
    assert interval.low == pytest.approx(0.1)
    assert interval.high == pytest.approx(0.1)


def test_interval_of_two_patients_spans_both_differences() -> None:
    interval = intervals([row("a", 4), row("b", 7)], [row("a", 5), row("b", 5)])["dice"]
    assert interval.low == pytest.approx(-0.1)
    assert interval.high == pytest.approx(0.2)
    assert interval.num_patients == 2


def test_two_scans_of_one_patient_are_resampled_together() -> None:
    """The mean of their differences, 0.05, is never split."""
    challenger = [row("a", 4, scan="1"), row("a", 7, scan="2")]
    champion = [row("a", 5, scan="1"), row("a", 5, scan="2")]
    interval = intervals(challenger, champion)["dice"]
    assert interval.low == interval.high == pytest.approx(0.05)
    assert interval.num_patients == 1


def test_metrics_of_the_whole_sample_are_those_of_the_headline() -> None:
    """With one patient every resample is the sample itself, so the interval is the difference."""
    grades = ("normal", "normal", "mild", "mild", "severe")
    scans = [(str(number), grade) for number, grade in enumerate(grades)]
    first = [
        row("a", 6, p, grade, scan)
        for (scan, grade), p in zip(scans, (0.2, 0.6, 0.5, 0.7, 0.9), strict=True)
    ]
    second = [
        row("a", 5, p, grade, scan)
        for (scan, grade), p in zip(scans, (0.2, 0.3, 0.1, 0.4, 0.9), strict=True)
    ]
    differences = intervals(first, second)
    ours = metrics.headline(first)
    theirs = metrics.headline(second)
    assert set(differences) == set(ours) == set(theirs)
    for name, interval in differences.items():
        assert interval.low == pytest.approx(ours[name] - theirs[name]), name


def test_metric_that_one_model_lacks_has_no_interval() -> None:
    without = [{**row("a"), "p_infected": None}, {**row("b", grade="normal"), "p_infected": None}]
    differences = intervals([row("a"), row("b", grade="normal")], without)
    assert set(differences) == {"dice"}


def test_patients_without_a_mask_are_not_counted_for_dice() -> None:
    without_mask = {**row("b", grade="normal"), "tp": None}
    rows = [row("a"), without_mask]
    differences = intervals(rows, rows)
    assert differences["dice"].num_patients == 1
    assert differences["normal_vs_mild_auc"].num_patients == 2


def test_interval_below_the_margin_refuses_a_better_mean() -> None:
    """The mean rises by 0.05, but a resample of the first patient alone loses 0.1."""
    uncertain = Interval(low=-0.1, high=0.2, num_patients=2)
    (dice,) = compare({"dice": 0.65}, {"dice": 0.6}, Margins(), {"dice": uncertain})
    assert not dice.is_worse
    assert not dice.is_no_worse
    assert "not shown to be no worse" in str(dice)
    assert "2 patients, fewer than 20: the interval is wide" in str(dice)


def test_interval_above_the_margin_allows_a_slightly_lower_mean() -> None:
    sure = Interval(low=-0.009, high=0.001, num_patients=50)
    (dice,) = compare({"dice": 0.596}, {"dice": 0.6}, Margins(), {"dice": sure})
    assert dice.is_no_worse
    assert str(dice) == (
        "0.5960 against 0.6000, 95 % interval -0.0090 to +0.0010, 50 patients, margin 0.01: "
        "no worse"
    )

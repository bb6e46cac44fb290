"""Figures by hand, the paper's tables, promotion."""

import math
import re
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from covtanet.evaluation import gallery, metrics, rows
from covtanet.evaluation.promotion import Margins, compare
from covtanet.evaluation.segmentation import segmentation
from covtanet.report import plots
from covtanet.report.paper_values import TABLE_II, TABLE_III, TABLE_IV
from covtanet.report.tables import Table, paper_tables

Row = dict[str, Any]


def row(
    volume: str,
    grade: str = "mild",
    p: float = 0.9,
    severe: float = 0.2,
    fold: int = 0,
    network: str = "V7",
    counts: tuple[tuple[int, ...], ...] | None = None,
) -> Row:
    """counts: (TP, FP, FN, TN) of each slice."""
    columns = (
        dict(zip(rows.COUNTS, zip(*counts, strict=True), strict=True))
        if counts
        else dict.fromkeys(rows.COUNTS)
    )
    return {
        **dict.fromkeys(rows.EVALUATION_SCHEMA.names),
        "volume": volume,
        "source_digest": volume,
        "patient": volume,
        "grid": rows.SOURCE_GRID,
        "network": network,
        "fold": fold,
        "grade": grade,
        "p_infected": p,
        "p_severe": severe,
        "slice": list(range(len(counts or ()))),
        **{name: None if values is None else list(values) for name, values in columns.items()},
        # Without the lung mask nothing else is marked.
        **{
            f"{name}_unmasked": None if values is None else list(values)
            for name, values in columns.items()
        },
    }


TWO = [row("a", counts=((6, 2, 2, 90), (0, 0, 0, 100))), row("b", counts=((1, 0, 3, 96),))]


def test_overlap_per_slice_per_volume_and_pooled_by_hand() -> None:
    found = segmentation(TWO)
    assert found["per_slice"]["dice"] == pytest.approx(
        (12 / 16 + 2 / 5) / 2
    )  # the slice without any lesion is none
    assert found["per_volume"]["dice"] == pytest.approx((12 / 16 + 2 / 5) / 2)
    assert found["pooled"]["dice"] == pytest.approx(14 / 21)
    assert found["pooled"]["sensitivity"] == pytest.approx(7 / 12)
    assert found["pooled"]["precision"] == pytest.approx(7 / 9)
    assert found["pooled"]["specificity"] == pytest.approx(286 / 288)
    assert found["per_volume"]["iou"] == pytest.approx((6 / 10 + 1 / 4) / 2)
    assert found["volume_dice"] == {"a": pytest.approx(0.75), "b": pytest.approx(0.4)}


def test_false_alarm_without_lesion_counts_as_zero_dice_and_no_sensitivity() -> None:
    found = segmentation([row("a", counts=((0, 5, 0, 95),))])
    assert found["per_slice"]["dice"] == 0
    assert found["per_slice"]["sensitivity"] is None


def test_dice_by_lesion_size_sorts_slices_by_their_true_share() -> None:
    found = segmentation(TWO)["dice_by_lesion_size"]
    assert [(size["num_slices"], size["dice"]) for size in found] == [
        (0, None), (0, None), (1, pytest.approx(0.4)), (1, pytest.approx(0.75)),
    ]  # fmt: skip


GRADED = [
    row("n1", "normal", 0.1), row("n2", "normal", 0.6), row("n3", "normal", 0.2),
    row("m1", "mild", 0.9, 0.3), row("m2", "mild", 0.4, 0.7),
    row("s1", "severe", 0.8, 0.9), row("s2", "severe", 0.3, 0.6),
]  # fmt: skip


def test_pairs_of_table_iv_by_hand() -> None:
    """Mild against severe uses p_severe of every infected volume, m2 and s2 too, which were called
    normal.
    """
    found = metrics.classification(GRADED)
    mild = found["normal_vs_mild"]
    assert (mild["tp"], mild["fp"], mild["fn"], mild["tn"]) == (1, 1, 1, 2)
    assert mild["sensitivity"] == 0.5
    assert mild["specificity"] == pytest.approx(2 / 3)
    assert mild["accuracy"] == pytest.approx(3 / 5)
    assert mild["f1_binary"] == 0.5
    assert mild["f1_macro"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert mild["f1_weighted"] == pytest.approx((2 * 0.5 + 3 * 2 / 3) / 5)
    assert mild["auc"] == pytest.approx(
        5 / 6
    )  # of six pairs one is turned round: m2 0.4 below n2 0.6
    assert mild["auc_low"] <= mild["auc"] <= mild["auc_high"]
    severe = found["mild_vs_severe"]
    assert (severe["tp"], severe["fp"], severe["fn"], severe["tn"]) == (2, 1, 0, 1)


def test_perfect_probabilities_are_calibrated() -> None:
    found = metrics.classification(
        [row("n", "normal", 0.0), row("m", "mild", 1.0, 0.0), row("s", "severe", 1.0, 1.0)]
    )
    for name in ("diagnosis_calibration", "severity_calibration"):
        assert found[name]["brier"] == 0
        assert found[name]["expected_calibration_error"] == 0


def test_calibration_error_by_hand() -> None:
    """Two bins: 0.25 against 1 of 4, and 0.75 against 1 of 2."""
    found = metrics.calibration(
        np.array([1, 0, 0, 0, 1, 0], bool), np.array([0.25] * 4 + [0.75] * 2)
    )
    assert found["expected_calibration_error"] == pytest.approx(2 / 6 * 0.25)
    assert found["observed"] == [0.25, 0.5]


def test_rows_without_grade_or_diagnosis_are_not_classified() -> None:
    assert metrics.classification(
        [{**row("a"), "grade": None}, {**row("b"), "p_infected": None}]
    ) == {"num_volumes": 0}


def test_evaluation_rows_are_equal_after_parquet() -> None:
    plain = [{**row("b"), "p_severe": None}, row("a", counts=((1, 2, 3, 4),))]
    again = rows.from_parquet(rows.to_parquet(plain))
    assert [each["volume"] for each in again] == ["a", "b"]
    assert again[0]["fn"] == [3]
    assert again[1]["tp"] is None
    assert again[1]["p_severe"] is None


def folds() -> list[Row]:
    """Two folds of V1 and V7: Dice 0.6 and 0.8 for V7, 0.5 and 0.5 for V1."""
    out = []
    for network, dice in (("V1", (5, 5)), ("V7", (6, 8))):
        for fold, tp in enumerate(dice):
            counts = ((tp, 10 - tp, 10 - tp, 80),)
            own: dict[str, Any] = {"fold": fold, "network": network}
            out += [
                row(f"{network}{fold}m", counts=counts, **own),
                row(f"{network}{fold}n", "normal", 0.1, **own),
            ]
            out.append(row(f"{network}{fold}s", "severe", 0.9, 0.8, **own))
    return out


def cells(table: Table, name: str, whose: str) -> dict[str, Any]:
    (found,) = [each for key, side, each in table.rows if (key, side) == (name, whose)]
    return dict(zip(table.columns, found, strict=True))


def test_tables_have_the_papers_rows_and_columns_with_both_values() -> None:
    table_i, table_ii, table_iv = paper_tables(
        metrics.summarise(folds()), "phantoms", is_second_data_set=False
    )
    assert cells(table_i, "V7", "paper") == {"Dice": (60.2, 0.26)}
    mean, sd = cells(table_i, "V7", "ours")["Dice"]
    assert (mean, sd) == (
        pytest.approx(70),
        pytest.approx(14.142, abs=1e-3),
    )  # sample deviation of 60 and 80
    assert cells(table_i, "V2", "ours") == {"Dice": None}
    assert cells(table_ii, "Unet", "ours")["Dice"][0] == pytest.approx(50)
    assert cells(table_ii, "TA-SegNet", "ours")["Dice"][0] == pytest.approx(70)
    assert cells(table_iv, "CovTANet", "ours")["Normal vs. Severe Acc."] == (
        pytest.approx(100),
        pytest.approx(0),
    )
    assert cells(table_iv, "VGG-19", "ours")["Normal vs. Severe Acc."] is None
    text = table_ii.as_markdown()
    assert re.search(r"\| TA-SegNet \| ours, fold 0\+1: 2 volumes \| .*70.0±14.14 \|", text)
    assert "phantoms" in text
    assert "FCN | ours" not in text  # not trained, not shown
    assert '"Table I, ablation of TA-SegNet",V2,ours,Dice,,,' in table_i.as_csv()  # null, not 0
    assert "| V6 | paper |  | x | x |  |  | 57.1±0.33 |" in table_i.as_markdown()


def test_second_data_set_gives_table_iii() -> None:
    (table,) = paper_tables(metrics.summarise(folds()), "stacks", is_second_data_set=True)
    assert table.columns == ("Sensitivity", "Specificity", "Dice", "IoU")
    assert cells(table, "Inf-Net", "paper")["Dice"] == (86.9, 0.34)
    assert cells(table, "Unet", "ours")["Specificity"] is not None


def test_printed_tables_have_a_value_for_every_row_and_column() -> None:
    """Every network of Tables II to IV has a figure in every column; the best Dice is
    TA-SegNet's.
    """
    assert (
        {len(each) for each in TABLE_II.values()}
        == {len(each) for each in TABLE_III.values()}
        == {4}
    )
    assert {len(each) for each in TABLE_IV.values()} == {12}
    for table in (TABLE_II, TABLE_III):
        assert max(table, key=lambda name: table[name][2]) == "TA-SegNet"


@pytest.mark.parametrize(
    "found", [GRADED, [row("n", "normal", 0.1)]], ids=["all grades", "one volume"]
)
def test_plots_of_incomplete_rows_are_pictures(found: list[Row]) -> None:
    judged = metrics.classification(found)
    history = [
        {"epoch": 0.0, "best_epoch": 0.0, "train_loss": 1.0, "val_dice": 0.5, "alpha/x": 0.5}
    ]
    for picture in (
        plots.confusion("t", judged), plots.roc("t", found, judged), plots.reliability("t", judged),
        plots.curves("t", history),
    ):  # fmt: skip
        assert picture.startswith(b"\x89PNG")
    for table in paper_tables(metrics.summarise(folds()), "x", is_second_data_set=False):
        assert plots.bars(table).startswith(b"\x89PNG")


CHAMPION = {"dice": 0.6, "normal_vs_mild_sensitivity": 0.8, "normal_vs_mild_auc": 0.9}


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ({}, []),
        ({"dice": 0.7}, []),
        ({"dice": 0.591}, []),  # within its margin
        ({"dice": 0.58}, ["dice"]),
        ({"dice": 0.9, "normal_vs_mild_auc": 0.8}, ["normal_vs_mild_auc"]),
        ({"normal_vs_mild_sensitivity": None}, ["normal_vs_mild_sensitivity"]),
    ],
)
def test_challenger_below_margin_in_one_metric_is_worse(
    change: dict[str, float | None], worse: list[str]
) -> None:
    challenger = {
        name: value for name, value in {**CHAMPION, **change}.items() if value is not None
    }
    compared = compare(challenger, CHAMPION, Margins())
    assert [each.metric for each in compared if not each.is_no_worse] == worse


def test_margins_can_be_changed() -> None:
    strict = replace(Margins(), dice=0.0)
    (first, *_) = compare({**CHAMPION, "dice": 0.599}, CHAMPION, strict)
    assert not first.is_no_worse


def test_gallery_chooses_best_median_and_worst_of_large_lesions() -> None:
    many = [
        row("a", counts=((90, 10, 10, 0), (60, 40, 40, 0), (1, 0, 3, 96))),
        row("b", counts=((10, 90, 90, 0),)),
    ]
    chosen = gallery.choose(many)
    assert {rank: (shown.volume, shown.slice_index) for rank, shown in chosen.items()} == {
        "best": ("a", 0), "median": ("a", 1), "worst": ("b", 0),
    }  # fmt: skip
    assert chosen["best"].dice == pytest.approx(0.9)
    assert gallery.choose([row("c")]) == {}
    # Slices that were not prepared cannot be drawn.
    drawable = {"a": (1,), "b": (0,)}
    assert gallery.choose(many, drawable)["best"].slice_index == 1


def test_curves_leave_out_metrics_that_are_nan() -> None:
    """As the validation of a training that held nothing back: its panel would be empty."""
    history = [{"train_loss": 0.5, "val_dice": math.nan, "alpha/encoder": 0.5, "best_epoch": 0.0}]
    measured = [{**history[0], "val_dice": 0.7}]
    widths = [Image.open(BytesIO(plots.curves("V7", each))).width for each in (history, measured)]
    assert widths[0] * 3 == widths[1] * 2

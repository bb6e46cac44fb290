"""Evaluation as deployed: the counts are those of the mask that screening measures."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from screened_series import BrightnessPredictor, screened
from stage_rows import CONFIG, WINDOW

from covtanet.ct.volume import Volume
from covtanet.data.prepared import PreparedVolume, Samples
from covtanet.data.source import SourceVolume
from covtanet.evaluation.deployed import evaluate_source
from covtanet.evaluation.rows import (
    INPUT_GRID,
    SOURCE_GRID,
    EvaluatedModel,
    evaluate_prepared,
    new_row,
)
from covtanet.inference.predictor import Prediction
from covtanet.model.description import BurdenDiagnosis, Readout
from covtanet.phantoms.phantom import Phantom

VOLUME = PreparedVolume(
    key="k", volume_path="v.nii.gz", patient="p", intensity="hu", source_digest="d"
)
ROW = new_row(VOLUME, "V8", 0, SOURCE_GRID)


def model(predictor: Any = None, **values: Any) -> EvaluatedModel:
    settings = {"readout": Readout(), "slice_step_mm": CONFIG.slice_step_mm, **values}
    return EvaluatedModel(predictor=predictor or BrightnessPredictor(), window=WINDOW, **settings)


def source(volume: Volume, lesion: np.ndarray) -> SourceVolume:
    return SourceVolume(ct=volume, intensity="hu", lesion=lesion, lung=None)


class NoDiagnosis(BrightnessPredictor):
    """A predictor whose diagnosis was not trained."""

    def predict(self, slices: np.ndarray) -> Prediction:
        return replace(super().predict(slices), p_infected=None, p_severe=None)


class Everywhere:
    """A predictor that marks every pixel with one probability."""

    def __init__(self, probability: float) -> None:
        self.level = round(254 * probability)

    def predict(self, slices: np.ndarray) -> Prediction:
        levels = np.full(slices.shape, self.level, np.uint8)
        return Prediction(lesion_levels=levels, p_infected=0.5, p_severe=0.5)


def test_counts_are_of_the_mask_that_screening_measures(mild_volume: Volume, mild: Phantom) -> None:
    columns, measured = screened(mild_volume)
    row = evaluate_source(model(), ROW, source(mild_volume, mild.lesion_mask)).row
    marked = measured.involvement.lesion_mask
    true_positives = np.count_nonzero(marked & mild.lesion_mask, axis=(1, 2))
    assert row["tp"] == true_positives[row["slice"]].tolist()
    assert sum(row["tp"]) + sum(row["fp"]) == np.count_nonzero(marked)
    assert sum(row["tp"]) + sum(row["fn"]) == np.count_nonzero(mild.lesion_mask)
    assert row["involvement"] == columns["involvement"]
    assert row["p_infected"] == columns["p_infected"]
    assert row["grid"] == "source"


def test_pixels_are_those_of_the_source(mild_volume: Volume, mild: Phantom) -> None:
    """A slice of 128 x 128, read by a network of 64 x 64."""
    small = replace(model(), window=replace(WINDOW, size_px=64))
    row = evaluate_source(small, ROW, source(mild_volume, mild.lesion_mask)).row
    totals = np.sum([row[name] for name in ("tp", "fp", "fn", "tn")], axis=0)
    assert set(totals.tolist()) == {128 * 128}


def test_lung_mask_removes_marks_outside_lungs_and_cavity(
    mild_volume: Volume, mild: Phantom
) -> None:
    """A network that marks everything: without the lung mask no pixel is a true negative."""
    row = evaluate_source(model(Everywhere(1.0)), ROW, source(mild_volume, mild.lesion_mask)).row
    assert sum(row["tn_unmasked"]) == 0
    assert sum(row["tn"]) > 0.5 * 128 * 128 * len(row["slice"])
    assert sum(row["tp"]) <= sum(row["tp_unmasked"])
    assert sum(row["fn_unmasked"]) == 0


def test_lesion_on_a_slice_without_lung_is_missed(mild_volume: Volume, mild: Phantom) -> None:
    _, measured = screened(mild_volume)
    has_lung = measured.masks.lungs.lung_mask.any(axis=(1, 2))
    lesion = mild.lesion_mask.copy()
    beyond = int(np.flatnonzero(~has_lung)[0])
    lesion[beyond, 60:63, 60:64] = True
    row = evaluate_source(model(Everywhere(1.0)), ROW, source(mild_volume, lesion)).row
    position = row["slice"].index(beyond)
    assert len(row["slice"]) == np.count_nonzero(has_lung) + 1
    for suffix in ("", "_unmasked"):
        counts = [row[f"{name}{suffix}"][position] for name in ("tp", "fp", "fn", "tn")]
        assert counts == [0, 0, 12, 128 * 128 - 12]


@pytest.mark.parametrize(("probability", "is_marked"), [(0.29, False), (0.31, True)])
def test_threshold_is_that_of_the_model(
    probability: float, is_marked: bool, mild_volume: Volume, mild: Phantom
) -> None:
    readout = Readout(lesion_threshold=0.3)
    evaluated = model(Everywhere(probability), readout=readout)
    row = evaluate_source(evaluated, ROW, source(mild_volume, mild.lesion_mask)).row
    assert (sum(row["tp"]) > 0) is is_marked


def test_volume_that_screening_rejects_has_a_reason_and_all_lesion_missed(
    mild_volume: Volume, mild: Phantom
) -> None:
    """Soft tissue throughout: no lung is found."""
    solid = replace(mild_volume, hu=np.maximum(mild_volume.hu, 0))
    row = evaluate_source(model(), ROW, source(solid, mild.lesion_mask)).row
    assert row["reason"] == "no_lung"
    assert sum(row["fn"]) == np.count_nonzero(mild.lesion_mask)
    assert sum(row["tp"]) == sum(row["fp"]) == 0
    assert row["p_infected"] is None


def test_diagnosis_by_burden_follows_from_the_predicted_involvement(
    mild_volume: Volume, mild: Phantom
) -> None:
    burden = BurdenDiagnosis(intercept=-2.0, slope=90.0)
    evaluated = model(NoDiagnosis(), readout=Readout(burden=burden))
    row = evaluate_source(evaluated, ROW, source(mild_volume, mild.lesion_mask)).row
    columns, _ = screened(mild_volume, NoDiagnosis(), replace(CONFIG, burden=burden))
    assert row["p_infected"] == columns["p_infected"] == burden.p_infected(row["involvement"])
    assert row["p_severe"] is None


class MarksWithNeighbours:
    """A predictor that marks every pixel if it gets several slices at once."""

    def predict(self, slices: np.ndarray) -> Prediction:
        levels = np.full(slices.shape, 254 if len(slices) > 1 else 0, np.uint8)
        return Prediction(lesion_levels=levels, p_infected=0.5, p_severe=0.5)


@pytest.mark.parametrize(("is_continuous", "num_marked"), [(True, 16), (False, 0)])
def test_single_slices_are_predicted_one_by_one_without_diagnosis(
    is_continuous: bool, num_marked: int
) -> None:
    volume = replace(VOLUME, is_continuous=is_continuous, slices=(0, 1))
    samples = Samples(levels=np.zeros((2, 4, 4), np.uint16), lesion=np.ones((2, 4, 4), np.uint8))
    row = new_row(volume, "V8", 0, INPUT_GRID)
    evaluation = evaluate_prepared(model(MarksWithNeighbours()), row, volume, samples)
    assert evaluation.row["tp"] == [num_marked, num_marked]
    assert evaluation.row["tp_unmasked"] is None
    assert (evaluation.row["p_infected"] is not None) is is_continuous


def test_network_that_marks_no_lesion_has_no_counts(mild_volume: Volume, mild: Phantom) -> None:
    evaluation = evaluate_source(model(segments=False), ROW, source(mild_volume, mild.lesion_mask))
    assert evaluation.row["tp"] is None
    assert evaluation.row["tp_unmasked"] is None
    assert evaluation.row["involvement"] is None
    assert evaluation.truth is None

"""Differences of an engine from float32, worked by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from screened_series import BrightnessPredictor
from stage_rows import CONFIG, WINDOW

from covtanet.ct.volume import Volume
from covtanet.data.source import SourceVolume
from covtanet.evaluation.engine_difference import EngineResult, compare_engines, run_engine
from covtanet.evaluation.rows import EvaluatedModel
from covtanet.inference.predictor import Prediction
from covtanet.model.description import Readout
from covtanet.phantoms.phantom import Phantom

STATUS = (None, "infected", None, "mild")
RESULT = EngineResult(dice=0.8, involvement=0.1, lesion_px=100, num_slices=10, status=STATUS)


def other(**values: Any) -> EngineResult:
    return replace(RESULT, **values)


def test_difference_is_the_mean_over_volumes() -> None:
    float32 = [RESULT, other(dice=0.6, involvement=0.3, lesion_px=200, num_slices=30)]
    results = [
        other(dice=0.7, involvement=0.102, lesion_px=110),
        other(dice=0.68, involvement=0.294, lesion_px=180, num_slices=30),
    ]
    found = compare_engines(results, float32, ["b"])
    assert found.mean_dice == pytest.approx(0.69)
    assert found.mean_dice_float32 == pytest.approx(0.7)
    assert found.dice_loss == pytest.approx(0.01)
    assert found.mean_involvement_difference == pytest.approx(0.004)
    assert found.max_involvement_difference == pytest.approx(0.006)
    assert found.lesion_volume_ratio == pytest.approx(1.0)  # (1.1 + 0.9) / 2
    assert (found.num_volumes, found.num_slices, found.data) == (2, 40, ("b",))
    assert found.num_status_changes == 0


@pytest.mark.parametrize(
    "change",
    [
        {"status": ("no_lung", None, None, None)},
        {"status": (None, "normal", None, "mild")},
        {"status": (None, "infected", None, "severe")},
        {"involvement": None},
        {"dice": None},
    ],
)
def test_other_conclusion_is_a_status_change(change: dict[str, Any]) -> None:
    assert compare_engines([other(**change)], [RESULT], []).num_status_changes == 1


def test_values_that_no_volume_has_are_null_and_not_within_bounds() -> None:
    nothing = other(dice=None, involvement=None, lesion_px=0)
    found = compare_engines([nothing], [nothing], [])
    assert (found.mean_dice, found.dice_loss, found.mean_involvement_difference) == (None,) * 3
    assert (found.max_involvement_difference, found.lesion_volume_ratio) == (None, None)
    assert not found.is_within_bounds


class Brighter(BrightnessPredictor):
    """Marks everything, as a broken engine might."""

    def predict(self, slices: np.ndarray) -> Prediction:
        found = super().predict(slices)
        return replace(found, lesion_levels=np.full_like(found.lesion_levels, 254))


def test_engine_is_measured_as_screening_measures(mild_volume: Volume, mild: Phantom) -> None:
    source = SourceVolume(ct=mild_volume, intensity="hu", lesion=mild.lesion_mask, lung=None)

    def model(predictor: Any) -> EvaluatedModel:
        return EvaluatedModel(
            predictor=predictor,
            window=WINDOW,
            readout=Readout(),
            slice_step_mm=CONFIG.slice_step_mm,
        )

    good, broken = (
        run_engine(model(each), "k", source) for each in (BrightnessPredictor(), Brighter())
    )
    assert good.involvement is not None
    assert good.dice is not None
    assert good.status == (None, "infected", "mild", "mild")
    assert broken.involvement == pytest.approx(1.0)
    assert broken.status[3] == "severe"
    assert not compare_engines([broken], [good], []).is_within_bounds
    assert compare_engines([good], [good], []).is_within_bounds

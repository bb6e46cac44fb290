"""Records of series that were screened by a predictor of bright pixels."""

from typing import Any

import numpy as np
from stage_rows import CONFIG, WINDOW

from covtanet.ct.volume import Volume
from covtanet.decoding import prepare as decode
from covtanet.inference.predictor import Prediction
from covtanet.ledger.record import ScreeningRecord
from covtanet.screening import stages
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.records import PredictedSeries, PreparedSeries


def columns_of(series: PredictedSeries) -> dict[str, Any]:
    """The columns of a series behind the last stage."""
    return stages.measure_series(series, WINDOW, CONFIG).record.to_columns()


def new_record(**values: Any) -> ScreeningRecord:
    return ScreeningRecord(
        series_key="k", source_uri="/a", source_format="nifti", source_version="v",
        num_objects=1, num_bytes=7, started_at=0.0, **values,
    )  # fmt: skip


class BrightnessPredictor:
    """A predictor without training: ground glass by its HU, infected if it covers enough of what it
    sees.
    """

    def predict(self, slices: np.ndarray) -> Prediction:
        hu = slices / 65535 * 1400.0 - 1000
        is_lesion = (hu > -680) & (hu < -300)
        share = float(is_lesion.mean())
        return Prediction(
            lesion_levels=(is_lesion * 254).astype(np.uint8),
            p_infected=min(1.0, 25 * share),
            p_severe=0.0,
        )


def screened(
    volume: Volume, predictor: Any = None, config: ScreeningConfig = CONFIG
) -> tuple[dict[str, Any], Any]:
    """The record of a volume that was read, and what was measured."""
    masks, chosen, slices = decode.prepare_volume(volume, WINDOW, config.slice_step_mm)
    row = PreparedSeries(
        record=new_record(num_slices_segmented=len(chosen)),
        slices=slices,
        chosen=chosen,
        masks=masks.pack(),
    )
    measured = stages.measure_series(
        stages.predict_series(row, predictor or BrightnessPredictor()), WINDOW, config
    )
    return measured.record.to_columns(), measured

"""Series between the stages of screening."""

import numpy as np

from covtanet.ledger.record import ScreeningRecord
from covtanet.screening.records import PredictedSeries, PreparedSeries


def predicted() -> PredictedSeries:
    record = ScreeningRecord(
        series_key="k",
        source_uri="/a",
        source_format="nifti",
        source_version="v",
        num_objects=1,
        num_bytes=1,
        started_at=0.0,
    )
    prepared = PreparedSeries(
        record=record,
        slices=np.ones((3, 32, 32), np.uint16),
        chosen=np.arange(3),
        masks=b"masks",
    )
    return PredictedSeries(prepared=prepared, lesion_levels=np.ones((3, 32, 32), np.uint8))


def test_series_without_slices_keeps_what_measuring_reads() -> None:
    series = predicted()
    light = PredictedSeries.from_row(series.without_slices().to_row())
    assert light.prepared.slices.shape == (0, 32, 32)
    assert light.prepared.masks == b"masks"
    assert light.record == series.record
    np.testing.assert_array_equal(light.prepared.chosen, series.prepared.chosen)
    np.testing.assert_array_equal(light.lesion_levels, series.lesion_levels)


def test_slices_of_the_series_itself_stay() -> None:
    series = predicted()
    series.without_slices()
    assert len(series.prepared.slices) == 3

"""Series that exist in a manifest alone, and stages that make records of them without pixels."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from covtanet.archive.manifest import Series
from covtanet.errors import Reason, Status
from covtanet.ledger.record import Refusal, ScreeningRecord
from covtanet.ledger.run import Run
from covtanet.screening.records import PredictedSeries, PreparedSeries
from covtanet.screening.stages import new_record
from covtanet.screening.workers import BeginAttempt
from covtanet.storage import ObjectInfo

SIZE_PX = 8
# One series of so many is rejected.
REJECTED_OF = 100
NO_LUNG = Refusal(status=Status.REJECTED, reason=Reason.NO_LUNG, detail="no lung")
Row = dict[str, Any]


def run_of(folder: Path) -> Run:
    """Return the run that screens the series, with its ledger in a folder."""
    return Run(
        archive=str(folder / "archive"),
        ledger=str(folder / "ledger"),
        run_date=date(2025, 1, 1),
        model_name="synthetic",
        model_version="1",
        model_digest="0" * 64,
        config_digest="1" * 64,
        software_version="0.1.0+synthetic",
    )


def series_rows(first: int, num_series: int) -> Iterator[Row]:
    """Yield rows of a manifest: series of one object each, numbered from ``first``."""
    for number in range(first, first + num_series):
        path = f"{number // 1000:04d}/study-{number:07d}/ct.nii.gz"
        objects = (ObjectInfo(path, 30_000_000, f"{number:032x}"),)
        yield Series(source_path=path, source_format="nifti", objects=objects).to_row()


def finished(record: ScreeningRecord) -> ScreeningRecord:
    """Return the record of a screened series of usual size, or of a rejected one.

    Its numbers follow from the series key, so that each run has the same rows.
    """
    number = int(record.series_key[:8], 16)
    read = replace(record, source_digest=2 * record.series_key, decode_s=1.0)
    if number % REJECTED_OF == 0:
        return read.refused(NO_LUNG)
    return replace(
        read,
        status=Status.SCREENED,
        num_slices=120,
        num_slices_segmented=60,
        spacing_z_mm=2.5,
        spacing_y_mm=0.7,
        spacing_x_mm=0.7,
        involvement=(number % 9973) / 9973,
        lesion_volume_ml=100.0,
        lung_volume_ml=4000.0,
        lesion_slices=12,
        severity_by_involvement="mild",
        predict_s=1.0,
        engine="openvino-int8",
    )


class Decoder:
    """Returns a series of one tiny slice."""

    def __init__(self, run: Run, begin_attempt: BeginAttempt) -> None:
        self.run = run
        self.begin_attempt = begin_attempt

    def __call__(self, row: Row) -> Row:
        """Turn a row of the manifest into a prepared series."""
        self.begin_attempt(row["series_key"], "decode")
        series = PreparedSeries(
            record=new_record(row, self.run.archive),
            slices=np.zeros((1, SIZE_PX, SIZE_PX), np.uint16),
            chosen=np.zeros(1, np.int64),
            masks=b"",
        )
        return series.to_row()


class Predictor:
    """Returns a lesion map of the tiny slice."""

    def __init__(self, begin_attempt: BeginAttempt) -> None:
        self.begin_attempt = begin_attempt

    def __call__(self, row: Row) -> Row:
        """Turn a prepared series into a predicted one."""
        series = PreparedSeries.from_row(row)
        self.begin_attempt(series.record.series_key, "predict")
        levels = np.zeros(series.slices.shape, np.uint8)
        return PredictedSeries(prepared=series, lesion_levels=levels).without_slices().to_row()


def measure(row: Row, begin_attempt: BeginAttempt) -> Row:
    """Return the record of a finished series."""
    record = PredictedSeries.from_row(row).record
    begin_attempt(record.series_key, "measure")
    return finished(record).to_columns()

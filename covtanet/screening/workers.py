"""The workers of a screening, one series at a time.

Each counts an attempt before it touches a series and is ended by a watchdog if a series holds it
too long: Ray then starts another worker with the same series, until the attempts are used up.
"""

import faulthandler
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from covtanet import storage
from covtanet.ct.window import WindowConfig
from covtanet.decoding.sandbox import Sandbox
from covtanet.ledger.finished_rows import check_row
from covtanet.ledger.record import ScreeningRecord
from covtanet.ledger.run import Run
from covtanet.machine import num_cores
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.records import MeasuredSeries, PredictedSeries, PreparedSeries
from covtanet.screening.stages import (
    WORKER_DIED,
    ended_before_prediction,
    internal_error,
    measure_series,
    new_record,
    predict_series,
    prepare_series,
    without_prediction,
)

Row = dict[str, Any]
# Counts an attempt of this worker at a series (key, stage); returns whether it may be made.
BeginAttempt = Callable[[str, str], bool]
# The file descriptor: faulthandler writes to it without Python's streams.
STDERR = 2


class Decoder:
    """Decodes series in a sandbox.

    An actor of its own: few processes reach the memory that decoding takes at its peak.
    """

    def __init__(
        self,
        run: Run,
        window: WindowConfig,
        config: ScreeningConfig,
        begin_attempt: BeginAttempt,
    ) -> None:
        self.run = run
        self.window = window
        self.config = config
        self.begin_attempt = begin_attempt
        self.sandbox = Sandbox(window, config.slice_step_mm, config.decode_limits)

    def __call__(self, row: Row) -> Row:
        """Turn a row of the manifest into a prepared series."""
        # Before the work: a series that kills this process has been counted.
        if not self.begin_attempt(row["series_key"], "decode"):
            record = new_record(row, self.run.archive)
            return ended_before_prediction(record.refused(WORKER_DIED), self.window).to_row()
        with worker_timeout(self.config.worker_timeout_s):
            prepared = prepare_series(
                row,
                archive=self.run.archive,
                window=self.window,
                config=self.config,
                decoder=self.sandbox,
            )
        return prepared.to_row()


class PredictorWorker:
    """Holds the model and predicts prepared series.

    Only this worker imports torch; those that decode or measure start seconds sooner without it.
    """

    def __init__(
        self,
        run: Run,
        config: ScreeningConfig,
        begin_attempt: BeginAttempt,
        num_threads: int,
        keeps_slices: bool,
    ) -> None:
        """Load the model. keeps_slices: measuring draws pictures of the slices."""
        from covtanet.inference.predictor import Predictor
        from covtanet.model.model_files import fetch_model
        from covtanet.model.saved_model import load_model

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            uri = run.work_uri("model")
            fetch_model(folder, partial(storage.download_files, uri, target=folder))
            # The digest is checked: a run has one model on all nodes.
            model = load_model(folder, run.model_digest)
        self.config = config
        self.begin_attempt = begin_attempt
        self.keeps_slices = keeps_slices
        self.predictor = Predictor(
            model,
            engine=config.engine,
            num_threads=min(num_threads, num_cores()),
            max_batch_slices=config.max_batch_slices,
            flips=config.flips,
        )

    def __call__(self, row: Row) -> Row:
        """Turn a prepared series into a predicted one."""
        series = PreparedSeries.from_row(row)
        if not len(series.slices):  # it has ended, which is no attempt
            return without_prediction(series).to_row()
        if not self.begin_attempt(series.record.series_key, "predict"):
            record = series.record.refused(WORKER_DIED)
            return without_prediction(replace(series, record=record)).to_row()
        with worker_timeout(self.config.worker_timeout_s):
            predicted = predict_series(series, self.predictor)
        if not self.keeps_slices:
            # Half of the row's bytes, which nobody would read.
            predicted = predicted.without_slices()
        return predicted.to_row()


def measure_and_keep(
    row: Row,
    run: Run,
    window: WindowConfig,
    config: ScreeningConfig,
    results: str,
    begin_attempt: BeginAttempt,
) -> ScreeningRecord:
    """Measure a predicted series and store its pictures if results are kept.

    Returns a record that fits the ledger.
    """
    series = PredictedSeries.from_row(row)
    # A series that has ended already is no attempt.
    is_prepared = len(series.lesion_levels) > 0
    is_exhausted = is_prepared and not begin_attempt(series.record.series_key, "measure")
    with worker_timeout(config.worker_timeout_s):
        if is_exhausted:
            measured = MeasuredSeries(record=series.record.refused(WORKER_DIED))
        else:
            measured = measure_series(series, window, config)
        # Pictures first: a series with a row is finished and would not get them later.
        if results:
            write_results(series, measured, window, storage.join(results, run.run_id))
        return checked_record(run, measured.record)


def write_results(
    series: PredictedSeries, measured: MeasuredSeries, window: WindowConfig, folder: str
) -> None:
    """Write masks and previews of a screened series."""
    if measured.masks is None or measured.involvement is None:
        return
    # Only here: nibabel and Pillow's fonts take a second of a worker's start.
    from covtanet import drawing

    prepared = series.prepared
    files = drawing.result_files(
        prepared.slices, prepared.chosen, measured.masks, measured.involvement, window
    )
    for name, data in files:
        storage.write_bytes(storage.join(folder, series.record.series_key, name), data)


def checked_record(run: Run, record: ScreeningRecord) -> ScreeningRecord:
    """Return the record if its row fits the ledger's schema.

    Any other ends as ``internal_error``; it does not end the run.
    """
    try:
        check_row(run, record)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        refusal = internal_error(record.series_key, error)
        return record.identity().refused(refusal)
    return record


@contextmanager
def worker_timeout(timeout_s: float) -> Iterator[None]:
    """End this process if the block takes longer; its log gets the line in which it hung."""
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()

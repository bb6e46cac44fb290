"""One phase of a screening of series that exist in the manifest alone: ``benchmarks.scale``.

python -m benchmarks.synthetic_run FOLDER NUM_SERIES {screen,view} NOTES [--die-at ROWS]

Stages are replaced by functions that count an attempt and return records of usual size, without
pixels; plan, Ray Data, finished rows, commit and view are those of a real run. Adds a line of JSON
to NOTES: seconds, and the peak memory of the driver and of Ray's head. ``--die-at`` notes and then
kills this process when so many rows are stored.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from covtanet import ray_data, runtime
from covtanet.archive.manifest import IGNORED_SCHEMA, Series
from covtanet.commands import ledger as ledger_command
from covtanet.errors import Status
from covtanet.ledger import finished_rows
from covtanet.ledger.commit import commit_run
from covtanet.ledger.finished_rows import finished_keys
from covtanet.ledger.run import Run, begin_run
from covtanet.ledger.work import write_manifest
from covtanet.screening import pipeline
from covtanet.screening.attempt_counter import AttemptCounter
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.plan import make_plan
from covtanet.screening.records import PredictedSeries, PreparedSeries
from covtanet.screening.stages import new_record
from covtanet.screening.workers import BeginAttempt
from covtanet.storage import ObjectInfo

SAMPLE_EVERY_S = 0.5
# Ray's own processes of a head, by parts of their command lines.
HEAD = ("gcs_server", "raylet/raylet", "dashboard")
SIZE_PX = 8
Row = dict[str, Any]


class Decoder:
    """Returns a series of one tiny slice."""

    def __init__(self, run: Run, begin_attempt: BeginAttempt) -> None:
        self.run = run
        self.begin_attempt = begin_attempt

    def __call__(self, row: Row) -> Row:
        """Turn a row of the manifest into a prepared series."""
        self.begin_attempt(row["series_key"], "decode")
        record = replace(
            new_record(row, self.run.archive),
            source_digest=2 * row["series_key"],
            num_slices=120,
            num_slices_segmented=60,
            spacing_z_mm=2.5,
            spacing_y_mm=0.7,
            spacing_x_mm=0.7,
            decode_s=1.0,
        )
        slices = np.zeros((1, SIZE_PX, SIZE_PX), np.uint16)
        return PreparedSeries(
            record=record, slices=slices, chosen=np.zeros(1, np.int64), masks=b""
        ).to_row()


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
    """Return the record of a screened series, or of one of a hundred that is rejected."""
    record = PredictedSeries.from_row(row).record
    begin_attempt(record.series_key, "measure")
    # Of the key, so that each run has the same rows.
    number = int(record.series_key[:8], 16)
    if number % 100 == 0:
        columns = record.to_columns()
        return {**columns, "status": "rejected", "reason": "no_lung", "reason_detail": "no lung"}
    return replace(
        record,
        status=Status.SCREENED,
        involvement=(number % 9973) / 9973,
        lesion_volume_ml=100.0,
        lung_volume_ml=4000.0,
        lesion_slices=12,
        severity_by_involvement="mild",
        predict_s=1.0,
        engine="openvino-int8",
    ).to_columns()


class Peaks:
    """The largest memory of this process and of Ray's head, sampled in a thread."""

    def __init__(self) -> None:
        self.driver_mb = 0.0
        self.head_mb = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        driver = psutil.Process()
        while not self._over.wait(SAMPLE_EVERY_S):
            head = [each for each in driver.children(recursive=True) if _is_of_head(each)]
            # Unshared: the object store is bounded by itself.
            self.driver_mb = max(self.driver_mb, _unshared_mb(driver))
            self.head_mb = max(self.head_mb, sum(map(_unshared_mb, head)))

    def __enter__(self) -> "Peaks":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def _is_of_head(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return any(part in command for part in HEAD)


def _unshared_mb(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().uss) / 1e6
    except psutil.Error:
        return 0.0


class Phases:
    """Seconds of each phase and peaks of memory, noted at the end or before a death."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes
        self.peaks = Peaks()
        self._seconds: dict[str, float] = {}
        self._started: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Measure how long a phase takes."""
        self._started[phase] = time.monotonic()
        yield
        self._seconds[phase] = time.monotonic() - self._started.pop(phase)

    def note(self) -> None:
        """Write what was measured so far; a phase that goes on counts up to now."""
        now = time.monotonic()
        going_on = {phase: now - started for phase, started in self._started.items()}
        seconds = {phase: round(value, 1) for phase, value in {**self._seconds, **going_on}.items()}
        memory = {
            "driver_mb": round(self.peaks.driver_mb),
            "head_mb": round(self.peaks.head_mb),
        }
        with self.notes.open("a") as file:
            file.write(json.dumps({**seconds, **memory}) + "\n")


def run_of(folder: Path) -> Run:
    """Return the run whose series the benchmark makes up."""
    return Run(
        archive=str(folder / "archive"),
        ledger=str(folder / "ledger"),
        run_date=date(2026, 11, 1),
        model_name="synthetic",
        model_version="1",
        model_digest="0" * 64,
        config_digest="1" * 64,
        software_version="0.1.0+synthetic",
    )


def series_rows(num_series: int) -> Iterator[Row]:
    """Yield the manifest: series of one object each."""
    for number in range(num_series):
        path = f"{number // 1000:04d}/study-{number:07d}/ct.nii.gz"
        objects = (ObjectInfo(path, 30_000_000, f"{number:032x}"),)
        yield Series(source_path=path, source_format="nifti", objects=objects).to_row()


def screen(folder: Path, num_series: int, phases: Phases, die_at: int) -> None:
    """Make or continue the run. die_at: rows after which this process kills itself; 0 for never."""
    run = run_of(folder)
    with phases.timed("start of Ray"):
        runtime.connect()
    with phases.timed("plan"):
        begin_run(run)
        if not Path(run.work_uri("manifest.parquet")).exists():
            ignored = folder / "ignored.parquet"
            pq.write_table(IGNORED_SCHEMA.empty_table(), ignored)
            write_manifest(run, series_rows(num_series), ignored)
        finished = finished_keys(run)
        plan = make_plan(run, ScreeningConfig(), finished)
    if die_at:
        threading.Thread(target=_die, args=(run, die_at, phases), daemon=True).start()
    with phases.timed("screen"):
        ray_data.configure(preserve_order=False)
        pipeline.limit_object_store(160, plan.workers)
        begin_attempt = AttemptCounter(run).begin
        stages = pipeline.Stages(
            decoder=Decoder,
            decoder_arguments={"run": run, "begin_attempt": begin_attempt},
            predictor=Predictor,
            predictor_arguments={"begin_attempt": begin_attempt},
            measure=MeasureStage(begin_attempt),
        )
        # The series are called 30 MB large, as they usually are, but nothing is read of them.
        grouped = replace(plan, num_bytes=plan.num_series)
        pipeline.screen_with(run, grouped, stages, finished)
    with phases.timed("commit"):
        counts = commit_run(run)
    if counts.series != num_series:
        raise SystemExit(f"{counts.series} rows, expected {num_series}")


class MeasureStage:
    """``measure`` with its counter of attempts."""

    def __init__(self, begin_attempt: BeginAttempt) -> None:
        self.begin_attempt = begin_attempt

    def __call__(self, row: Row) -> Row:
        """Finish a series."""
        return measure(row, self.begin_attempt)


def _die(run: Run, num_rows: int, phases: Phases) -> None:
    while finished_rows.num_finished(run.work_uri()) < num_rows:
        time.sleep(1)
    phases.note()
    os.kill(os.getpid(), signal.SIGKILL)


def view(folder: Path, phases: Phases) -> None:
    """Write the newest rows of the ledger to a file, as ``covtanet ledger view --out``."""
    with phases.timed("view"):
        ledger_command.main([run_of(folder).ledger, "view", "--out", str(folder / "view.parquet")])


def main() -> int:
    """Run one phase and print what it took."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("num_series", type=int)
    options.add_argument("phase", choices=("screen", "view"))
    options.add_argument("notes", type=Path)
    options.add_argument("--die-at", type=int, default=0)
    arguments = options.parse_args()
    phases = Phases(arguments.notes)
    with phases.peaks:
        if arguments.phase == "view":
            view(arguments.folder, phases)
        else:
            screen(arguments.folder, arguments.num_series, phases, arguments.die_at)
    phases.note()
    return 0


if __name__ == "__main__":
    sys.exit(main())

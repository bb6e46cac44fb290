"""A stage that hangs is ended with its worker after ``worker_timeout_s``.

Ray starts another worker; ``test_promises`` has the series that ends three and costs a row.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

# A worker's stage, called as Ray calls it, on an object, a prediction or masks that never come.
STAGE = """
import json, sys, threading
from datetime import date

import numpy as np

from covtanet.ct.window import WindowConfig
from covtanet.archive.manifest import Series
from covtanet.ledger.record import ScreeningRecord
from covtanet.ledger.run import Run
from covtanet.screening import workers
from covtanet.screening.records import PredictedSeries, PreparedSeries
from covtanet.screening.config import ScreeningConfig
from covtanet.storage import ObjectInfo

class Hanging:
    def predict(self, slices):
        threading.Event().wait()

    def find(self, *wanted):
        threading.Event().wait()

def begin_attempt(series_key, stage):
    return True

stage, folder = sys.argv[1:]
run = Run(
    archive=folder, ledger=f"{folder}/ledger", run_date=date(2026, 11, 23), model_name="m",
    model_version="1", model_digest="d", config_digest="c", software_version="0",
)
config, window = ScreeningConfig(worker_timeout_s=1), WindowConfig(size_px=128)
slices = np.zeros((1, 32, 32))
record = ScreeningRecord(
    series_key="k", source_uri="/a", source_format="nifti", source_version="v", num_objects=1,
    num_bytes=1, started_at=0.0,
)
common = {"record": record, "slices": slices, "chosen": np.array([0]), "masks": Hanging()}
if stage == "decode":
    objects = (ObjectInfo("pipe.nii", 1, "0"),)
    series = Series(source_path="pipe.nii", source_format="nifti", objects=objects)
    workers.Decoder(run, window, config, begin_attempt)(series.to_row())
elif stage == "predict":
    actor = workers.PredictorWorker.__new__(workers.PredictorWorker)
    actor.config, actor.predictor, actor.begin_attempt = config, Hanging(), begin_attempt
    actor(PreparedSeries(**common).to_row())
else:
    row = PredictedSeries(prepared=PreparedSeries(**common), lesion_levels=slices).to_row()
    workers.measure_and_keep(
        row, run=run, config=config, window=window, results="", begin_attempt=begin_attempt
    )
"""


@pytest.mark.parametrize(
    ("stage", "line"),
    [("decode", "prepare_series"), ("predict", "predict_series"), ("measure", "measure_series")],
)
def test_watchdog_ends_hanging_worker(stage: str, line: str, tmp_path: Path) -> None:
    """Its log says in which function it hung; to open a pipe without a writer takes for ever."""
    os.mkfifo(tmp_path / "pipe.nii")
    done = subprocess.run(
        [sys.executable, "-c", STAGE, stage, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Timeout (0:00:01)!" in done.stderr
    assert f"in {line}\n" in done.stderr

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
from covtanet.screening import ledger, pipeline
from covtanet.screening.stages import ScreeningConfig
from covtanet.storage import ObjectInfo

class Hanging:
    def predict(self, slices):
        threading.Event().wait()

    def find(self, *wanted):
        threading.Event().wait()

stage, folder = sys.argv[1:]
run = ledger.Run(
    archive=folder, ledger=f"{folder}/ledger", run_date=date(2026, 11, 23), model_name="m",
    model_version="1", model_digest="d", config_digest="c", software_version="0",
)
config, window = ScreeningConfig(worker_timeout_s=1), WindowConfig(size_px=128)
slices = np.zeros((1, 32, 32))
row = {
    "series_key": "k", "record": json.dumps({"series_key": "k", "qc_flags": []}),
    "chosen": np.array([0]), "slices": slices, "lesion_levels": slices, "masks": Hanging(),
}
if stage == "decode":
    objects = (ObjectInfo("pipe.nii", 1, "0"),)
    series = Series(source_path="pipe.nii", source_format="nifti", objects=objects)
    pipeline._DecoderActor(run, window, config)(series.to_row())
elif stage == "predict":
    actor = pipeline._PredictorActor.__new__(pipeline._PredictorActor)
    actor.run, actor.config, actor.predictor = run, config, Hanging()
    actor(row)
else:
    pipeline._measure_and_store(row, run=run, config=config, window=window, results="")
"""


@pytest.mark.parametrize(
    ("stage", "line"),
    [("decode", "decode_and_prepare"), ("predict", "predict"), ("measure", "measure")],
)
def test_worker_of_a_stage_that_hangs_is_ended(stage: str, line: str, tmp_path: Path) -> None:
    """Its log says in which function it hung; to open a pipe without a writer takes for ever."""
    os.mkfifo(tmp_path / "pipe.nii")
    done = subprocess.run(
        [sys.executable, "-c", STAGE, stage, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Timeout (0:00:01)!" in done.stderr
    assert f"in {line}\n" in done.stderr

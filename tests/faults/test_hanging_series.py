"""A series that hangs in every attempt costs one row, not the run.

Ray Data ends an execution in which nothing moves. It waits longer than all attempts of a series.
"""

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from running import S3, Cluster

from covtanet.ct import nifti
from covtanet.phantoms.encodings import nifti_grid
from covtanet.phantoms.phantom import Phantom

pytestmark = pytest.mark.faults

DATE = "2026-11-23"
# Shorter than one attempt.
RAY_DATA_TIMEOUT = {"RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "3"}
CONFIG = '[screening]\nengine = "eager"\nworker_timeout_s = 5\n'


@pytest.fixture
def arguments(s3: S3, model_folder: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run with one series, that hangs: after the listing a pipe took its place."""
    archive = tmp_path / "archive"
    archive.mkdir()
    config = tmp_path / "screening.toml"
    config.write_text(CONFIG)
    return [
        "--archive", str(archive), "--ledger", f"{s3.uri}/hanging", "--model", str(model_folder),
        "--config", str(config), "--run-date", DATE,
    ]  # fmt: skip


def test_hanging_series_ends_as_worker_died_and_the_run_is_committed(
    cluster: Cluster, s3: S3, arguments: list[str], mild: Phantom, tmp_path: Path
) -> None:
    series = tmp_path / "archive" / "chest.nii.gz"
    series.write_bytes(nifti.write(mild.hu, nifti_grid(mild)))
    cluster.run_job("screen.py", *arguments, "--plan")
    # To open a pipe without a writer takes for ever.
    series.unlink()
    os.mkfifo(series)
    hurried = Cluster({**cluster.environment, **RAY_DATA_TIMEOUT})
    # All series failed, above --max-failed.
    output = hurried.run_job("screen.py", *arguments, expect=4)
    assert "1 of 1 series" in output
    (path,) = (s3.folder / "hanging" / f"date={DATE}").glob("*.parquet")
    (row,) = pq.ParquetFile(path).read().to_pylist()
    assert (row["status"], row["reason"]) == ("failed", "worker_died")

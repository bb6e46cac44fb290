"""The screening job on a real Ray cluster: kill and continue, S3, submitted jobs, refusals."""

import re
import subprocess
import sys
from pathlib import Path

import duckdb
import highdicom as hd
import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from pacs import PASSWORD
from repository import ROOT
from running import Cluster
from screening_runs import Screening

from covtanet import storage
from covtanet.ledger.diff import differences
from infra.pacs.orthanc import INSTALL, is_installed, start_orthanc

ARCHIVE = "s3://bucket/archive"


def test_every_series_has_a_row_with_its_reason(screening: Screening) -> None:
    rows = {row["source_uri"]: row for row in screening.clean.to_pylist()}
    assert len(rows) == screening.clean.num_rows == len(screening.truth)
    for expected in screening.truth:
        row = rows[storage.join(ARCHIVE, str(expected["source_path"]))]
        assert (row["status"], row["reason"]) == (expected["status"], expected["reason"]), expected
        assert (row["source_digest"] is None) == (row["reason"] in ("container", "unreadable"))
    assert len({row["reason"] for row in rows.values() if row["reason"]}) == 17


def test_ledger_folder_is_read_by_pyarrow_and_duckdb(screening: Screening) -> None:
    folder = screening.bucket / "clean"
    assert pq.read_table(folder).num_rows == screening.clean.num_rows
    counted = duckdb.sql(f"select count(*) from read_parquet('{folder}/**/date=*/*.parquet')")
    assert counted is not None
    assert counted.fetchall() == [(screening.clean.num_rows,)]


def test_committed_run_started_again_changes_nothing(screening: Screening) -> None:
    (path,) = (screening.bucket / "clean").glob("date=*/*.parquet")
    before = path.read_bytes()
    assert "nothing to do" in screening.run("clean")
    assert path.read_bytes() == before


def test_killed_job_continues_to_an_equal_ledger(screening: Screening) -> None:
    """Killed half-way; make faults does it at 10, 50 and 90 %."""
    name = "killed"
    job = screening.start(name)
    job.wait_for(lambda: screening.rows_done(name) >= len(screening.truth) // 2)
    job.kill()
    assert not screening.is_committed(name), "a run that died may leave no ledger"
    before = {key: row["screened_at"] for key, row in screening.finished(name).items()}
    output = screening.run(name)
    assert f"continuing: {len(before)} of {len(screening.truth)} series are finished" in output
    assert len(list((screening.bucket / name / "_work").iterdir())) == 1
    table = screening.table(name)
    assert differences(screening.clean, table) == []
    # The rows that the dead run left stand in the ledger as they were: no finished series was
    # screened again.
    after = {row["series_key"]: row["screened_at"] for row in table.to_pylist()}
    assert {key: after[key] for key in before} == before


def test_plan_prints_series_and_freezes_the_manifest(screening: Screening) -> None:
    planned = screening.planned
    assert re.search(r"^series \(expected rows\) +25$", planned.output, re.MULTILINE)
    assert "CPUs, 0 GPUs: fits" in planned.output
    assert planned.has_manifest


def test_plan_screens_nothing(screening: Screening) -> None:
    assert screening.planned.num_rows == 0
    assert not screening.planned.is_committed


def test_run_names_ignored_objects_and_a_store_without_create(screening: Screening) -> None:
    assert "ignored, no series: 1 .txt" in screening.clean_output
    # rclone's S3 server ignores If-None-Match.
    assert "this store lets a PUT replace a file" in screening.clean_output


def test_submitted_job_refuses_relative_paths(cluster: Cluster, model_folder: Path) -> None:
    process = subprocess.run(
        [
            Path(sys.executable).with_name("ray"),
            "job",
            "submit",
            "--working-dir",
            ROOT,
            "--",
            "python",
            "jobs/screen.py",
            "--archive",
            "my/archive",
            "--ledger",
            "/tmp/x",
            "--model",
            str(model_folder),
        ],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    output = process.stdout + process.stderr
    assert process.returncode == 1
    assert "--archive my/archive is relative" in output
    assert "give the absolute path, /.../my/archive" in output


def test_wrong_arguments_return_3_before_reading(cluster: Cluster, model_folder: Path) -> None:
    jobs = []
    for changed, message in (
        ({"--model": "models:/nobody@champion"}, "is not in the registry"),
        ({"--model": "/nowhere"}, "expected a saved model"),
        ({"--archive": "s3://bucket/ledger/x", "--ledger": "s3://bucket/ledger"}, "must be apart"),
    ):
        usual = {
            "--archive": "s3://bucket/archive",
            "--ledger": "s3://bucket/no",
            "--model": str(model_folder),
        }
        arguments = [part for pair in {**usual, **changed}.items() for part in pair]
        jobs.append((cluster.start_job("screen.py", *arguments), message))
    for job, message in jobs:
        assert job.finish() == 3, job.output
        assert message in job.output
        assert "Traceback" not in job.output


def test_series_uids_are_in_no_log(screening: Screening, cluster: Cluster) -> None:
    uids = [row["series_uid"] for row in screening.clean.to_pylist() if row["series_uid"]]
    assert uids
    logs = [
        path
        for path in Path(cluster.environment["RAY_TMP"]).rglob("*")
        if path.is_file() and "logs" in path.parts
    ]
    assert logs
    text = b"".join(path.read_bytes() for path in logs if path.suffix in {".log", ".out", ".err"})
    assert not [uid for uid in uids if uid.encode() in text]


def test_export_writes_seg_and_sr_of_every_series(screening: Screening, cluster: Cluster) -> None:
    output = cluster.run_job(
        "export.py", "--ledger", "s3://bucket/clean", "--results", "s3://bucket/clean-results"
    )  # fmt: skip
    rows = [
        row
        for row in screening.clean.to_pylist()
        if row["status"] == "screened" and row["source_format"] == "dicom"
    ]
    assert f"{len(rows)} written" in output
    for row in rows:
        folder = screening.bucket / "clean-results" / row["run_id"] / row["series_key"]
        seg, report = (
            pydicom.dcmread(folder / name) for name in ("lesion.seg.dcm", "measurements.sr.dcm")
        )
        assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == row["series_uid"]
        assert (seg.Modality, report.Modality) == ("SEG", "SR")
        lesion = np.asarray(nib.load(folder / "lesion_mask.nii.gz").dataobj) > 0
        read = hd.seg.Segmentation.from_dataset(seg)
        uids = [
            each.ReferencedSOPInstanceUID
            for each in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        ]
        pixels = read.get_pixels_by_source_instance(uids, [1], assert_missing_frames_are_empty=True)
        assert int(pixels.sum()) == int(lesion.sum())


@pytest.mark.slow
def test_export_to_pacs_sends_every_series_once(
    screening: Screening, cluster: Cluster, tmp_path: Path
) -> None:
    """From results that are not written yet; then once more; then with a wrong password."""
    if not is_installed():
        pytest.skip(f"Orthanc is not installed: {INSTALL}")
    kept = screening.bucket / "clean-results"
    for path in kept.rglob("*_mask.nii.gz"):
        name = path.relative_to(kept).as_posix()
        storage.write_bytes(f"s3://bucket/sent-results/{name}", path.read_bytes())
    arguments = ["--ledger", "s3://bucket/clean", "--results", "s3://bucket/sent-results"]
    rows = [
        row
        for row in screening.clean.to_pylist()
        if row["status"] == "screened" and row["source_format"] == "dicom"
    ]
    pacs = start_orthanc(tmp_path / "orthanc", PASSWORD)
    try:
        for outcome in ("sent", "sent already"):
            output = cluster.run_job("export.py", *arguments, "--to", pacs.archive)
            assert f"{len(rows)} {outcome}" in output
        stored = pacs.request("GET", "studies").json()
        assert len(stored) == len({row["study_uid"] for row in rows})
    finally:
        pacs.service.stop()
    strange = start_orthanc(tmp_path / "strange", "another password")
    try:
        output = cluster.run_job("export.py", *arguments, "--to", strange.archive, expect=1)
        assert "AccessError" in output
        assert PASSWORD not in output
    finally:
        strange.service.stop()

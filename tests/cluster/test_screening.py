"""The screening job on a real Ray cluster: kill and continue, S3, submitted jobs, refusals."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, S3, Cluster

from covtanet import storage
from covtanet.data.phantom_archive import configs, write_archive
from covtanet.screening import ledger
from covtanet.screening.records import LEDGER_SCHEMA

DATE = "2026-11-23"
NUM_SOUND = 8


@dataclass(frozen=True)
class Archive:
    """An archive in S3, what is true of it, and a clean run's ledger."""

    uri: str
    truth: list[dict[str, object]]
    clean: pq.ParquetFile


def run_ids(s3: S3, name: str) -> list[str]:
    work = s3.folder / name / "_work"
    return sorted(path.name for path in work.iterdir()) if work.exists() else []


def read(s3: S3, name: str) -> object:
    (committed,) = (s3.folder / name).glob("date=*/*.parquet")
    return pq.read_table(committed, schema=LEDGER_SCHEMA)


def arguments(archive: str, name: str, model_folder: Path) -> list[str]:
    """Command line of a run. Eager, which starts sooner than OpenVINO; the demo's model test has the default."""
    quick = model_folder.parent / "quick.toml"
    quick.write_text('[screening]\nengine = "eager"\n')
    places = ["--archive", archive, "--ledger", f"s3://bucket/{name}", "--model", str(model_folder)]
    return [*places, "--run-date", DATE, "--config", str(quick)]


@pytest.fixture(scope="module")
def archive(s3: S3, cluster: Cluster, model_folder: Path) -> Archive:
    phantoms = list(configs(NUM_SOUND, 21, size_px=128, num_slices=20))
    truth = write_archive("s3://bucket/archive", "s3://bucket/truth", phantoms, 2)
    output = cluster.run_job("screen.py", *arguments("s3://bucket/archive", "clean", model_folder))
    assert "ignored, no series: 1 .txt" in output
    return Archive("s3://bucket/archive", truth, read(s3, "clean"))


def test_one_row_per_series_with_the_right_reasons(archive: Archive, s3: S3) -> None:
    rows = {row["source_uri"]: row for row in archive.clean.to_pylist()}
    assert len(rows) == archive.clean.num_rows == len(archive.truth)
    for expected in archive.truth:
        row = rows[storage.join(archive.uri, str(expected["source_path"]))]
        assert (row["status"], row["reason"]) == (expected["status"], expected["reason"]), expected
        assert (row["source_digest"] is None) == (row["reason"] in ("container", "unreadable"))
    assert len({row["reason"] for row in rows.values() if row["reason"]}) == 17


def test_ledger_reads_as_it_lies(archive: Archive, s3: S3) -> None:
    folder = s3.folder / "clean"
    assert pq.read_table(folder).num_rows == archive.clean.num_rows
    counted = duckdb.sql(f"select count(*) from read_parquet('{folder}/**/date=*/*.parquet')").fetchall()
    assert counted == [(archive.clean.num_rows,)]


def test_a_committed_run_says_so_and_changes_nothing(
    archive: Archive, s3: S3, cluster: Cluster, model_folder: Path
) -> None:
    (committed,) = (s3.folder / "clean").glob("date=*/*.parquet")
    before = committed.read_bytes()
    output = cluster.run_job("screen.py", *arguments(archive.uri, "clean", model_folder))
    assert "this run is committed; nothing to do" in output
    assert committed.read_bytes() == before


def finished(s3: S3, name: str) -> int:
    return sum(
        len(list((s3.folder / name / "_work" / run_id / "rows").glob("*.parquet"))) for run_id in run_ids(s3, name)
    )


def has_manifest(s3: S3, name: str) -> bool:
    return any((s3.folder / name / "_work" / run_id / "manifest.parquet").exists() for run_id in run_ids(s3, name))


@pytest.mark.parametrize("moment", ["after the first series", "before the commit"])
def test_a_killed_job_continues_to_an_equal_ledger(
    archive: Archive, s3: S3, cluster: Cluster, model_folder: Path, moment: str
) -> None:
    name = "killed-" + moment.replace(" ", "-")
    wanted = {
        "after the first series": lambda: finished(s3, name) >= 1,
        "before the commit": lambda: finished(s3, name) >= len(archive.truth) - 1,
    }[moment]
    job = cluster.start_job("screen.py", *arguments(archive.uri, name, model_folder))
    deadline = time.monotonic() + 120
    while not wanted() and job.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    job.kill()
    assert not list((s3.folder / name).glob("date=*/*.parquet")), "a run that died may leave no ledger"
    time.sleep(2)  # whatever a worker still had in hand is stored by now
    stored = (s3.folder / name).glob("_work/*/rows/*.parquet")
    before = {
        row["series_key"]: row["screened_at"] for path in stored for row in pq.ParquetFile(path).read().to_pylist()
    }
    output = cluster.run_job("screen.py", *arguments(archive.uri, name, model_folder))
    table = read(s3, name)
    assert len(run_ids(s3, name)) == 1
    assert ledger.differences(archive.clean, table) == []
    # The rows that the dead run left stand in the ledger as they were: no finished series was screened again.
    after = {row["series_key"]: row["screened_at"] for row in table.to_pylist()}
    assert {key: after[key] for key in before} == before
    if before:
        assert f"continuing: {len(before)} of {len(archive.truth)} series are finished" in output


def test_plan_freezes_the_manifest_and_screens_nothing(
    archive: Archive, s3: S3, cluster: Cluster, model_folder: Path
) -> None:
    output = cluster.run_job("screen.py", *arguments(archive.uri, "planned", model_folder), "--plan", "--limit", "6")
    assert re.search(r"^series \(expected rows\) +6$", output, re.MULTILINE)
    assert "CPUs, 0 GPUs: fits" in output
    assert has_manifest(s3, "planned")
    assert finished(s3, "planned") == 0
    assert not list((s3.folder / "planned").glob("date=*/*.parquet"))


def test_submitted_job_refuses_relative_places_with_the_form_to_use(cluster: Cluster, model_folder: Path) -> None:
    process = subprocess.run(
        [
            Path(sys.executable).with_name("ray"), "job", "submit", "--working-dir", ROOT, "--",
            "python", "jobs/screen.py", "--archive", "my/archive", "--ledger", "/tmp/x", "--model", str(model_folder),
        ],
        env=cluster.environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    output = process.stdout + process.stderr
    assert process.returncode == 1
    assert "--archive my/archive is relative" in output
    assert "give the absolute path, /.../my/archive" in output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--model": "models:/covtanet@champion"}, "is not in the registry"),
        ({"--model": "/nowhere"}, "expected a saved model"),
        ({"--archive": "s3://bucket/ledger/x", "--ledger": "s3://bucket/ledger"}, "must be apart"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(
    cluster: Cluster, model_folder: Path, changed: dict[str, str], message: str
) -> None:
    values = {"--archive": "s3://bucket/archive", "--ledger": "s3://bucket/no", "--model": str(model_folder), **changed}
    output = cluster.run_job("screen.py", *(part for pair in values.items() for part in pair), expect=3)
    assert message in output
    assert "Traceback" not in output


def test_identifiers_stay_out_of_the_log(archive: Archive, s3: S3, cluster: Cluster) -> None:
    uids = [row["series_uid"] for row in archive.clean.to_pylist() if row["series_uid"]]
    assert uids
    logs = [path for path in Path(cluster.environment["RAY_TMP"]).rglob("*") if path.is_file() and "logs" in path.parts]
    assert logs
    text = b"".join(path.read_bytes() for path in logs if path.suffix in {".log", ".out", ".err"})
    assert not [uid for uid in uids if uid.encode() in text]

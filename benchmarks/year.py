"""The view over a year of nights, from a folder and from an S3 server."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from benchmarks.measure import WORK, Result, say, seconds, side_by_side
from benchmarks.synthetic_series import finished, run_of, series_rows
from covtanet.archive.manifest import IGNORED_SCHEMA
from covtanet.ledger.accounting import ACCOUNTED_COLUMNS
from covtanet.ledger.commit import commit_run
from covtanet.ledger.finished_rows import store_rows
from covtanet.ledger.run import begin_run
from covtanet.ledger.view import iter_newest_rows
from covtanet.ledger.work import write_manifest
from covtanet.screening.stages import new_record
from infra.local.services import start_s3

NUM_NIGHTS = 365
# A million series a year, and one of ten that was there before and has changed.
NEW_PER_NIGHT = 2740
REPEATED_PER_NIGHT = 274
ROUNDS = 3


def measure() -> list[Result]:
    """(y) the view of a year of nights against a scan of the same files, and from S3."""
    folder = WORK / "year" / "s3" / "bucket"
    if not folder.exists():
        say(f"making {NUM_NIGHTS} nights")
        for night in range(NUM_NIGHTS):
            _commit_night(folder, night)
    ledger = str(folder / "ledger")
    num_series = NUM_NIGHTS * NEW_PER_NIGHT
    if _view(ledger) != num_series:
        raise SystemExit(f"{_view(ledger)} series in the view, expected {num_series}")
    works = {"view": lambda: _view(ledger), "scan": lambda: _scan(ledger)}
    times = side_by_side(works, rounds=ROUNDS)
    ratio = times["view"] / times["scan"]
    from_s3 = _seconds_from_s3(folder)
    what = f"view of {NUM_NIGHTS} nights, {num_series:,} series"
    return [
        Result(
            "y",
            f"{what}, over DuckDB's scan of the files",
            f"{ratio:.1f} x",
        ),
        Result("y", f"{what}, folder", f"{times['view']:.1f} s"),
        Result("y", f"{what}, S3 server on this machine", f"{from_s3:.1f} s"),
    ]


def _commit_night(folder: Path, night: int) -> None:
    run = run_of(folder)
    run = replace(run, run_date=run.run_date + timedelta(days=night))
    begin_run(run)
    first = NEW_PER_NIGHT * night
    rows = [
        *series_rows(first, NEW_PER_NIGHT),
        *series_rows(max(0, first - REPEATED_PER_NIGHT), min(first, REPEATED_PER_NIGHT)),
    ]
    ignored = folder / "ignored.parquet"
    pq.write_table(IGNORED_SCHEMA.empty_table(), ignored)
    write_manifest(run, rows, ignored)
    store_rows(run, [finished(new_record(row, run.archive)) for row in rows])
    commit_run(run)


def _view(ledger: str) -> int:
    return sum(table.num_rows for table in iter_newest_rows(ledger, ACCOUNTED_COLUMNS))


def _scan(ledger: str) -> int:
    query = f"select count(distinct series_key) from read_parquet('{ledger}/date=*/*.parquet')"
    (counted,) = duckdb.connect().execute(query).fetchall()
    return int(counted[0])


def _seconds_from_s3(folder: Path) -> float:
    service = start_s3(folder.parent, folder.parent.parent / "s3.log")
    os.environ.update(service.environment)
    try:
        return seconds(lambda: _view(f"s3://{folder.name}/ledger"))
    finally:
        service.stop()

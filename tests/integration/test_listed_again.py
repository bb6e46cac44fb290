"""Series UIDs of an archive that was listed before, by its manifest of the next night."""

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ledger_rows import record
from sound_input import named, slices

from covtanet.ledger.commit import commit_run
from covtanet.ledger.finished_rows import store_rows
from covtanet.ledger.incremental import read_previous_runs
from covtanet.ledger.run import Run, begin_run
from covtanet.ledger.work import read_manifest
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.listing import list_folders
from covtanet.screening.plan import make_manifest

# Of Ray Data's own settings.
pytestmark = pytest.mark.filterwarnings("ignore:`use_.*:DeprecationWarning")


@pytest.fixture(params=[b"", b"a secret of this hospital"], ids=["open", "hidden"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """The first night, with and without identities in the ledger."""
    (tmp_path / "archive").mkdir()
    return Run(
        archive=str(tmp_path / "archive"),
        ledger=str(tmp_path / "ledger"),
        run_date=date(2026, 11, 23),
        model_name="m",
        model_version="1",
        model_digest="d",
        config_digest="c",
        software_version="0",
        since_last=True,
        site_key=request.param,
        linkage=str(tmp_path / "linkage"),
    )


def put_series(run: Run, folder: str) -> None:
    """Put the same series into a folder of the archive."""
    (Path(run.archive) / folder).mkdir()
    for name, data in named(slices()).items():
        (Path(run.archive) / folder / name).write_bytes(data)


def listed(run: Run) -> list[dict[str, Any]]:
    """Begin a night and return the rows of its manifest."""
    begin_run(run)
    make_manifest(run, ScreeningConfig())
    return list(read_manifest(run))


def commit(run: Run, rows: list[dict[str, Any]], **values: Any) -> None:
    records = [
        record({**row, "started_at": 0.0}, series_uid=row["series_uid"], **values) for row in rows
    ]
    store_rows(run, records)
    commit_run(run)


def test_series_that_is_screened_again_is_no_repeat_of_itself(run: Run) -> None:
    put_series(run, "one")
    commit(run, listed(run), status="failed", reason="worker_died")
    (row,) = listed(replace(run, run_date=date(2026, 11, 24)))
    assert (row["source_path"], row["qc_flags"]) == ("one/", [])


def test_series_with_the_uid_of_one_in_a_folder_that_is_not_read_is_flagged(run: Run) -> None:
    put_series(run, "one")
    commit(run, listed(run), status="screened", reason=None)
    put_series(run, "two")
    (row,) = listed(replace(run, run_date=date(2026, 11, 24)))
    assert (row["source_path"], row["qc_flags"]) == ("two/", ["series_uid_repeated"])


@pytest.mark.parametrize(("software_version", "folders"), [("0", []), ("1", ["two/"])])
def test_folder_with_ignored_objects_is_read_again_by_other_software(
    run: Run, tmp_path: Path, software_version: str, folders: list[str]
) -> None:
    """It may find a series in what the one before it ignored."""
    for folder in ("one", "two"):
        put_series(run, folder)
    (Path(run.archive) / "two" / "report.txt").write_bytes(b"no header that this software knows")
    commit(run, listed(run), status="screened", reason=None)
    night = replace(run, run_date=date(2026, 11, 24), software_version=software_version)
    listing = tmp_path / "listing.parquet"
    list_folders(night, listing, tmp_path / "folders.parquet", read_previous_runs(night))
    assert pq.read_table(listing)["folder"].to_pylist() == folders

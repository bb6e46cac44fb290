"""Manifest and rows of a run, attempts, and the one commit."""

import uuid
from dataclasses import replace
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from ledger_rows import freeze, record

from covtanet import storage
from covtanet.errors import AlreadyCommittedError
from covtanet.ledger.attempts import count_attempt
from covtanet.ledger.commit import commit_run
from covtanet.ledger.run import Run, is_committed
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.ledger.work import finished_keys, store_row


def test_one_row_per_series_is_committed_and_readable_as_it_lies(run: Run, tmp_path: Path) -> None:
    rows = freeze(run, tmp_path, "a", "b", "c")
    for row in rows:
        store_row(run, record(row))
    counts = commit_run(run)
    assert (counts.series, counts.rejected["not_hu"], counts.screened, counts.failed) == (
        3,
        3,
        0,
        0,
    )
    table = pq.read_table(run.ledger)
    assert table.num_rows == 3
    assert table.select(LEDGER_SCHEMA.names).schema.equals(LEDGER_SCHEMA)
    counted = duckdb.sql(
        f"select count(*), count(distinct series_key) from '{run.ledger}/date=*/*.parquet'"
    )
    assert counted is not None
    found = counted.fetchall()
    assert found == [(3, 3)]


def test_a_missing_row_stops_the_commit(run: Run, tmp_path: Path) -> None:
    rows = freeze(run, tmp_path, "a", "b")
    store_row(run, record(rows[0]))
    with pytest.raises(RuntimeError, match="1 of 2 series have no row"):
        commit_run(run)
    assert not is_committed(run)


def test_of_two_drivers_one_commits_and_the_other_is_told(run: Run, tmp_path: Path) -> None:
    rows = freeze(run, tmp_path, "a")
    store_row(run, record(rows[0]))
    commit_run(run)
    committed = Path(run.committed_uri).read_bytes()
    store_row(run, record(rows[0], reason="no_lung"))  # the other was still at it
    with pytest.raises(AlreadyCommittedError, match="committed first"):
        commit_run(run)
    assert Path(run.committed_uri).read_bytes() == committed


def test_a_series_is_tried_three_times_and_no_more(run: Run) -> None:
    assert [count_attempt(run, "k", "decode") for _ in range(5)] == [True, True, True, False, False]
    assert count_attempt(run, "k", "predict")
    assert count_attempt(run, "other", "decode")


def test_a_series_screened_twice_leaves_one_row(run: Run, tmp_path: Path) -> None:
    (row,) = freeze(run, tmp_path, "a")
    store_row(run, record(row))
    store_row(run, record(row, reason="no_lung"))
    assert finished_keys(run) == {row["series_key"]}
    assert commit_run(run).series == 1


def test_half_written_rows_do_not_count(run: Run, tmp_path: Path) -> None:
    (row,) = freeze(run, tmp_path, "a")
    folder = Path(run.work_uri("rows"))
    folder.mkdir(parents=True)
    (folder / f"._{row['series_key']}.parquet").write_bytes(b"PAR1")
    assert finished_keys(run) == set()


def test_series_is_tried_three_times_by_each_driver(run: Run) -> None:
    """A driver that dies takes the series in flight with it; that is no fault of theirs."""
    for _ in range(5):
        driver = replace(run, driver=uuid.uuid4().hex)
        assert count_attempt(driver, "k", "decode")
    one, other = (replace(run, driver=name) for name in ("one", "other"))
    assert [count_attempt(each, "k", "decode") for each in (one, other) * 3] == [True] * 6
    assert not count_attempt(one, "k", "decode")
    assert make_again(run).driver != run.driver
    assert make_again(run) == run


def make_again(run: Run) -> Run:
    """The same run, as another process makes it."""
    return Run(**{name: value for name, value in vars(run).items() if name != "driver"})


def test_commit_stands_if_its_work_cannot_be_removed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (row,) = freeze(run, tmp_path, "a")
    store_row(run, record(row))

    def fail(uri: str) -> None:
        raise OSError("1 of 1 objects could not be deleted: AccessDenied")

    monkeypatch.setattr(storage, "delete_folder", fail)
    assert commit_run(run).series == 1
    assert "could not be removed: OSError" in caplog.text

"""Manifest and rows of a run, and the one commit."""

from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from ledger_rows import freeze, record, series

from covtanet import storage
from covtanet.errors import AlreadyCommittedError
from covtanet.ledger import commit
from covtanet.ledger.commit import commit_run
from covtanet.ledger.finished_rows import finished_keys, store_rows
from covtanet.ledger.run import Run, is_committed
from covtanet.ledger.schema import LEDGER_SCHEMA


def test_one_row_per_series_is_committed_and_readable_as_it_lies(run: Run, tmp_path: Path) -> None:
    rows = freeze(run, tmp_path, "a", "b", "c")
    for row in rows:
        store_rows(run, [record(row)])
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
    store_rows(run, [record(rows[0])])
    with pytest.raises(RuntimeError, match="1 of 2 series have no row"):
        commit_run(run)
    assert not is_committed(run)


def test_of_two_drivers_one_commits_and_the_other_is_told(run: Run, tmp_path: Path) -> None:
    rows = freeze(run, tmp_path, "a")
    store_rows(run, [record(rows[0])])
    commit_run(run)
    committed = Path(run.committed_uri).read_bytes()
    store_rows(run, [record(rows[0], reason="no_lung")])  # the other was still at it
    with pytest.raises(AlreadyCommittedError, match="committed first"):
        commit_run(run)
    assert Path(run.committed_uri).read_bytes() == committed


def test_a_series_screened_twice_leaves_one_row(run: Run, tmp_path: Path) -> None:
    (row,) = freeze(run, tmp_path, "a")
    store_rows(run, [record(row)])
    store_rows(run, [record(row, reason="no_lung")])
    assert finished_keys(run).tolist() == [row["series_key"].encode()]
    assert commit_run(run).series == 1


def test_row_of_no_series_of_the_manifest_is_left_out_with_a_warning(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If a store let a second driver replace the manifest, the last manifest counts."""
    rows = freeze(run, tmp_path, "a", "b")
    store_rows(run, [record(row) for row in (*rows, series("c"))])
    assert commit_run(run).series == 2
    assert "1 rows are of no series of the manifest" in caplog.text


def test_commit_whose_answer_is_lost_counts_as_its_own(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = freeze(run, tmp_path, "a")
    store_rows(run, [record(rows[0])])
    create = storage.create

    def create_and_fail(path: Path, uri: str) -> bool:
        create(path, uri)
        raise FileNotFoundError("the upload is gone")

    monkeypatch.setattr(storage, "create", create_and_fail)
    assert commit_run(run).series == 1
    assert storage.list_names(run.work_uri("rows")) == []


def test_two_series_of_one_key_stop_the_commit(run: Run, tmp_path: Path) -> None:
    rows = freeze(run, tmp_path, "a", "a")
    store_rows(run, [record(rows[0])])
    with pytest.raises(RuntimeError, match="1 series of the manifest share a key"):
        commit_run(run)


def test_rows_are_sorted_by_status_and_involvement_for_filters(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter reads the row groups whose bounds allow it: one of four."""
    monkeypatch.setattr(commit, "ROWS_PER_GROUP", 2)
    rows = freeze(run, tmp_path, *"abcdefgh")
    involvements = [0.5, None, 0.1, 0.3, None, 0.2, None, 0.4]
    for row, involvement in zip(rows, involvements, strict=True):
        status = "rejected" if involvement is None else "screened"
        values = {"status": status, "reason": None, "involvement": involvement}
        store_rows(run, [record(row, **values)])
    commit_run(run)
    file = pq.ParquetFile(run.committed_uri)
    written = [
        (row["status"], row["involvement"])
        for row in file.read(["status", "involvement"]).to_pylist()
    ]
    rejected = [("rejected", None)] * 3
    assert written == [*rejected, *(("screened", value) for value in (0.1, 0.2, 0.3, 0.4, 0.5))]
    column = file.schema_arrow.get_field_index("involvement")
    bounds = [file.metadata.row_group(group).column(column).statistics for group in range(4)]
    assert [bound.max for bound in bounds if bound.has_min_max] == [0.1, 0.3, 0.5]


def test_of_two_rows_of_a_series_the_earlier_counts(run: Run, tmp_path: Path) -> None:
    (row,) = freeze(run, tmp_path, "a")
    for reason in ("no_lung", "not_hu", "not_ct"):
        store_rows(run, [record(row, reason=reason), record(row, reason="too_large")])
    commit_run(run)
    assert pq.ParquetFile(run.committed_uri).read()["reason"].to_pylist() == ["no_lung"]


def test_windows_are_joined_chunks_and_lose_no_row(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "ROWS_PER_WINDOW", 3)
    rows = freeze(run, tmp_path, *"abcdefgh")
    for first in range(0, 8, 2):
        store_rows(run, [record(row) for row in rows[first : first + 2]])
    commit_run(run)
    file = pq.ParquetFile(run.committed_uri)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert sizes == [4, 4]
    assert set(file.read(["series_key"])["series_key"].to_pylist()) == {
        row["series_key"] for row in rows
    }


def test_commit_stands_if_its_work_cannot_be_removed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (row,) = freeze(run, tmp_path, "a")
    store_rows(run, [record(row)])

    def fail(uri: str) -> None:
        raise OSError("1 of 1 objects could not be deleted: AccessDenied")

    monkeypatch.setattr(storage, "delete_folder", fail)
    assert commit_run(run).series == 1
    assert "could not be removed: OSError" in caplog.text

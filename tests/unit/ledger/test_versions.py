"""Ledgers of schema versions 1 and 2 side by side: version 1 has no column ``engine``."""

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ledger_rows import freeze, record

from covtanet.commands.ledger import main
from covtanet.errors import LedgerVersionError
from covtanet.ledger.commit import commit_run
from covtanet.ledger.diff import differences
from covtanet.ledger.finished_rows import num_finished, store_rows
from covtanet.ledger.incremental import read_previous_runs
from covtanet.ledger.read import read_run
from covtanet.ledger.run import Run
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.ledger.view import newest_rows

SCREENED = {"status": "screened", "reason": None, "p_infected": 0.5}


def committed(run: Run, tmp_path: Path, *names: str, **values: Any) -> Path:
    """Commit a run of screened series and return its file."""
    for row in freeze(run, tmp_path, *names):
        store_rows(run, [record(row, **{**SCREENED, **values})])
    commit_run(run)
    return Path(run.committed_uri)


def rewrite_as_version(path: Path, version: int) -> None:
    """Give a committed file the columns and the metadata of another schema version."""
    table = pq.read_table(path, partitioning=None)
    names = [name for name in table.schema.names if name != "engine"]
    metadata = {**table.schema.metadata, b"covtanet.schema_version": str(version).encode()}
    column = pa.array([version] * table.num_rows, pa.int16())
    table = table.select(names).set_column(0, LEDGER_SCHEMA.field("schema_version"), column)
    pq.write_table(table.replace_schema_metadata(metadata), path)


@pytest.fixture
def nights(run: Run, tmp_path: Path) -> tuple[Run, Run]:
    """A night of version 1 with the series a and b, and one of version 2 with b and c."""
    first, second = run, replace(run, run_date=date(2026, 11, 24))
    rewrite_as_version(committed(first, tmp_path, "a", "b", engine="openvino"), 1)
    committed(second, tmp_path, "b", "c", engine="openvino-int8")
    return first, second


def test_view_has_null_engine_for_rows_of_version_1(nights: tuple[Run, Run]) -> None:
    view = newest_rows(nights[0].ledger)
    assert view.schema.equals(LEDGER_SCHEMA)
    engines = {row["source_uri"]: row["engine"] for row in view.to_pylist()}
    assert engines == {
        "/archive/a.nii.gz": None,
        "/archive/b.nii.gz": "openvino-int8",
        "/archive/c.nii.gz": "openvino-int8",
    }
    assert newest_rows(nights[0].ledger, ["engine"]).column_names == ["engine"]


def test_view_command_writes_both_versions(nights: tuple[Run, Run], tmp_path: Path) -> None:
    out = tmp_path / "view.csv"
    assert main([nights[0].ledger, "view", "--out", str(out)]) == 0
    head, *rows = out.read_text().splitlines()
    assert head.endswith('"engine"')
    assert len(rows) == 3


def test_since_last_settles_series_of_version_1(nights: tuple[Run, Run], tmp_path: Path) -> None:
    later = replace(nights[0], run_date=date(2026, 11, 25), since_last=True)
    previous_runs = read_previous_runs(later)
    rows = freeze(later, tmp_path, "a", "b", "c", "d")
    assert [previous_runs.settles(row, later) for row in rows] == [True, True, True, False]


def test_diff_ignores_engine_that_version_1_lacks(nights: tuple[Run, Run], tmp_path: Path) -> None:
    first = nights[0]
    same = replace(first, run_date=date(2026, 11, 26))
    committed(same, tmp_path, "a", "b", engine="openvino-int8")
    assert main([first.ledger, "diff", first.run_id, same.run_id]) == 0
    assert differences(read_run(first.committed_uri), read_run(same.committed_uri)) == []


def test_diff_names_engines_that_differ(run: Run, tmp_path: Path) -> None:
    other = replace(run, run_date=date(2026, 11, 24))
    committed(run, tmp_path, "a", engine="openvino")
    committed(other, tmp_path, "a", engine="openvino-int8")
    (line,) = differences(read_run(run.committed_uri), read_run(other.committed_uri))
    assert line.endswith("engine is openvino and openvino-int8")


def test_unknown_version_is_refused(run: Run, tmp_path: Path) -> None:
    rewrite_as_version(committed(run, tmp_path, "a"), 3)
    with pytest.raises(LedgerVersionError, match="schema version 3, expected 1 or 2"):
        read_run(run.committed_uri)


def test_run_begun_by_version_1_commits_its_rows(run: Run, tmp_path: Path) -> None:
    for row, name in zip(freeze(run, tmp_path, "a", "b"), "ab", strict=True):
        store_rows(run, [record(row, **SCREENED, engine="openvino")])
        if name == "a":
            (chunk,) = Path(run.work_uri("rows")).iterdir()
            # Its name is that of older software: the key of the series.
            chunk = chunk.rename(chunk.with_name(f"{row['series_key']}.parquet"))
            rewrite_as_version(chunk, 1)
    assert num_finished(run.work_uri()) == 2
    commit_run(run)
    engines = read_run(run.committed_uri, ["source_uri", "engine"]).sort_by("source_uri")
    assert engines["engine"].to_pylist() == [None, "openvino"]

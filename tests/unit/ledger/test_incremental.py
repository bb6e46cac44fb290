"""Newest rows of each series, and series that a later run need not screen again."""

import json
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ledger_rows import freeze, record, series

from covtanet.archive.manifest import IGNORED_SCHEMA
from covtanet.ledger import finished_rows, read
from covtanet.ledger.commit import commit_run
from covtanet.ledger.finished_rows import complete_row, store_rows
from covtanet.ledger.incremental import KnownSeries, PreviousRuns, known_series, read_previous_runs
from covtanet.ledger.read import committed_files, read_run
from covtanet.ledger.run import Run, begin_run, choose_date
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.ledger.view import newest_rows
from covtanet.ledger.work import (
    FOLDERS_SCHEMA,
    ListedFolder,
    read_folders,
    write_manifest,
    write_rows,
)


def test_the_newest_row_of_each_series_is_the_view(run: Run, tmp_path: Path) -> None:
    for day, names in ((20, "abc"), (21, "b"), (22, "")):
        night = replace(run, run_date=date(2026, 11, day))
        for row in freeze(night, tmp_path, *names):
            store_rows(night, [record(row, reason="no_lung" if day == 21 else "not_hu")])
        commit_run(night)
    found = {row["source_uri"]: row["reason"] for row in newest_rows(run.ledger).to_pylist()}
    assert found == {
        f"/archive/{name}.nii.gz": reason
        for name, reason in zip("abc", ("not_hu", "no_lung", "not_hu"), strict=True)
    }
    known = known_series(run.ledger, {replace(run, run_date=date(2026, 11, 20)).run_id})
    first, version = known[series("a")["series_key"]], series("a")["source_version"]
    assert first.is_settled({version}, "0.1.0")
    assert not first.is_settled({version}, "0.2.0")  # refused by older software
    assert not first.is_settled({"another"}, "0.1.0")
    screened, failed = (replace(first, status=status) for status in ("screened", "failed"))
    assert screened.is_settled({version}, "0.2.0")
    assert not failed.is_settled({version}, "0.1.0")  # not at fault: tried again


def test_row_from_2030_does_not_win(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a driver whose clock is years ahead: the run that began later has the newest row."""
    future = datetime(2030, 1, 1, tzinfo=UTC)
    (row,) = freeze(run, tmp_path, "a")
    with monkeypatch.context() as patched:
        patched.setattr(
            finished_rows,
            "complete_row",
            lambda *args: {**completed(*args), "screened_at": future},
        )
        store_rows(run, [record(row, reason="no_lung")])
    (table_before,) = finished_rows.read_chunks(run)
    assert table_before["screened_at"][0].as_py() == future
    commit_run(run)
    assert read_run(run.committed_uri)["screened_at"][0].as_py() < datetime.now(UTC)
    later = replace(run, run_date=date(2026, 11, 24))
    commit_one(later, tmp_path, reason="not_hu")
    assert newest_rows(run.ledger)["reason"].to_pylist() == ["not_hu"]


completed = complete_row


def test_newest_row_is_of_the_run_that_began_last_even_in_old_files(
    run: Run, tmp_path: Path
) -> None:
    """Files of older software bear no begun_at; their rows' times are a worker's, and say nothing
    between runs.
    """
    commit_one(run, tmp_path, reason="no_lung")
    later = replace(run, run_date=date(2026, 11, 24))
    commit_one(later, tmp_path, reason="not_hu")
    for each, moment in (
        (run, datetime(2030, 1, 1, tzinfo=UTC)),
        (later, datetime(2026, 11, 24, 2, tzinfo=UTC)),
    ):
        table = pq.ParquetFile(each.committed_uri).read()
        times = pa.array([moment], table.schema.field("screened_at").type)
        old = table.set_column(3, table.schema.field("screened_at"), times)
        pq.write_table(old.replace_schema_metadata(LEDGER_SCHEMA.metadata), each.committed_uri)
    assert newest_rows(run.ledger)["reason"].to_pylist() == ["not_hu"]


def commit_one(run: Run, tmp_path: Path, **values: Any) -> None:
    (row,) = freeze(run, tmp_path, "a")
    store_rows(run, [record(row, **values)])
    commit_run(run)


def test_run_with_a_date_in_the_future_is_never_the_newest(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ahead = replace(run, run_date=date(9999, 12, 31))
    commit_one(run, tmp_path, reason="not_hu")
    commit_one(ahead, tmp_path, reason="no_lung")
    assert committed_files(run.ledger) == [run.committed_uri]
    assert newest_rows(run.ledger)["reason"].to_pylist() == ["not_hu"]
    assert "1 dates in the future" in caplog.text
    night = replace(run, run_date=date(2026, 11, 25), since_last=True)
    assert known_reasons(night) == {"rejected"}
    assert read_previous_runs(night).folders == {}
    freeze(replace(ahead, limit=7), tmp_path)  # one that has begun is not continued either
    assert choose_date(replace(run, limit=7)) == datetime.now(UTC).date()


def known_reasons(night: Run) -> set[str]:
    return {known.status for known in read_previous_runs(night).series.values()}


def test_challenger_never_hides_a_study_from_the_night(run: Run, tmp_path: Path) -> None:
    """Whichever way it is tried: as an alias, as a version, in the ledger of the nights and on the
    same day.
    """
    night = replace(
        run, model_ref="models:/covtanet@champion", since_last=True, run_date=date(2026, 11, 24)
    )
    for digit, ref in (("1", "models:/covtanet@challenger"), ("2", "models:/covtanet/2")):
        trial = replace(
            run, model_ref=ref, model_version="2", model_digest=digit * 64, since_last=True
        )
        commit_one(trial, tmp_path, status="screened", reason=None)
    assert read_previous_runs(night).series == {}
    commit_one(
        replace(night, run_date=date(2026, 11, 23)), tmp_path, status="screened", reason=None
    )
    promoted = replace(night, model_version="2", model_digest="2" * 64)
    for each in (night, promoted):  # another version under the same name screens no series again
        assert known_reasons(each) == {"screened"}


def test_runs_of_older_software_settle_what_their_model_screened(run: Run, tmp_path: Path) -> None:
    commit_one(run, tmp_path)
    path = Path(run.work_uri("run.json"))
    description = json.loads(path.read_text())
    for name in ("model_ref", "begun_at", "limit"):
        del description[name]
    path.write_text(json.dumps(description))
    night = replace(
        run, model_ref="models:/covtanet@champion", model_version="7", run_date=date(2026, 11, 24)
    )
    assert known_reasons(night) == {"rejected"}
    assert known_reasons(replace(night, model_name="other")) == set()


def test_hidden_ledger_has_keyed_versions_and_digests_and_still_settles(
    run: Run, tmp_path: Path
) -> None:
    hidden = replace(run, site_key=b"a secret of this hospital", linkage=str(tmp_path / "linkage"))
    row = {**series("a"), "series_key": hidden.pseudonym("a")}
    ignored = tmp_path / "ignored.parquet"
    write_rows(ignored, IGNORED_SCHEMA, [])
    begin_run(hidden)
    write_manifest(hidden, [row], ignored)
    store_rows(hidden, [record(row, source_digest="5" * 64, status="screened", reason=None)])
    commit_run(hidden)
    (found,) = read_run(hidden.committed_uri).to_pylist()
    assert (
        found["source_version"] == hidden.pseudonym(row["source_version"]) != row["source_version"]
    )
    assert found["source_digest"] == hidden.pseudonym("5" * 64)
    night = replace(hidden, run_date=date(2026, 11, 24))
    known = read_previous_runs(night)
    assert known.settles(row, night)
    assert not known.settles({**row, "source_version": "another"}, night)
    before = KnownSeries(
        row["source_version"], "screened", "0.1.0", None
    )  # of a ledger of older software
    assert PreviousRuns(series={row["series_key"]: before}).settles(row, night)


def test_folders_of_a_run_are_those_of_the_driver_whose_manifest_counts(
    run: Run, tmp_path: Path
) -> None:
    """Another one listed later, when a series of the folder had changed."""
    ignored, folders = tmp_path / "ignored.parquet", tmp_path / "folders.parquet"
    write_rows(ignored, IGNORED_SCHEMA, [])
    begin_run(run)
    for version in ("earlier", "later"):
        write_rows(
            folders, FOLDERS_SCHEMA, [{"folder": "a", "version": version, "series_keys": ["a"]}]
        )
        write_manifest(run, [series("a")], ignored, folders)
    assert read_folders(run.work_root, run.run_id) == {"a": ListedFolder("earlier", ["a"])}


def test_view_of_runs_that_are_read_in_several_batches_is_that_of_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five series the second and the fifth are newer in the later run."""
    later = replace(run, run_date=date(2026, 11, 24))
    for night, names, reason in ((run, "abcde", "no_lung"), (later, "be", "not_hu")):
        rows = freeze(night, tmp_path, *names)
        store_rows(night, [record(row, reason=reason) for row in rows])
        commit_run(night)
    monkeypatch.setattr(read, "ROWS_PER_BATCH", 2)
    found = newest_rows(run.ledger, ["source_uri", "reason"]).to_pylist()
    reasons = {row["source_uri"]: row["reason"] for row in found}
    expected = {name: "not_hu" if name in "be" else "no_lung" for name in "abcde"}
    assert reasons == {f"/archive/{name}.nii.gz": reason for name, reason in expected.items()}
    assert len(found) == 5

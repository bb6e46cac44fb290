"""A run's identity, its manifest and rows, the one commit, and the equality of ledgers."""

import json
import os
import pickle
import uuid
from collections import Counter
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ledger_rows import freeze, record, series

from covtanet import storage
from covtanet.archive.manifest import IGNORED_SCHEMA
from covtanet.errors import REJECTION_REASONS, AlreadyCommittedError, ConfigError
from covtanet.ledger import work
from covtanet.ledger.accounting import Accounting
from covtanet.ledger.attempts import count_attempt
from covtanet.ledger.commit import commit_run
from covtanet.ledger.diff import differences
from covtanet.ledger.incremental import (
    KnownSeries,
    PreviousRuns,
    known_series,
    read_previous_runs,
)
from covtanet.ledger.read import committed_files, newest_rows, read_run
from covtanet.ledger.run import (
    Run,
    begin_run,
    check_locations,
    choose_date,
    is_committed,
    known_runs,
)
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.ledger.work import complete_row, finished_keys, store_row, write_manifest, write_rows
from covtanet.report.summary import findings


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(
        archive="/archive",
        ledger=str(tmp_path / "ledger"),
        run_date=date(2026, 11, 23),
        model_name="covtanet",
        model_version="1",
        model_digest="d" * 64,
        config_digest="c" * 64,
        software_version="0.1.0",
    )


def test_run_id_follows_from_what_is_screened_with_what_and_when(run: Run) -> None:
    changes: list[dict[str, Any]] = [
        {"archive": "/other"},
        {"model_digest": "e" * 64},
        {"config_digest": "e" * 64},
        {"limit": 5},
        {"run_date": date(2026, 11, 24)},
    ]
    assert len({run.run_id, *(replace(run, **change).run_id for change in changes)}) == 6
    assert (
        replace(run, ledger="/elsewhere", software_version="2", model_version="9").run_id
        == run.run_id
    )


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


def test_the_newest_row_of_each_series_is_the_view(run: Run, tmp_path: Path) -> None:
    for day, names in ((20, "abc"), (21, "b"), (22, "")):
        night = replace(run, run_date=date(2026, 11, day))
        for row in freeze(night, tmp_path, *names):
            store_row(night, record(row, reason="no_lung" if day == 21 else "not_hu"))
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


def test_the_newest_unfinished_run_is_continued(run: Run, tmp_path: Path) -> None:
    today = datetime.now(UTC).date()
    assert choose_date(run) == today
    older = replace(run, run_date=date(2026, 11, 20))
    for each in (run, older):
        freeze(each, tmp_path)
    assert choose_date(run) == run.run_date
    commit_run(run)
    assert choose_date(run) == older.run_date
    commit_run(older)
    assert choose_date(run) == today
    assert choose_date(replace(run, limit=3)) == today


def test_ledger_and_archive_may_not_lie_in_each_other() -> None:
    with pytest.raises(ConfigError, match="must be apart"):
        check_locations("/data/archive", "/data/archive/ledger")
    with pytest.raises(ConfigError, match="must be apart"):
        check_locations("s3://b/x/archive", "s3://b/x")
    check_locations("/data/archive", "/data/archive2")


def rows_of(run: Run, **values: Any) -> Any:
    table = pa.Table.from_pylist(
        [
            complete_row(
                run, record(series("a"), status="screened", reason=None, p_infected=0.5, **values)
            )
        ],
        schema=LEDGER_SCHEMA,
    )
    return table


def test_ledgers_are_equal_within_their_tolerances(run: Run) -> None:
    one = rows_of(run, involvement=0.2, decode_s=1.0)
    later = replace(run, run_date=date(2026, 11, 24))
    assert differences(one, rows_of(later, involvement=0.2001, decode_s=2.0)) == []
    assert len(differences(one, rows_of(run, involvement=0.21))) == 1
    assert len(differences(one, rows_of(run, involvement=None))) == 1
    assert len(differences(one, one.slice(0, 0))) == 1
    assert differences(one, pa.concat_tables([one, one])) == ["a series has more than one row"]


def test_schema_is_the_promise() -> None:
    """Names and types of version 1, in order; a change needs a new version."""
    expected = """schema_version: int16|run_id: string|run_date: date32[day]
screened_at: timestamp[us, tz=UTC]
series_key: string|source_uri: string|source_format: string
source_version: string|source_digest: string
num_objects: int32|num_bytes: int64|study_uid: string|series_uid: string
status: string|reason: string
reason_detail: string|qc_flags: list<item: string>|num_slices: int32|num_slices_segmented: int32
spacing_z_mm: double|spacing_y_mm: double|spacing_x_mm: double|p_infected: float
diagnosis: string|p_severe: float
severity: string|severity_by_involvement: string|lesion_volume_ml: double|lung_volume_ml: double
involvement: double|lesion_slices: int32|model_name: string
model_version: string|model_digest: string
config_digest: string|software_version: string|decode_s: double|predict_s: double"""
    assert [
        f"{field.name}: {field.type}".replace("element:", "item:") for field in LEDGER_SCHEMA
    ] == [each for line in expected.splitlines() for each in line.split("|")]
    assert len(set(REJECTION_REASONS)) == len(REJECTION_REASONS) == 24


def counts_of(*rows: tuple[str, str | None, str | None]) -> Accounting:
    counts = Accounting()
    for status, reason, diagnosis in rows:
        counts.add({
            "status": status, "reason": reason, "diagnosis": diagnosis, "severity": None,
            "severity_by_involvement": "severe" if status == "screened" else None,
        })  # fmt: skip
    return counts


def test_accounting_adds_up() -> None:
    counts = counts_of(
        ("screened", None, "infected"), ("rejected", "not_hu", None), ("failed", "storage", None)
    )
    assert counts.series == counts.screened + sum(counts.rejected.values()) + counts.failed
    assert counts.failures == Counter(storage=1)


def test_what_a_model_does_not_say_is_no_count_of_none() -> None:
    """0 infected would be an answer; a segmenter without a diagnosis gave none."""
    assert findings(counts_of(("screened", None, "normal"))) == [
        ("infected", 0), ("severe", 0), ("severe by involvement", 1),
    ]  # fmt: skip
    assert findings(counts_of(("screened", None, None))) == [
        ("infected", "-"), ("severe", "-"), ("severe by involvement", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "uri", ["http://host/archive", "s3://user:secret@host/x", "s3://bucket/../x", "gs://b/x"]
)
def test_places_beyond_paths_and_s3_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        storage.absolute(uri)


def test_a_file_name_that_is_no_utf8_is_listed_and_found_again(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/d\xff")).mkdir()
    Path(os.fsdecode(bytes(tmp_path) + b"/d\xff/a\xe9.nii")).write_bytes(b"here")
    ((folder, objects),) = storage.walk(str(tmp_path))
    assert objects[0].path == "d\uf7ff/a\uf7e9.nii"
    objects[0].path.encode()  # it is valid Unicode
    assert b"".join(storage.read_chunks(f"{tmp_path}/{objects[0].path}", objects[0])) == b"here"
    assert folder == "d\uf7ff/"


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


def test_row_from_2030_does_not_win(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a worker whose clock is years ahead: the run that began later has the newest row."""
    future = datetime(2030, 1, 1, tzinfo=UTC)
    (row,) = freeze(run, tmp_path, "a")
    with monkeypatch.context() as patched:
        patched.setattr(
            work, "complete_row", lambda *args: {**completed(*args), "screened_at": future}
        )
        store_row(run, record(row, reason="no_lung"))
    table_before = pq.read_table(run.row_uri(row["series_key"]))
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
    store_row(run, record(row, **values))
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


def test_run_json_that_cannot_be_read_is_left_out_and_counted(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    freeze(run, tmp_path)
    for name, text in (("odd", "{"), ("list", "[]"), ("undated", "{}")):
        Path(run.work_root, name).mkdir()
        Path(run.work_root, name, "run.json").write_text(text)
    assert [known.run_id for known in known_runs(run.ledger, run.work_root)] == [run.run_id]
    assert "3 runs are left out" in caplog.text


def test_hidden_ledger_has_keyed_versions_and_digests_and_still_settles(
    run: Run, tmp_path: Path
) -> None:
    hidden = replace(run, site_key=b"a secret of this hospital", linkage=str(tmp_path / "linkage"))
    row = {**series("a"), "series_key": hidden.pseudonym("a")}
    ignored = tmp_path / "ignored.parquet"
    write_rows(ignored, IGNORED_SCHEMA, [], 10)
    begin_run(hidden)
    write_manifest(hidden, [row], ignored)
    store_row(hidden, record(row, source_digest="5" * 64, status="screened", reason=None))
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


def test_site_key_does_not_travel_to_workers(run: Run) -> None:
    hidden = replace(run, site_key=b"a secret of this hospital", linkage="/linkage")
    text = pickle.dumps(hidden)
    assert b"secret" not in text
    found = pickle.loads(text)
    assert (found.site_key, found.linkage, found.run_id, found.driver) == (
        b"", "/linkage", hidden.run_id, hidden.driver,
    )  # fmt: skip
    assert hidden.site_key == b"a secret of this hospital"


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


def test_run_ids_of_existing_runs_stay_as_they_are(run: Run) -> None:
    assert run.run_id == "d3d1e9fa23c262d3"
    assert replace(run, model_ref="models:/covtanet@champion", driver="x").run_id == run.run_id


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/../../x", "link/x"])
def test_name_that_leads_out_of_a_local_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads out of the folder"):
        storage.download_files(str(tmp_path), {name: 10}, tmp_path / "target")

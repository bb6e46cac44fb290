"""A run's identity, and the files that describe it."""

import pickle
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from ledger_rows import freeze

from covtanet.errors import ConfigError
from covtanet.ledger.commit import commit_run
from covtanet.ledger.run import Run, check_locations, choose_date, known_runs


def test_run_id_follows_from_what_is_screened_with_what_and_when(run: Run) -> None:
    changes: list[dict[str, Any]] = [
        {"archive": "/other"},
        {"model_digest": "e" * 64},
        {"config_digest": "e" * 64},
        {"limit": 5},
        {"filters": "StudyDate=20260101-"},
        {"run_date": date(2026, 11, 24)},
    ]
    assert len({run.run_id, *(replace(run, **change).run_id for change in changes)}) == 7
    assert (
        replace(run, ledger="/elsewhere", software_version="2", model_version="9").run_id
        == run.run_id
    )


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


def test_run_of_another_filter_is_not_continued_and_its_series_are_known(
    run: Run, tmp_path: Path
) -> None:
    filtered = replace(run, filters="StudyDate=20260101-")
    today = datetime.now(UTC).date()
    freeze(filtered, tmp_path)
    assert choose_date(run) == today
    assert choose_date(filtered) == run.run_date
    (known,) = known_runs(run.ledger, run.work_root)
    assert known.description["filters"] == "StudyDate=20260101-"
    assert known.is_of(run)


def test_ledger_and_archive_may_not_lie_in_each_other() -> None:
    with pytest.raises(ConfigError, match="must be apart"):
        check_locations("/data/archive", "/data/archive/ledger")
    with pytest.raises(ConfigError, match="must be apart"):
        check_locations("s3://b/x/archive", "s3://b/x")
    check_locations("/data/archive", "/data/archive2")


def test_run_json_that_cannot_be_read_is_left_out_and_counted(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    freeze(run, tmp_path)
    for name, text in (("odd", "{"), ("list", "[]"), ("undated", "{}")):
        Path(run.work_root, name).mkdir()
        Path(run.work_root, name, "run.json").write_text(text)
    assert [known.run_id for known in known_runs(run.ledger, run.work_root)] == [run.run_id]
    assert "3 runs are left out" in caplog.text


def test_site_key_does_not_travel_to_workers(run: Run) -> None:
    hidden = replace(run, site_key=b"a secret of this hospital", linkage="/linkage")
    text = pickle.dumps(hidden)
    assert b"secret" not in text
    found = pickle.loads(text)
    assert (found.site_key, found.linkage, found.run_id, found.driver) == (
        b"", "/linkage", hidden.run_id, hidden.driver,
    )  # fmt: skip
    assert hidden.site_key == b"a secret of this hospital"


def test_run_ids_of_existing_runs_stay_as_they_are(run: Run) -> None:
    assert run.run_id == "d3d1e9fa23c262d3"
    assert replace(run, model_ref="models:/covtanet@champion", driver="x").run_id == run.run_id

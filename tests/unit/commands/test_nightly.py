"""Nights tell the truth: their exit code follows from the committed ledger, and whatever is not 0
raises one alert.
"""

import json
import subprocess
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ledger_rows import freeze, record, series

from covtanet import alerts, storage
from covtanet.commands import nightly, screen
from covtanet.errors import ConfigError
from covtanet.ledger.accounting import Accounting
from covtanet.ledger.batch import name_batch, run_of_batch
from covtanet.ledger.commit import commit_run
from covtanet.ledger.finished_rows import complete_row, store_rows
from covtanet.ledger.read import account_run
from covtanet.ledger.run import Run, latest_date
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.job import ScreeningJob, judge

NIGHT = date(2026, 11, 23)


class Nights:
    """Starts of one night, as a scheduler makes them, with a screening job that has committed these
    rows.
    """

    def __init__(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.tmp_path, self.alerts, self.commands = (
            run,
            tmp_path,
            list[dict[str, Any]](),
            list[list[str]](),
        )
        self.code: int | None = None
        monkeypatch.setattr(nightly, "send_alert", lambda url_file, what: self.alerts.append(what))
        monkeypatch.setattr(nightly, "subprocess", SimpleNamespace(run=self._screen))
        self.monkeypatch = monkeypatch

    def commit(self, *reasons: str | None, status: str = "failed") -> None:
        rows = freeze(self.run, self.tmp_path, *(str(number) for number in range(len(reasons))))
        for row, reason in zip(rows, reasons, strict=True):
            values = {"status": status if reason else "screened", "reason": reason}
            store_rows(self.run, [record(row, **values)])
        commit_run(self.run)
        name_batch(self.run, nightly.batch_of(NIGHT))

    def _screen(self, command: list[str], check: bool) -> "subprocess.CompletedProcess[str]":
        """What jobs/screen.py says of a run that is committed; or as it is told, of one that is
        not.
        """
        self.commands.append(command)
        code = self.code
        if code is None:
            counts = Accounting()
            counts.add(pq.ParquetFile(self.run.committed_uri).read())
            code = judge(counts, 0.5, 0.05)
        return subprocess.CompletedProcess(command, code)

    def start(self, *more: str) -> tuple[int, list[str]]:
        """Exit code, and the kinds of the alerts that were raised."""
        before = len(self.alerts)
        self.monkeypatch.setattr(
            "sys.argv",
            [
                "nightly.py",
                "--archive",
                "/archive",
                "--ledger",
                self.run.ledger,
                "--model",
                "m",
                "--night",
                NIGHT.isoformat(),
                *more,
            ],
        )
        return nightly.main(), [each["alert"] for each in self.alerts[before:]]

    @property
    def mark(self) -> Path:
        return Path(self.run.ledger, "_nightly", f"{NIGHT}.json")


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    run = Run(
        archive="/archive",
        ledger=str(tmp_path / "ledger"),
        run_date=NIGHT,
        model_name="covtanet",
        model_version="1",
        model_digest="d" * 64,
        config_digest="c" * 64,
        software_version="0.1.0",
    )
    return Nights(run, tmp_path, monkeypatch)


def test_good_night_runs_once(nights: Nights) -> None:
    nights.commit(None, None)
    assert nights.start() == (0, [])
    assert nights.start() == (0, [])
    assert len(nights.commands) == 1
    assert json.loads(nights.mark.read_text())["exit_code"] == 0


@pytest.mark.parametrize(
    ("reasons", "code", "kind"),
    [
        (("internal_error",) * 10, 1, "internal_errors"),
        ((None, "internal_error"), 1, "internal_errors"),
        (("vanished", None), 4, "too_many_refused"),
    ],
)
def test_red_night_stays_red_until_acknowledged(
    nights: Nights, reasons: tuple[str | None, ...], code: int, kind: str
) -> None:
    """KubeRay and Kubernetes start the same command again, up to their backoffLimit."""
    nights.commit(*reasons)
    for _ in range(3):
        assert nights.start() == (code, [kind])
    expected = sum(reason is not None for reason in reasons)
    assert [sum(each["reasons"].values()) for each in nights.alerts] == [expected] * 3
    assert nights.start("--acknowledge", "the store was away, seen by us") == (0, [])
    noted = json.loads(nights.mark.read_text())["acknowledged"]
    assert (noted["why"], noted["who"]) == ("the store was away, seen by us", nightly.user())
    assert nights.start() == (0, [])


def test_night_killed_before_alert_alerts_at_next_start(nights: Nights) -> None:
    nights.commit("vanished", None)
    assert not nights.mark.exists()
    assert nights.start() == (4, ["too_many_refused"])


def test_acknowledge_refuses_night_without_mark(nights: Nights) -> None:
    assert nights.start("--acknowledge", "why") == (3, ["night_failed"])


@pytest.mark.parametrize(("code", "expected"), [(1, 1), (2, 2), (3, 3), (5, 5), (-9, 1)])
def test_failed_screening_alerts_without_mark(nights: Nights, code: int, expected: int) -> None:
    nights.code = code
    for _ in range(2):
        assert nights.start() == (expected, ["screening_failed"])
    assert not nights.mark.exists()
    assert nights.alerts[-1] == {
        "alert": "screening_failed",
        "night": "2026-11-23",
        "exit_code": expected,
    }


def test_storage_fault_after_commit_is_repaired_at_next_start(nights: Nights) -> None:
    nights.commit(None)
    nights.code = 1
    assert nights.start() == (1, ["screening_failed"])
    nights.code = None
    assert nights.start() == (0, [])


def test_dead_store_raises_an_alert(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str) -> bool:
        raise OSError("s3://hospital/secret does not answer")

    monkeypatch.setattr(storage, "exists", fail)
    assert nights.start() == (1, ["night_failed"])
    assert nights.alerts == [{"alert": "night_failed", "night": "2026-11-23", "error": "OSError"}]


@pytest.mark.parametrize("reason", [None, "vanished"])
@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        ("nightly", "write_report", OSError("full")),
        ("nightly", "remove_old_files", OSError("full")),
        ("nightly", "remove_old_files", KeyError("begun_at")),
        ("nightly", "read_run", OSError("full")),
    ],
)
def test_fault_after_commit_alerts_once_without_mark(
    nights: Nights,
    monkeypatch: pytest.MonkeyPatch,
    reason: str | None,
    module: str,
    name: str,
    error: Exception,
) -> None:
    nights.commit(reason)
    nights.code = 4 if reason else 0
    told = "too_many_refused" if reason and name != "read_run" else "night_failed"

    def fail(*arguments: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(nightly, name, fail)
        code, kinds = nights.start()
    assert code != 0
    assert kinds == [told]
    assert not nights.mark.exists()
    assert nights.start() == (nights.code, ["too_many_refused"] if reason else [])


def test_judge_reads_the_committed_file(nights: Nights) -> None:
    nights.commit("internal_error", None)
    counts = account_run(nights.run.committed_uri)
    assert (counts.series, counts.failures["internal_error"]) == (2, 1)
    assert judge(counts, 1.0, 1.0) == 1


def test_site_key_and_linkage_reach_the_screening(nights: Nights, tmp_path: Path) -> None:
    nights.commit(None)
    assert nights.start("--site-key", "/key", "--linkage", str(tmp_path / "linkage"))[0] == 0
    (command,) = nights.commands
    assert command[command.index("--site-key") + 1] == "/key"
    assert command[command.index("--linkage") + 1] == str(tmp_path / "linkage")


def old_run(run: Run, tmp_path: Path, day: int, **changes: Any) -> Run:
    """Work of a run that was never committed, and whose run.json is of older software."""
    old = replace(run, run_date=date(2026, 9, day), **changes)
    freeze(old, tmp_path, "a")
    path = Path(old.work_uri("run.json"))
    description = {
        name: value for name, value in json.loads(path.read_text()).items() if name != "begun_at"
    }
    path.write_text(json.dumps(description))
    return old


def test_retention_removes_old_work_of_ledger_and_linkage(nights: Nights, tmp_path: Path) -> None:
    linkage = str(tmp_path / "linkage")
    shown = old_run(nights.run, tmp_path, 1)
    hidden = old_run(
        nights.run, tmp_path, 2, site_key=b"a secret of this hospital", linkage=linkage
    )
    fresh = replace(nights.run, run_date=date(2026, 11, 22), limit=1)
    freeze(fresh, tmp_path, "a")
    nights.commit(None)
    assert nights.start("--linkage", linkage) == (0, [])
    assert [Path(each.work_uri()).exists() for each in (shown, hidden, fresh)] == [
        False,
        False,
        True,
    ]


def test_retention_removes_old_listings_and_results(nights: Nights, tmp_path: Path) -> None:
    days = [replace(nights.run, run_date=date(2026, 11, day)) for day in (20, 21, 22)]
    for each in days:
        (row,) = freeze(each, tmp_path, "a")
        Path(each.work_uri("folders.parquet")).write_bytes(b"listing")
        result = Path(each.ledger, "_results", each.run_id, row["series_key"], "preview.png")
        result.parent.mkdir(parents=True)
        result.write_bytes(b"picture")
        store_rows(each, [record(row)])
        commit_run(each)
    nights.run = replace(
        nights.run, limit=5
    )  # lists not all, so that the listing before it is needed
    nights.commit(None)
    assert nights.start("--keep-results-days", "2") == (0, [])
    assert [Path(each.work_uri("folders.parquet")).exists() for each in days] == [
        False,
        False,
        True,
    ]
    assert [Path(each.ledger, "_results", each.run_id).exists() for each in days] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    "options", [("--keep-days", "0"), ("--keep-days", "-3"), ("--keep-results-days", "-1")]
)
def test_too_few_days_to_keep_are_a_usage_error(
    nights: Nights, options: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        nights.start(*options)
    assert "must be at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["https://alerts.hospital/x", "http://127.0.0.1:9/x", "http://localhost:9/x"]
)
def test_safe_alert_url_is_accepted(url: str) -> None:
    alerts.check_alert_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:x@evil/", "http://127.0.0.1:80@evil/", "http://127.0.0.1.evil/", "http://evil/",
        "https://user:secret@host/", "file:///etc/passwd", "https:///x", "",
    ],
)  # fmt: skip
def test_unsafe_alert_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="neither https:// nor on this machine"):
        alerts.check_alert_url(url)


def test_alert_follows_no_redirect() -> None:
    request = urllib.request.Request("https://alerts.hospital/x", b"{}")
    unused: Any = None  # the body and headers of the answer
    follow: Callable[..., object] = alerts.NoRedirect().redirect_request
    assert follow(request, unused, 307, "", unused, "http://elsewhere/") is None


def test_run_date_in_the_future_is_refused() -> None:
    tomorrow = latest_date()
    assert (tomorrow - datetime.now(UTC).date()).days == 1
    places: dict[str, Any] = {
        "archive": "/archive",
        "ledger": "/ledger",
        "model": "m",
        "config": ScreeningConfig(),
    }
    assert ScreeningJob(**places, run_date=tomorrow).run_date == tomorrow
    with pytest.raises(ConfigError, match="9999-12-31 lies in the future"):
        ScreeningJob(**places, run_date=date(9999, 12, 31))


def test_screening_refuses_a_run_date_in_the_future_with_3(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "archive").mkdir()
    arguments = [
        "--archive",
        str(tmp_path / "archive"),
        "--ledger",
        str(tmp_path / "ledger"),
        "--model",
        str(model_folder),
        "--run-date",
        "9999-12-31",
    ]
    monkeypatch.setattr("sys.argv", ["screen.py", *arguments])
    assert screen.main() == 3
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


@pytest.mark.parametrize(
    ("reasons", "code"), [(["internal_error"], 1), (["vanished", None], 4), ([None], 0)]
)
def test_committed_run_started_again_returns_its_exit_code(
    nights: Nights,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    reasons: list[str | None],
    code: int,
) -> None:
    monkeypatch.setenv(
        "RAY_ADDRESS", "10.0.0.5:6379"
    )  # open, so that the first start ends before it joins
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    (nights.tmp_path / "archive").mkdir()
    arguments = ["--archive", str(nights.tmp_path / "archive"), "--ledger", nights.run.ledger]
    monkeypatch.setattr(
        "sys.argv", ["screen.py", *arguments, "--model", str(model_folder), "--batch", "one"]
    )
    assert screen.main() == 3
    named = run_of_batch(nights.run.ledger, "one")
    assert named is not None
    rows = [
        complete_row(
            nights.run,
            record(series(str(number)), status="failed" if reason else "screened", reason=reason),
        )
        for number, reason in enumerate(reasons)
    ]
    path = Path(named.committed_uri(nights.run.ledger))
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA), path)
    for _ in range(2):
        assert screen.main() == code

"""Results of nights reach the PACS, once, and an export that failed is tried by the next start."""

import json
import subprocess
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
from ledger_rows import freeze, record

from covtanet.commands import nightly
from covtanet.commands.night_exports import PENDING
from covtanet.ledger.batch import name_batch
from covtanet.ledger.commit import commit_run
from covtanet.ledger.finished_rows import store_rows
from covtanet.ledger.run import Run

NIGHT, NEXT_NIGHT = date(2026, 11, 23), date(2026, 11, 24)
SERVER = "dicomweb+https://pacs.hospital/dicom-web"


class ExportingNights:
    """Starts of nights whose screenings have committed, and exports that end as they are told."""

    def __init__(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.tmp_path, self.monkeypatch = run, tmp_path, monkeypatch
        self.screened, self.exported = list[list[str]](), list[list[str]]()
        self.alerts: list[str] = []
        self.codes: list[int] = []
        monkeypatch.setattr(
            nightly, "send_alert", lambda url_file, content: self.alerts.append(content["alert"])
        )
        monkeypatch.setattr(nightly, "subprocess", SimpleNamespace(run=self._run))

    def commit(self, night: date = NIGHT, source_format: str = "dicom") -> str:
        run = replace(self.run, run_date=night)
        (row,) = freeze(run, self.tmp_path, "a")
        store_rows(run, [record(row, status="screened", source_format=source_format)])
        commit_run(run)
        name_batch(run, nightly.batch_of(night))
        return run.run_id

    def _run(self, command: list[str], check: bool) -> "subprocess.CompletedProcess[str]":
        if "export" not in command:
            self.screened.append(command)
            return subprocess.CompletedProcess(command, 0)
        self.exported.append(command)
        return subprocess.CompletedProcess(command, self.codes.pop(0) if self.codes else 0)

    def start(self, *more: str, night: date = NIGHT) -> int:
        self.alerts.clear()
        arguments = ["--archive", "/archive", "--ledger", self.run.ledger, "--model", "m"]
        self.monkeypatch.setattr(
            "sys.argv", ["nightly.py", *arguments, "--night", str(night), *more]
        )
        return nightly.main()

    @property
    def pending(self) -> list[str]:
        folder = Path(self.run.ledger, PENDING)
        return sorted(path.stem for path in folder.iterdir()) if folder.is_dir() else []


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExportingNights:
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
    return ExportingNights(run, tmp_path, monkeypatch)


def test_night_without_export_to_exports_nothing(nights: ExportingNights) -> None:
    nights.commit()
    assert nights.start() == 0
    assert nights.exported == []
    assert nights.pending == []


def test_committed_night_is_exported_once(nights: ExportingNights) -> None:
    run_id = nights.commit()
    for _ in range(2):
        assert nights.start("--export-to", SERVER) == 0
    (command,) = nights.exported
    assert command[command.index("--run") + 1] == run_id
    assert command[command.index("--to") + 1] == SERVER
    assert command[command.index("--results") + 1] == f"{nights.run.ledger}/_results"
    assert (nights.alerts, nights.pending) == ([], [])


@pytest.mark.parametrize("code", [1, 3, 4, -9])
def test_failed_export_alerts_and_is_tried_again_without_screening(
    nights: ExportingNights, code: int
) -> None:
    nights.commit()
    nights.codes = [code, code]
    for _ in range(2):
        assert nights.start("--export-to", SERVER) == 1
        assert nights.alerts == ["export_failed"]
        assert nights.pending == [str(NIGHT)]
    assert (
        json.loads(Path(nights.run.ledger, "_nightly", f"{NIGHT}.json").read_text())["exit_code"]
        == 0
    )
    assert nights.start("--export-to", SERVER) == 0
    assert (nights.alerts, nights.pending) == ([], [])
    assert (len(nights.screened), len(nights.exported)) == (1, 3)


def test_next_night_exports_what_the_night_before_could_not(nights: ExportingNights) -> None:
    first = nights.commit()
    nights.codes = [1]
    assert nights.start("--export-to", SERVER) == 1
    second = nights.commit(NEXT_NIGHT)
    assert nights.start("--export-to", SERVER, night=NEXT_NIGHT) == 0
    exported = [command[command.index("--run") + 1] for command in nights.exported]
    assert exported == [first, first, second]


def test_acknowledged_night_is_not_exported_again(nights: ExportingNights) -> None:
    nights.commit()
    nights.codes = [4]
    assert nights.start("--export-to", SERVER) == 1
    assert nights.start("--acknowledge", "the PACS refuses them") == 0
    assert nights.start("--export-to", SERVER) == 0
    assert len(nights.exported) == 1


def test_night_without_dicom_has_no_export(nights: ExportingNights) -> None:
    nights.commit(source_format="nifti")
    assert nights.start("--export-to", SERVER) == 0
    assert (nights.exported, nights.pending) == ([], [])


@pytest.mark.parametrize(
    "server", ["/folder", "s3://bucket/x", f"{SERVER}/studies/1.2", f"{SERVER}?x=1"]
)
def test_export_to_anything_but_a_server_is_refused(nights: ExportingNights, server: str) -> None:
    nights.commit()
    assert nights.start("--export-to", server) == 3
    assert (nights.screened, nights.alerts) == ([], ["night_failed"])


def test_export_of_hidden_locations_is_a_usage_error(nights: ExportingNights) -> None:
    with pytest.raises(SystemExit, match="2"):
        nights.start("--export-to", SERVER, "--site-key", "/key")

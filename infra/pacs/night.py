"""Two nights over a PACS on this machine, from its first series to results beside them.

python -m infra.pacs.night [--port 8042]      called by ``make pacs``

Starts Orthanc with DICOMweb on loopback, loads phantoms and, if there are any, real series, screens
it as a night does, stores segmentations, reports and key images back, screens the same objects from
a folder and compares the ledgers. A second start does nothing; a series that comes later is
screened alone. Everything lies in .pacs/. On a terminal Orthanc then runs until Ctrl-C.

Research use only, not a medical device.
"""

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

from covtanet.ledger.read import committed_files, read_run
from infra.local.demo import Clock
from infra.local.services import ROOT, write_private
from infra.pacs import contents
from infra.pacs.check import (
    RESULTS,
    VALIDATOR,
    count_modalities,
    differing_series,
    invalid_objects,
    result_series,
)
from infra.pacs.orthanc import INSTALL, USER, Orthanc, is_installed, start_orthanc

FOLDER = ROOT / ".pacs"
MODEL = ROOT / "models" / "v8-lung-box"
PORT = 8042


def main() -> int:
    """Run both nights; return 0 if every check held."""
    options = argparse.ArgumentParser(
        prog="infra.pacs.night",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--port", type=int, default=PORT, help="0 takes a free one")
    arguments = options.parse_args()
    if not is_installed():
        print(f"Orthanc is not installed. On Debian or Ubuntu: {INSTALL}", file=sys.stderr)
        return 3
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: sys.exit(143))
    password = secrets.token_urlsafe(24)
    write_private(FOLDER / "password", password)
    orthanc = start_orthanc(FOLDER / "orthanc", password, arguments.port)
    try:
        failures = Nights(orthanc).run()
        announce(orthanc, failures)
        if sys.stdout.isatty():
            wait_for_interrupt()
    finally:
        orthanc.service.stop()
    return 1 if failures else 0


class Nights:
    """The nights and their checks."""

    def __init__(self, orthanc: Orthanc) -> None:
        self.orthanc = orthanc
        self.clock = Clock()
        self.failures: list[str] = []
        self.today = datetime.now(UTC).date()
        # A file, as a site would have it: the password is in no list of processes.
        os.environ["COVTANET_DICOMWEB_USER"] = USER
        os.environ["COVTANET_DICOMWEB_PASSWORD_FILE"] = str(FOLDER / "password")

    def run(self) -> list[str]:
        """Run both nights; return what was not as it should be."""
        self.load()
        self.first_night()
        self.compare_with_folder()
        self.check_results()
        self.second_night()
        return self.failures

    def load(self) -> None:
        """Fill the PACS, and the folder to compare with."""
        self.clock.say("loading phantoms and real series into Orthanc")
        for series in contents.first_night():
            self.orthanc.load(series)
            contents.write_folder(FOLDER / "folder", series)

    def first_night(self) -> None:
        """Screen the PACS and store the results back; a second start finds nothing to do."""
        self.clock.say("the first night")
        # Damaged series are meant to be rejected: the share does not matter here.
        night = [
            "nightly", "--archive", self.orthanc.archive, "--ledger", str(FOLDER / "ledger"),
            "--model", str(MODEL), "--max-rejected", "1", "--export-to", self.orthanc.archive,
        ]  # fmt: skip
        self.expect(0, *night)
        first = self.rows("ledger")
        self.clock.say("the same night again")
        self.expect(0, *night)
        self.check(self.rows("ledger") == first, "a second start changed the ledger")

    def compare_with_folder(self) -> None:
        """Screen the same objects from a folder and compare the ledgers."""
        self.clock.say("the same objects from a folder")
        self.expect(
            0, "screen", "--archive", str(FOLDER / "folder"), "--ledger",
            str(FOLDER / "ledger-of-folder"), "--model", str(MODEL),
        )  # fmt: skip
        rows = self.rows("ledger")
        differing = differing_series(rows, self.rows("ledger-of-folder"))
        print(f"ledgers: {len(rows)} series, {len(differing)} differ from those of the folder")
        self.check(bool(rows), "the ledger is empty")
        self.check(not differing, f"{len(differing)} series differ from those of the folder")

    def check_results(self) -> None:
        """Search the PACS for results of every screened series, and validate them."""
        screened = [row for row in self.rows("ledger") if row["status"] == "screened"]
        found = result_series(self.orthanc, {row["study_uid"] for row in screened})
        counts = count_modalities(found)
        print(f"results in the PACS: {dict(counts)} for {len(screened)} screened series")
        for modality in RESULTS:
            is_complete = counts[modality] == len(screened)
            self.check(is_complete, f"{counts[modality]} series {modality}")
        errors = invalid_objects(self.orthanc, found)
        if errors is None:
            print(f"{VALIDATOR} is not installed (apt-get install dicom3tools): not validated")
            return
        print(f"{VALIDATOR}: {len(errors)} errors")
        self.check(not errors, "; ".join(sorted(set(errors))[:5]))

    def second_night(self) -> None:
        """Screen what is new since the first night."""
        self.clock.say("one more series, and the second night")
        self.orthanc.load(contents.second_night())
        tomorrow = (self.today + timedelta(days=1)).isoformat()
        self.expect(
            0, "screen", "--archive", self.orthanc.archive, "--ledger", str(FOLDER / "ledger"),
            "--model", str(MODEL), "--since", "last", "--run-date", tomorrow,
        )  # fmt: skip
        num_new = len(self.rows("ledger", tomorrow))
        print(f"second night: {num_new} series")
        self.check(num_new == 1, f"the second night screened {num_new} series, expected 1")

    def rows(self, ledger: str, date: str = "") -> list[dict[str, Any]]:
        """Return the rows of a night, by default of the first."""
        files = committed_files(str(FOLDER / ledger))
        wanted = [uri for uri in files if f"date={date or self.today.isoformat()}/" in uri]
        return [row for uri in wanted for row in read_run(uri).to_pylist()]

    def expect(self, code: int, *arguments: str) -> None:
        """Run a command and check its exit code."""
        command = [sys.executable, "-m", "covtanet", *arguments]
        ended = subprocess.run(command, check=False, cwd=ROOT).returncode
        self.check(ended == code, f"covtanet {arguments[0]} ended with {ended}, expected {code}")

    def check(self, holds: bool, failure: str) -> None:
        """Note a failure."""
        if not holds:
            print(f"NOT AS EXPECTED: {failure}", flush=True)
            self.failures.append(failure)


def announce(orthanc: Orthanc, failures: list[str]) -> None:
    """Print where to look."""
    print(f"\nPACS      {orthanc.url}/app/explorer.html")
    print(f"user      {USER}; the password is in {FOLDER / 'password'}")
    print(f"archive   {orthanc.archive}")
    print(f"ledger    {FOLDER / 'ledger'}")
    print("Research use only, not a medical device.")
    print("done" if not failures else f"{len(failures)} checks failed", flush=True)


def wait_for_interrupt() -> None:
    """Keep Orthanc running until Ctrl-C."""
    print("Ctrl-C ends Orthanc.", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        print("stopping")


if __name__ == "__main__":
    sys.exit(main())

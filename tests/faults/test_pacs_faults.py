"""Screening of a real PACS that is killed, restarted, slow, and cut, in the middle of a run."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pacs import NUM_SERIES, PASSWORD, fill, phantom_series
from pacs_runs import CONFIG, PacsRuns, write_folder
from running import S3, Cluster
from slow_proxy import SlowDoor

from infra.pacs.check import by_series
from infra.pacs.orthanc import INSTALL, Orthanc, is_installed, start_orthanc

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not is_installed(), reason=f"Orthanc is not installed: {INSTALL}"),
]
# A series of 680 kB takes some seconds.
SLOW_BYTES_PER_S = 200_000.0


class Pacs:
    """An Orthanc behind a proxy, that may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.orthanc: Orthanc = start_orthanc(folder, PASSWORD)
        fill(self.orthanc)
        self.port = int(self.orthanc.url.rpartition(":")[2])
        self.door = SlowDoor(self.port)
        self.archive = f"dicomweb+http://127.0.0.1:{self.door.port}/dicom-web"

    def kill(self) -> None:
        """Kill the server as a crash would; its proxy refuses what comes."""
        os.killpg(self.orthanc.service.process.pid, signal.SIGKILL)
        self.orthanc.service.process.wait()
        self.door.is_shut = True

    def restart(self) -> None:
        """Start the server again, with what it had stored."""
        self.orthanc = start_orthanc(self.folder, PASSWORD, self.port)
        self.door.is_shut = False

    def stop(self) -> None:
        """End both."""
        self.door.close()
        self.orthanc.service.stop()


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Pacs]:
    server = Pacs(tmp_path / "orthanc")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def runs(
    cluster: Cluster, s3: S3, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> PacsRuns:
    """Screenings, and the ledger of the same objects in a folder."""
    config = tmp_path_factory.mktemp("pacs") / "screening.toml"
    config.write_text(CONFIG)
    runs = PacsRuns(cluster, s3, model_folder, config)
    contents = [content for number in range(NUM_SERIES) for content in phantom_series(number)]
    write_folder(f"{s3.uri}/faults-folder", contents)
    runs.screen("faults-truth", f"{s3.uri}/faults-folder")
    return runs


def check_equal(runs: PacsRuns, name: str) -> str:
    rows = by_series(runs.rows(name))
    assert rows == by_series(runs.rows("faults-truth"))
    return f"{len(rows)} rows, equal to those of a folder"


def test_pacs_killed_and_restarted_in_a_run_changes_no_row(
    pacs: Pacs, runs: PacsRuns, seen: Callable[[str], None]
) -> None:
    pacs.door.bytes_per_s = SLOW_BYTES_PER_S
    job = runs.start("killed-pacs", pacs.archive)
    job.wait_for(lambda: runs.rows_done("killed-pacs") >= 1)
    pacs.kill()
    time.sleep(8)
    pacs.restart()
    assert job.finish() == 0, job.output
    assert PASSWORD not in job.output
    seen(check_equal(runs, "killed-pacs"))


def test_pacs_that_stays_away_ends_the_run_and_the_next_start_continues(
    pacs: Pacs, runs: PacsRuns, seen: Callable[[str], None]
) -> None:
    pacs.door.bytes_per_s = SLOW_BYTES_PER_S
    job = runs.start("lost-pacs", pacs.archive)
    job.wait_for(lambda: runs.rows_done("lost-pacs") >= 1)
    # The proxy too: no connection comes about.
    pacs.kill()
    pacs.door.close()
    assert job.finish() == 1, job.output
    assert "UnreachableError; the same command continues" in job.output
    assert runs.rows("lost-pacs") == []
    pacs.restart()
    pacs.door = SlowDoor(pacs.port, listen_on=pacs.door.port)
    output = runs.screen("lost-pacs", pacs.archive)
    assert "continuing:" in output
    seen(check_equal(runs, "lost-pacs"))


def test_answers_that_break_off_change_no_row(
    pacs: Pacs, runs: PacsRuns, seen: Callable[[str], None]
) -> None:
    pacs.door.cut_after_bytes, pacs.door.num_cuts = 100_000, 3
    runs.screen("cut-pacs", pacs.archive)
    assert pacs.door.num_cuts == 0
    seen(check_equal(runs, "cut-pacs"))


def test_series_deleted_after_the_listing_is_one_failed_row(
    pacs: Pacs, runs: PacsRuns, seen: Callable[[str], None]
) -> None:
    runs.screen("deleted-from-pacs", pacs.archive, "--plan")
    content = phantom_series(1)[0]
    series = pacs.orthanc.request("POST", "instances", content).json()["ParentSeries"]
    pacs.orthanc.request("DELETE", f"series/{series}")
    # A quarter of the series failed, above --max-failed.
    runs.screen("deleted-from-pacs", pacs.archive, expect=4)
    rows = runs.rows("deleted-from-pacs")
    failed = [row["reason"] for row in rows if row["status"] == "failed"]
    assert failed == ["vanished"]
    assert len(rows) == NUM_SERIES
    truth = by_series(runs.rows("faults-truth"))
    screened = by_series(row for row in rows if row["status"] == "screened")
    assert screened == {uid: truth[uid] for uid in screened}
    seen(f"{len(rows)} rows, 1 vanished")


def test_busy_pacs_is_asked_again(pacs: Pacs, runs: PacsRuns, seen: Callable[[str], None]) -> None:
    pacs.door.busy_answers = 5
    runs.screen("busy-pacs", pacs.archive)
    assert pacs.door.busy_answers == 0
    seen(check_equal(runs, "busy-pacs"))

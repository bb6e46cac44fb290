"""Studies that arrive at a PACS are screened, and their results stored beside them."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from pacs import PASSWORD, READER_TOKEN, edited, phantom_series, uids_of
from pydicom.uid import EncapsulatedPDFStorage
from repository import ROOT

from infra.local.endpoint import Endpoint
from infra.pacs.orthanc import USER, Orthanc

NUMBER = 7
STUDY_UID, _, _ = uids_of(phantom_series(NUMBER)[0])


def push(endpoint: Endpoint, pacs: Orthanc, state: Path, token: str = "", expect: int = 0) -> str:
    """Deal with all changes so far; return the log."""
    command = [
        sys.executable, "-m", "infra.pacs.push", "--orthanc", pacs.url, "--endpoint", endpoint.url,
        "--state", str(state), "--once",
    ]  # fmt: skip
    environment = {
        "COVTANET_DICOMWEB_USER": USER,
        "COVTANET_DICOMWEB_PASSWORD": PASSWORD,
        "COVTANET_TOKEN": token or endpoint.token,
    }
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == expect, ended.stderr
    return ended.stderr


def push_until(text: str, endpoint: Endpoint, pacs: Orthanc, state: Path) -> str:
    """Deal with changes until the log has a text; return all of the log.

    A study counts as stable a second after its last change, and that change comes behind others.
    """
    log = ""
    deadline = time.monotonic() + 60
    while text not in log:
        assert time.monotonic() < deadline, log
        log += push(endpoint, pacs, state)
    return log


def wait_until_stable(pacs: Orthanc, since: int) -> None:
    """Wait until a study has become stable after a change."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        changes = pacs.request("GET", f"changes?since={since}&limit=1000").json()["Changes"]
        if any(change["ChangeType"] == "StableStudy" for change in changes):
            return
        time.sleep(0.3)
    raise TimeoutError("no study became stable")


def last_change(pacs: Orthanc) -> int:
    return int(pacs.request("GET", "changes?last").json()["Last"])


def modalities(pacs: Orthanc) -> Counter[str]:
    """Number of series of the study by modality."""
    query = b'{"Level": "Series", "Expand": true, "Query": {"StudyInstanceUID": "%b"}}'
    series = pacs.request("POST", "tools/find", query % STUDY_UID.encode()).json()
    return Counter(one["MainDicomTags"]["Modality"] for one in series)


@pytest.fixture(scope="module")
def state(pacs: Orthanc, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state file of a program that has dealt with everything so far."""
    wait_until_stable(pacs, 0)  # the series that were there before
    path = tmp_path_factory.mktemp("push") / "last-change"
    path.write_text(str(last_change(pacs)))
    return path


def test_refused_token_stops_the_push_and_loses_no_study(
    endpoint: Endpoint, pacs: Orthanc, state: Path
) -> None:
    since = int(state.read_text())
    pacs.load(phantom_series(NUMBER))
    wait_until_stable(pacs, since)
    log = push(endpoint, pacs, state, token=READER_TOKEN, expect=3)
    assert "store_not_allowed" in log
    assert READER_TOKEN not in log


def test_arriving_study_is_screened_and_its_results_stored(
    endpoint: Endpoint, pacs: Orthanc, state: Path
) -> None:
    log = push_until("200 screened, results sent", endpoint, pacs, state)
    assert STUDY_UID not in log
    assert modalities(pacs) == {"CT": 1, "SEG": 1, "SR": 1, "OT": 1}


def test_results_that_come_back_are_not_screened_again(
    endpoint: Endpoint, pacs: Orthanc, state: Path
) -> None:
    log = push_until("was screened before", endpoint, pacs, state)
    assert ": 200" not in log


def test_study_without_ct_is_left_alone(endpoint: Endpoint, pacs: Orthanc, state: Path) -> None:
    report = edited(
        phantom_series(NUMBER + 1)[0], "report", Modality="DOC", SOPClassUID=EncapsulatedPDFStorage
    )
    pacs.load([report])
    log = push_until("no CT in the study", endpoint, pacs, state)
    assert ": 200" not in log


def test_one_more_slice_is_screened_again(endpoint: Endpoint, pacs: Orthanc, state: Path) -> None:
    pacs.load([edited(phantom_series(NUMBER)[0], "late")])
    # The late slice is a series of its own, too short to be screened.
    log = push_until(": 200", endpoint, pacs, state)
    assert "too_few_slices" in log
    assert "results sent already" in log

"""Nights over a real PACS: the ledger, the next night, and a password that is wrong."""

import base64
from pathlib import Path

import pytest
from pacs import NUM_SERIES, PASSWORD, phantom_series, uids_of
from pacs_runs import CONFIG, PacsRuns, write_folder
from running import S3, Cluster

from infra.pacs.check import by_series
from infra.pacs.orthanc import USER, Orthanc

DATE_OF_PHANTOMS = "?PatientID=PHANTOM"


@pytest.fixture(scope="module")
def runs(
    cluster: Cluster, s3: S3, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> PacsRuns:
    config = tmp_path_factory.mktemp("pacs") / "screening.toml"
    config.write_text(CONFIG)
    return PacsRuns(cluster, s3, model_folder, config)


@pytest.fixture(scope="module")
def night(runs: PacsRuns, orthanc: Orthanc) -> str:
    """Output of the first night."""
    return runs.screen("pacs", orthanc.archive + DATE_OF_PHANTOMS)


def test_pacs_ledger_equals_that_of_the_same_objects_in_a_folder(
    runs: PacsRuns, night: str
) -> None:
    folder = f"{runs.s3.uri}/pacs-folder"
    contents = [content for number in range(NUM_SERIES) for content in phantom_series(number)]
    write_folder(folder, contents)
    runs.screen("folder", folder)
    rows = by_series(runs.rows("pacs"))
    assert len(rows) == NUM_SERIES
    assert {row["status"] for row in rows.values()} == {"screened"}
    assert rows == by_series(runs.rows("folder"))


def test_other_series_are_counted_in_the_summary(night: str) -> None:
    (line,) = (line for line in night.splitlines() if line.startswith("ignored"))
    for kind in ("1 CT localizer", "1 CT, but no CT images", "1 DOC"):
        assert kind in line


def test_next_night_screens_a_new_series_alone(
    runs: PacsRuns, night: str, orthanc: Orthanc
) -> None:
    archive = f"{orthanc.archive}?ModalitiesInStudy=CT"  # another filter of the same archive
    runs.screen("pacs", archive, "--since", "last", date="2026-11-24")
    assert runs.rows("pacs", "2026-11-24") == []
    contents = phantom_series(NUM_SERIES)
    orthanc.load(contents)
    try:
        runs.screen("pacs", archive, "--since", "last", date="2026-11-25")
    finally:
        (identifier,) = {
            orthanc.request("POST", "instances", content).json()["ParentSeries"]
            for content in contents
        }
        orthanc.request("DELETE", f"series/{identifier}")
    assert [row["series_uid"] for row in runs.rows("pacs", "2026-11-25")] == [
        uids_of(contents[0])[1]
    ]


def test_wrong_password_refuses_the_night(runs: PacsRuns, orthanc: Orthanc) -> None:
    wrong = {"COVTANET_DICOMWEB_PASSWORD": "another"}
    environment = {**runs.cluster.environment, **wrong}
    del environment["COVTANET_DICOMWEB_PASSWORD_FILE"]
    stranger = PacsRuns(Cluster(environment), runs.s3, runs.model, runs.config)
    output = stranger.screen("refused", orthanc.archive, expect=1)
    assert "storage: AccessError" in output
    assert not list((runs.s3.folder / "refused").glob("date=*"))


def test_archive_with_password_in_its_uri_is_refused_unquoted(
    runs: PacsRuns, orthanc: Orthanc
) -> None:
    archive = orthanc.archive.replace("http://", f"http://covtanet:{PASSWORD}@")
    output = runs.screen("refused", archive, expect=3)
    assert "without user and password" in output
    assert PASSWORD not in output


def test_password_is_in_no_log_and_no_file(runs: PacsRuns, night: str) -> None:
    logs = Path(runs.cluster.environment["RAY_TMP"]).rglob("*.*")
    files = [path for path in (*logs, *(runs.s3.folder / "pacs").rglob("*")) if path.is_file()]
    assert len(files) > 20
    # As it is, and as basic authentication sends it.
    forms = [PASSWORD.encode(), base64.b64encode(f"{USER}:{PASSWORD}".encode())]
    for form in forms:
        assert form.decode() not in night
        assert [path for path in files if form in path.read_bytes()] == []

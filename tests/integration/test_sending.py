"""Results of series of a real PACS, sent back to it."""

import logging
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import requests
from dicomweb_client.api import DICOMwebClient
from export_rows import keep_masks, screened_row, write_objects
from pacs import PASSWORD, edited, phantom_series, uids_of
from requests.auth import HTTPBasicAuth

from covtanet.archive.dicomweb_series import find_archive
from covtanet.archive.manifest import Series
from covtanet.commands.export import report_outcomes
from covtanet.ct import dicom
from covtanet.report import export
from covtanet.report.outcomes import outcome_of
from covtanet.report.sending import send_objects
from covtanet.report.series_results import SEG, SR
from covtanet.storage import AccessError, UnreachableError, dicomweb_server
from infra.local.services import free_ports
from infra.pacs.orthanc import INSTALL, USER, Orthanc, is_installed, start_orthanc


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """An Orthanc of these tests alone, since they store in it."""
    if not is_installed():
        pytest.skip(f"Orthanc is not installed: {INSTALL}")
    server = start_orthanc(tmp_path_factory.mktemp("orthanc"), PASSWORD)
    server.load(phantom_series(0))
    yield server
    server.service.stop()


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COVTANET_DICOMWEB_USER", USER)
    monkeypatch.setenv("COVTANET_DICOMWEB_PASSWORD", PASSWORD)
    monkeypatch.setattr(dicomweb_server, "BACKOFF_S", 0.02)
    dicomweb_server.dicomweb_server.cache_clear()
    yield
    dicomweb_server.dicomweb_server.cache_clear()


@pytest.fixture(scope="module")
def client(pacs: Orthanc) -> DICOMwebClient:
    session = requests.Session()
    session.auth = HTTPBasicAuth(USER, PASSWORD)
    return DICOMwebClient(f"{pacs.url}/dicom-web", session=session)


def row_in_pacs(pacs: Orthanc) -> dict[str, Any]:
    """The row of the phantom as a screening of the PACS writes it."""
    (series,) = (item for item in find_archive(pacs.archive, "") if isinstance(item, Series))
    return screened_row(pacs.archive, series.to_row())


def with_masks(row: dict[str, Any], results: Path) -> Path:
    objects = phantom_series(0)
    box = np.zeros(dicom.read_series(objects).hu.shape, bool)
    box[4:-4, 40:90, 20:60] = True
    return keep_masks(row, results, box, objects)


def test_results_of_pacs_series_are_found_in_its_study(
    pacs: Orthanc, client: DICOMwebClient, tmp_path: Path
) -> None:
    row = row_in_pacs(pacs)
    folder = with_masks(row, tmp_path)
    assert export.export_series(row, str(tmp_path), pacs.archive)["outcome"] == "sent"
    study_uid, series_uid, _ = uids_of(phantom_series(0)[0])
    found = client.search_for_series(study_uid)
    modalities = {item["00080060"]["Value"][0]: item["0020000E"]["Value"][0] for item in found}
    assert set(modalities) == {"CT", "SEG", "SR", "OT"}
    assert modalities["CT"] == series_uid
    stored = client.retrieve_series(study_uid, modalities["OT"])
    assert len(stored) == len(list(folder.glob("key-*"))) == 12
    (seg,) = client.retrieve_series(study_uid, modalities["SEG"])
    assert seg.PixelData == pydicom.dcmread(folder / SEG).PixelData


def test_results_sent_twice_are_stored_once(
    pacs: Orthanc, client: DICOMwebClient, tmp_path: Path
) -> None:
    """Also when the files are lost, and when the PACS has lost one of the objects."""
    row = row_in_pacs(pacs)
    with_masks(row, tmp_path / "first")
    export.export_series(row, str(tmp_path / "first"), pacs.archive)
    before = instances(client)
    for results, expected in (("first", "sent already"), ("again", "sent already")):
        if results == "again":
            with_masks(row, tmp_path / results)
        outcome = export.export_series(row, str(tmp_path / results), pacs.archive)
        assert (outcome["outcome"], outcome["detail"]) == (expected, "")
    assert instances(client) == before
    lost = pacs.request("GET", "instances?limit=100&expand=1&since=0").json()
    (report,) = (
        item for item in lost if item["MainDicomTags"]["SOPInstanceUID"] in reports(client)
    )
    pacs.request("DELETE", f"instances/{report['ID']}")
    assert len(instances(client)) == len(before) - 1
    assert export.export_series(row, str(tmp_path / "first"), pacs.archive)["outcome"] == "sent"
    assert instances(client) == before


def instances(client: DICOMwebClient) -> set[str]:
    study_uid = uids_of(phantom_series(0)[0])[0]
    return {item["00080018"]["Value"][0] for item in client.search_for_instances(study_uid)}


def reports(client: DICOMwebClient) -> set[str]:
    study_uid = uids_of(phantom_series(0)[0])[0]
    filters = {"Modality": "SR"}
    found = client.search_for_instances(study_uid, search_filters=filters)
    return {item["00080018"]["Value"][0] for item in found}


def test_series_of_a_folder_is_sent_from_its_results(pacs: Orthanc, tmp_path: Path) -> None:
    """Whose study the PACS did not know before."""
    objects = [edited(data, "folder", StudyInstanceUID="1.2.3.4.5") for data in phantom_series(0)]
    write_objects(tmp_path / "archive" / "scan", objects)
    row = screened_row(tmp_path / "archive")
    with_masks(row, tmp_path / "results")
    assert export.export_series(row, str(tmp_path / "results"))["outcome"] == "written"
    outcome = export.export_series(row, str(tmp_path / "results"), pacs.archive)
    assert outcome["outcome"] == "sent"
    pacs.request("DELETE", f"studies/{orthanc_study(pacs, '1.2.3.4.5')}")


def orthanc_study(pacs: Orthanc, study_uid: str) -> str:
    studies = pacs.request("GET", "studies?expand").json()
    (found,) = (
        item["ID"] for item in studies if item["MainDicomTags"]["StudyInstanceUID"] == study_uid
    )
    return str(found)


def test_changed_series_of_pacs_is_not_sent(pacs: Orthanc, tmp_path: Path) -> None:
    row = {**row_in_pacs(pacs), "source_digest": "0" * 64}
    with_masks(row, tmp_path)
    assert export.export_series(row, str(tmp_path), pacs.archive)["outcome"] == "changed"
    gone = {**row, "series_uid": "1.2.3", "source_uri": f"{pacs.archive}/studies/1.2/series/1.2.3/"}
    assert export.export_series(gone, str(tmp_path), pacs.archive)["outcome"] == "vanished"


def test_refused_object_is_named_with_its_reason(
    pacs: Orthanc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An object of another study than that of the request, which every server refuses."""
    row = row_in_pacs(pacs)
    folder = with_masks(row, tmp_path)
    export.export_series(row, str(tmp_path))
    other = pydicom.dcmread(folder / SR)
    other.StudyInstanceUID, other.SOPInstanceUID = "1.2.3.9", "1.2.3.9.1"
    other.file_meta.MediaStorageSOPInstanceUID = other.SOPInstanceUID
    buffer = BytesIO()
    other.save_as(buffer)
    seg = edited((folder / SEG).read_bytes(), "new")
    outcome, detail = send_objects([(SEG, seg), (SR, buffer.getvalue())], pacs.archive)
    assert outcome == "refused"
    assert detail.startswith("SR 0x")
    with caplog.at_level(logging.INFO):
        refused = outcome_of(row["series_key"], outcome, detail)
        assert report_outcomes([refused]) == 4
    assert f"series {row['series_key']}: refused, SR 0x" in caplog.text
    assert row["series_uid"] not in caplog.text


def test_wrong_password_or_dead_server_ends_the_export(
    pacs: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_in_pacs(pacs)
    with_masks(row, tmp_path)
    export.export_series(row, str(tmp_path))
    (port,) = free_ports(1)
    with pytest.raises(UnreachableError):
        export.export_series(row, str(tmp_path), f"dicomweb+http://127.0.0.1:{port}/dicom-web")
    monkeypatch.setenv("COVTANET_DICOMWEB_PASSWORD", "wrong")
    dicomweb_server.dicomweb_server.cache_clear()
    with pytest.raises(AccessError):
        export.export_series(row, str(tmp_path), pacs.archive)

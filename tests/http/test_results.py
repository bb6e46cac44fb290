"""DICOM results of single studies over HTTP: as parts of the answer, and stored at the PACS."""

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import pydicom
import pytest
import requests
from dicomweb_client.api import DICOMwebClient
from pacs import PASSWORD, READER_TOKEN, phantom_series, uids_of
from requests.auth import HTTPBasicAuth
from screening_runs import Screening

from covtanet.storage.multipart import boundary_of, read_parts
from infra.local.endpoint import Endpoint
from infra.pacs.orthanc import USER, Orthanc

DICOM_PARTS = {"Accept": 'multipart/related; type="application/dicom", application/json'}
JSON_BODY = {"Content-Type": "application/json"}
STUDY_UID, SERIES_UID, _ = uids_of(phantom_series(0)[0])


def ask(
    endpoint: Endpoint, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> tuple[int, Any, Mapping[str, str]]:
    sent = json.dumps(body).encode()
    headers = {**JSON_BODY, **(headers or {})}
    return endpoint.ask("POST", "/v1/studies:by-uri", sent, headers)


def split(content: bytes, headers: Mapping[str, str]) -> tuple[Any, list[pydicom.Dataset]]:
    """The rows of an answer of several parts, and its objects."""
    boundary = boundary_of(headers["Content-Type"])
    first, *others = (b"".join(part.read()) for part in read_parts([content], boundary))
    return json.loads(first), [pydicom.dcmread(BytesIO(data)) for data in others]


def study_uri(pacs: Orthanc) -> str:
    return f"{pacs.archive}/studies/{STUDY_UID}"


def columns(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an answer without the columns that differ from answer to answer."""
    skipped = ("screened_at", "decode_s", "predict_s")
    return [
        {name: value for name, value in row.items() if name not in skipped}
        for row in answer["series"]
    ]


def instances(pacs: Orthanc) -> dict[str, str]:
    """Modality by UID of every instance of the study, as another client finds them."""
    session = requests.Session()
    session.auth = HTTPBasicAuth(USER, PASSWORD)
    client = DICOMwebClient(f"{pacs.url}/dicom-web", session=session)
    return {
        instance["00080018"]["Value"][0]: series["00080060"]["Value"][0]
        for series in client.search_for_series(STUDY_UID)
        for instance in client.search_for_instances(STUDY_UID, series["0020000E"]["Value"][0])
    }


def test_study_of_pacs_is_answered_with_rows_and_objects(endpoint: Endpoint, pacs: Orthanc) -> None:
    status, plain, _ = ask(endpoint, {"uri": study_uri(pacs)})
    assert (status, "results" in plain) == (200, False), plain
    series = f"{study_uri(pacs)}/series/{SERIES_UID}"
    answers = []
    for uri in (study_uri(pacs), series):
        status, content, headers = ask(endpoint, {"uri": uri}, DICOM_PARTS)
        assert status == 200, content
        assert int(headers["Content-Length"]) == len(content)
        answer, objects = split(content, headers)
        assert columns(answer) == columns(plain)
        (outcome,) = answer["results"]
        assert (outcome["series_key"], outcome["outcome"]) == (
            plain["series"][0]["series_key"], "made",
        )  # fmt: skip
        answers.append(objects)
    first, second = answers
    assert {item.Modality for item in first} == {"SEG", "SR", "OT"}
    assert [item.SOPInstanceUID for item in first] == [item.SOPInstanceUID for item in second]
    assert {item.StudyInstanceUID for item in first} == {STUDY_UID}
    assert set(instances(pacs).values()) == {"CT"}


def test_results_of_pacs_study_are_stored_there_once(endpoint: Endpoint, pacs: Orthanc) -> None:
    body = {"uri": study_uri(pacs), "store_results": True}
    status, answer, _ = ask(endpoint, body)
    assert status == 200, answer
    assert [item["outcome"] for item in answer["results"]] == ["sent"]
    before = instances(pacs)
    assert set(before.values()) == {"CT", "SEG", "SR", "OT"}
    status, content, headers = ask(endpoint, body, DICOM_PARTS)
    answer, objects = split(content, headers)
    assert [item["outcome"] for item in answer["results"]] == ["sent already"]
    assert {item.SOPInstanceUID for item in objects} < set(before)
    assert instances(pacs) == before


def test_study_in_s3_is_answered_with_objects(endpoint: Endpoint, screening: Screening) -> None:
    rows = [row for row in screening.clean.to_pylist() if row["status"] == "screened"]
    dicom = next(row for row in rows if row["source_format"] == "dicom")
    status, content, headers = ask(endpoint, {"uri": dicom["source_uri"]}, DICOM_PARTS)
    assert status == 200, content
    _, objects = split(content, headers)
    assert {item.Modality for item in objects} == {"SEG", "SR", "OT"}
    nifti = next(row for row in rows if row["source_format"] == "nifti")
    status, content, headers = ask(endpoint, {"uri": nifti["source_uri"]}, DICOM_PARTS)
    answer, objects = split(content, headers)
    assert (len(answer["series"]), answer["results"], objects) == (1, [], [])


def test_caller_who_may_not_store_gets_403(endpoint: Endpoint, pacs: Orthanc) -> None:
    reader = {"Authorization": f"Bearer {READER_TOKEN}"}
    body = {"uri": study_uri(pacs), "store_results": True}
    status, answer, _ = ask(endpoint, body, reader)
    assert (status, answer["reason"]) == (403, "store_not_allowed")
    assert ask(endpoint, {"uri": study_uri(pacs)}, reader)[0] == 200


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/dicom-web/studies/1.2.3", (422, "no_series")),
        ("/dicom-web", (422, "invalid_request")),
        ("/dicom-web/studies/x", (422, "invalid_request")),
        ("/dicom-web/studies/1.2.3?limit=1", (403, "place_not_allowed")),
        ("/dicom-web/studies/../../instances", (403, "place_not_allowed")),
        ("/dicom-web-of-others/studies/1.2.3", (403, "place_not_allowed")),
        ("/instances", (403, "place_not_allowed")),
    ],
)
def test_uri_that_names_no_study_of_an_allowed_server_is_refused(
    endpoint: Endpoint, pacs: Orthanc, path: str, expected: tuple[int, str]
) -> None:
    root = pacs.archive.removesuffix("/dicom-web")
    status, answer, _ = ask(endpoint, {"uri": f"{root}{path}"})
    assert (status, answer["reason"]) == expected


def test_results_of_s3_study_have_no_server_to_be_stored_at(endpoint: Endpoint) -> None:
    status, answer, _ = ask(endpoint, {"uri": "s3://bucket/archive/x", "store_results": True})
    assert (status, answer["reason"]) == (422, "invalid_request")

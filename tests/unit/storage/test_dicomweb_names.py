"""URIs, filters, UIDs and credentials of a DICOMweb server."""

from pathlib import Path

import pytest

from covtanet import storage
from covtanet.errors import ConfigError
from covtanet.storage import dicomweb
from covtanet.storage.dicomweb_server import Credentials, check_status, parse_json
from covtanet.storage.uri import http_url

ROOT = "dicomweb+https://pacs.example:8443/dicom-web"


@pytest.mark.parametrize(
    "uri", [ROOT, "dicomweb+http://127.0.0.1:8042/x", "dicomweb+http://localhost"]
)
def test_absolute_uri_of_server_has_no_final_slash(uri: str) -> None:
    assert storage.absolute(f"{uri}/") == uri
    assert storage.is_dicomweb(uri)
    assert http_url(uri) == uri.removeprefix("dicomweb+")


@pytest.mark.parametrize(
    "uri",
    [
        "dicomweb+https://user:canary@pacs/x",
        "dicomweb+https://canary@pacs",
        "dicomweb+https://pacs/../canary",
        "dicomweb+https://pacs/./canary",
        "dicomweb+https://pacs/x?canary=1",
        "dicomweb+https://pacs/x#canary",
        "dicomweb+https://pacs/x y",
        "dicomweb+https://pacs/%2e%2e/canary",
        "dicomweb+https:///canary",
        "dicomweb+https://pacs:canary/",
    ],
)
def test_uri_with_more_than_host_and_path_is_refused_unquoted(uri: str) -> None:
    with pytest.raises(ConfigError, match="without user and password") as refused:
        storage.absolute(uri)
    assert "canary" not in str(refused.value)


def test_plain_http_is_refused_beyond_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("pacs.example", "10.0.0.7", "192.168.1.5:8042"):
        with pytest.raises(ConfigError, match="clear text"):
            storage.absolute(f"dicomweb+http://{host}/dicom-web")
    monkeypatch.setenv("COVTANET_ALLOW_PLAIN_HTTP", "1")
    assert storage.absolute("dicomweb+http://10.0.0.7/x")
    with pytest.raises(ConfigError, match="clear text"):
        storage.absolute("dicomweb+http://pacs.example/x")


def test_query_is_split_from_dicomweb_uris_alone() -> None:
    assert storage.split_query(f"{ROOT}?StudyDate=20260101-") == (ROOT, "StudyDate=20260101-")
    assert storage.split_query("/data/odd?name") == ("/data/odd?name", "")


def test_filters_keep_order_and_repeated_names() -> None:
    query = "StudyDate=20260101-20260131&ModalitiesInStudy=CT&PatientID=A%20B"
    expected = [
        ("StudyDate", "20260101-20260131"),
        ("ModalitiesInStudy", "CT"),
        ("PatientID", "A B"),
    ]
    assert dicomweb.parse_filters(query) == expected
    assert dicomweb.parse_filters("") == []


@pytest.mark.parametrize(
    "query", ["StudyDate", "limit=5", "StudyDate=1&Offset=3", "includefield=all"]
)
def test_filters_that_are_no_attributes_are_refused(query: str) -> None:
    with pytest.raises(ConfigError, match="query of the archive"):
        dicomweb.parse_filters(query)


def test_path_of_study_and_series_is_split() -> None:
    assert dicomweb.split_path(f"{ROOT}/studies/1.2/series/3.4/") == (ROOT, "1.2", "3.4")
    assert dicomweb.split_path(f"{ROOT}/studies/1.2") == (ROOT, "1.2", "")
    assert dicomweb.split_path(ROOT) == (ROOT, "", "")


@pytest.mark.parametrize(
    "path",
    ["a", "1.2/3.4", "1.2/series/", "1.2/series/3/instances/4", "1.2/serie/3", "1..2", "1" * 65],
)
def test_other_path_below_studies_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="ROOT/studies/UID"):
        dicomweb.split_path(f"{ROOT}/studies/{path}")


@pytest.mark.parametrize("value", ["", "1/2", "../x", "1.2\n", "٣.4", None, {"a": 1}])
def test_invalid_uid_of_server_raises(value: object) -> None:
    with pytest.raises(OSError, match="invalid UID"):
        dicomweb.checked_uid({"0020000D": {"Value": [value]}}, "0020000D")


def test_status_becomes_kind_of_error() -> None:
    for status, error in (
        (401, storage.AccessError),
        (404, FileNotFoundError),
        (410, FileNotFoundError),
    ):
        with pytest.raises(error, match="DICOMweb server"):
            check_status(status)
    for status in (302, 403, 500, 503):
        with pytest.raises(OSError, match=f"answered {status}"):
            check_status(status)
    check_status(200)


@pytest.mark.parametrize("content", [b"", b"<html>", b"[1]", b'"text"', b"[" * 100_000])
def test_answer_that_is_no_dicom_json_raises(content: bytes) -> None:
    with pytest.raises(OSError, match="DICOM JSON"):
        parse_json(content)


def test_credentials_come_from_environment_or_file(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("two\n")
    password.chmod(0o600)
    user = {"COVTANET_DICOMWEB_USER": "a"}
    # base64 of a:one and a:two
    by_value = Credentials({**user, "COVTANET_DICOMWEB_PASSWORD": "one"})
    assert by_value.header() == "Basic YTpvbmU="
    by_file = Credentials({**user, "COVTANET_DICOMWEB_PASSWORD_FILE": str(password)})
    assert by_file.header() == "Basic YTp0d28="
    assert Credentials({}).header() == ""


def test_renewed_token_of_file_is_used_by_next_request(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    token.chmod(0o640)
    credentials = Credentials({"COVTANET_DICOMWEB_TOKEN_FILE": str(token)})
    assert credentials.header() == "Bearer first"
    token.write_text("second")
    assert credentials.header() == "Bearer second"


def test_credentials_that_are_incomplete_or_open_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PASSWORD"):
        Credentials({"COVTANET_DICOMWEB_USER": "a"})
    with pytest.raises(ConfigError, match="cannot be read"):
        Credentials({"COVTANET_DICOMWEB_TOKEN_FILE": str(tmp_path / "none")})
    token = tmp_path / "token"
    token.write_text("canary")
    token.chmod(0o644)
    with pytest.raises(ConfigError, match="every user"):
        Credentials({"COVTANET_DICOMWEB_TOKEN_FILE": str(token)})

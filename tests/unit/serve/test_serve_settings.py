"""Settings of the endpoint: tokens, allowed locations, dates, memory."""

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from serve.multipart_answer import accepts_dicom
from serve.schemas import BatchRequest
from serve.settings import EMPTY_SHA256, Caller, ServeConfig

TOKEN = "a-token"


def settings(ledger: str = "", places: tuple[str, ...] = ("s3://hospital/ct",)) -> ServeConfig:
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    return ServeConfig(
        callers=(Caller(name="ann", token_sha256=digest, places=places),), ledger=ledger
    )


def test_digest_of_an_empty_token_is_refused() -> None:
    """``printf %s "$UNSET" | sha256sum`` prints it; a header with one blank would be that token."""
    with pytest.raises(ValueError, match="digest of an empty text"):
        Caller(name="ann", token_sha256=EMPTY_SHA256)
    assert settings().caller_of(TOKEN) is not None
    for wrong in ("", " ", "\xa0", f"{TOKEN} ", f"{TOKEN}\n"):
        assert settings().caller_of(wrong) is None


@pytest.mark.parametrize(
    "uri",
    [
        "s3://hospital/ct/a\nb",
        "s3://hospital/ct/a\x00",
        "s3://hospital/ct/*",
        "s3://hospital/ct/\x1b[0m",
        "~nobody/x",
    ],
)
def test_uri_with_control_characters_or_wildcard_is_not_read(uri: str) -> None:
    caller = settings().callers[0]
    assert settings().may_read(caller, "s3://hospital/ct/study 1")
    assert not settings().may_read(caller, uri)


def test_uri_inside_or_around_the_ledger_is_not_read() -> None:
    """The ledger holds the masks of other callers' batches."""
    configured = settings(ledger="s3://hospital/ct/ledger")
    caller = configured.callers[0]
    assert configured.may_read(caller, "s3://hospital/ct/ledger-of-2025/x")
    for uri in (
        "s3://hospital/ct",
        "s3://hospital/ct/ledger",
        "s3://hospital/ct/ledger/_batches/ledger/_results/x",
    ):
        assert not configured.may_read(caller, uri)


PACS = "dicomweb+https://pacs.hospital/dicom-web"
STUDY = f"{PACS}/studies/1.2.3"


@pytest.mark.parametrize(
    ("place", "uri", "is_allowed"),
    [
        (PACS, STUDY, True),
        (PACS, f"{STUDY}/series/1.2.3.4/", True),
        (f"{PACS}/", STUDY, True),
        (STUDY, f"{STUDY}/series/1.2.3.4", True),
        (STUDY, f"{STUDY}.4", False),
        (STUDY, PACS, False),
        (PACS, f"{PACS}-of-others/studies/1.2.3", False),
        (PACS, STUDY.replace("hospital", "hospital.evil"), False),
        (PACS, STUDY.replace("pacs.", "pacs.hospital@evil."), False),
        (PACS, STUDY.replace("hospital/", "hospital:8443/"), False),
        (PACS, STUDY.replace("+https", "+http"), False),
        (PACS, STUDY.removeprefix("dicomweb+"), False),
        (PACS, f"{PACS}/studies/../../instances", False),
        (PACS, f"{PACS}/./studies/1.2.3", False),
        (PACS, f"{PACS}//studies/1.2.3", False),
        (PACS, f"{PACS}/studies/%2e%2e/1.2.3", False),
        (PACS, f"{STUDY}?limit=1", False),
        (PACS, f"{STUDY}#x", False),
        ("s3://hospital/ct", STUDY, False),
        (PACS, "s3://hospital/ct/x", False),
    ],
)
def test_dicomweb_uri_is_read_only_below_an_allowed_path(
    place: str, uri: str, is_allowed: bool
) -> None:
    configured = settings(ledger="s3://hospital/ledger", places=(place,))
    assert configured.may_read(configured.callers[0], uri) is is_allowed


@pytest.mark.parametrize(
    "place", ["/folder", "https://pacs.hospital/dicom-web", "dicomweb+ftp://pacs.hospital"]
)
def test_place_that_is_neither_s3_nor_dicomweb_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match="expected s3://BUCKET/PREFIX or dicomweb"):
        settings(places=(place,))


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ('multipart/related; type="application/dicom"', True),
        ("multipart/related;type=application/dicom;q=0.9, application/json", True),
        ("application/json", False),
        ("*/*", False),
        ("", False),
        ("multipart/related", False),
        ('multipart/related; type="image/jpeg"', False),
        ("application/dicom", False),
    ],
)
def test_accept_header_asks_for_objects_by_the_type_of_their_parts(
    accept: str, expected: bool
) -> None:
    assert accepts_dicom(accept) is expected


def test_run_date_far_from_today_is_refused() -> None:
    today = datetime.now(UTC).date()
    for days in (-1, 0, 1):
        assert BatchRequest(
            archive="s3://hospital/ct", run_date=today + timedelta(days=days)
        ).run_date
    for date in ("9999-12-31", (today - timedelta(days=3)).isoformat()):
        with pytest.raises(ValidationError, match="a day before or after"):
            BatchRequest.model_validate({"archive": "s3://hospital/ct", "run_date": date})


def test_replica_memory_is_the_limit_of_its_decoders() -> None:
    assert settings().replica_memory_bytes == 2 * (3072 + 600) << 20
